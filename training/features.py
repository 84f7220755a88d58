"""SAM2's features of pictures, kept on disk: its encoder is frozen, so that they never change.

One file for each picture, named by the SHA-256 of its bytes, below a folder named by the encoder: features of another
encoder are never read.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..processing_perceptio import load_picture

LEVELS = ("fine", "middle", "coarse")
SPARE = 1 << 30  # bytes that a cache leaves free on its disk


class FeatureCache:
    """Features by picture.  encoder: what tells this encoder from others;  dtype: as they are stored."""

    def __init__(self, folder, encoder: str, dtype: torch.dtype = torch.bfloat16):
        self.folder = Path(folder) / f"{encoder}-{str(dtype).removeprefix('torch.')}"
        self.dtype = dtype

    def key(self, picture: bytes) -> str:
        return hashlib.sha256(picture).hexdigest()[:40]

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> list[Tensor] | None:
        """The maps at strides 4, 8 and 16, or None."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            maps = load_file(path)
            return [maps[level] for level in LEVELS]
        except Exception as error:  # safetensors raises its own class, which is a plain Exception
            raise OSError(f"{path} cannot be read ({error}): remove it, and it is made again") from error

    def write(self, key: str, maps: Iterable[Tensor]) -> None:
        path = self.path(key)
        half = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
        stored = (level.to("cpu", self.dtype).contiguous() for level in maps)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(dict(zip(LEVELS, stored, strict=True)), half)
            os.replace(half, path)
        except Exception as error:
            if half.is_file():
                half.unlink()
            there = next(folder for folder in path.parents if folder.is_dir())
            raise OSError(
                f"{path} cannot be written ({error}); {shutil.disk_usage(there).free >> 20} MiB are free: name a "
                "larger disk as `sam_cache`"
            ) from error


def encoder_name(model) -> str:
    """A hash of SAM2's image encoder: the size of its picture, and a few numbers of each weight."""
    found = hashlib.sha256(str(model.config.mask_image_size).encode())
    for name, weight in sorted(model.mask_model.vision_encoder.named_parameters()):
        flat = weight.detach().flatten()
        picked = flat[:: max(1, len(flat) // 16)][:16].to("cpu", torch.bfloat16).float()
        found.update(f"{name}{tuple(weight.shape)}{picked.tolist()}".encode())
    return found.hexdigest()[:16]


@torch.no_grad()
def fill_cache(cache: FeatureCache, records: Iterable[dict], model, processor, *, progress: bool = True) -> int:
    """Features of the pictures of all records with masks that are not there yet; returns how many were made."""
    made, seen = 0, set()
    for record in tqdm(records, "SAM2 features", unit=" records", disable=None if progress else True):
        if not record["masks"] or record["image"] is None:
            continue
        key = cache.key(record["image"]["bytes"])
        if key in seen or cache.path(key).is_file():
            continue
        seen.add(key)
        try:
            pixels = torch.from_numpy(processor.sam_pixels(load_picture(record["image"]["bytes"])))
        except (ValueError, OSError):
            continue  # the training itself skips the record, or stops and names it
        maps = model.encode_pictures(pixels[None])
        if not made:
            _check_room(cache, maps)
        cache.write(key, [level[0] for level in maps])
        made += 1
    return made


def open_cache(folder, model, processor, datasets, state, dtype: torch.dtype) -> FeatureCache:
    """The cache below `folder`, filled for all records of `datasets`, which the processes share among them."""
    cache = FeatureCache(folder, encoder_name(model), dtype)
    for dataset in datasets:
        own = range(state.process_index, len(dataset), state.num_processes)
        fill_cache(cache, (dataset[i] for i in own), model, processor, progress=state.is_local_main_process)
    state.wait_for_everyone()
    return cache


def _check_room(cache: FeatureCache, maps) -> None:
    cache.folder.mkdir(parents=True, exist_ok=True)
    size = sum(level.numel() for level in maps) * cache.dtype.itemsize
    free = shutil.disk_usage(cache.folder).free
    if free < size + SPARE:
        raise OSError(
            f"{cache.folder} has {free >> 20} MiB left, a picture's features take {size >> 20} MiB: name a larger "
            "disk as `sam_cache`, or leave it out"
        )
