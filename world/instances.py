"""Pictures of scenes with what belongs to which thing: what a promptable segmenter is trained on."""

import json
import os
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ..data.manifest import write_json
from .records import SPLITS, WORTH_WORKERS
from .scene import sample_scene
from .views import thing_map

PART = 500  # scenes of a file
NOTE = "instances.json"


def scene_instances(index: int, seed: int = 0, split: str = "train", side: int = 192) -> tuple[np.ndarray, np.ndarray]:
    """uint8[side, side, 3], and uint8[side, side]: 0 where there is no thing, else the thing's number from 1 on."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = sample_scene(rng, side, side)
    return scene.rendering.image, (thing_map(scene) + 1).astype(np.uint8)


class InstanceSet:
    """Scenes that `write_instances` laid down, read from the disk when they are asked for."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.facts = json.loads((self.folder / NOTE).read_text("utf-8"))
        self._open: dict[int, object] = {}

    def __len__(self) -> int:
        return self.facts["count"]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        part, row = divmod(index, PART)
        if part not in self._open:
            self._open[part] = safe_open(self.folder / _name(part), "pt")
        file = self._open[part]
        return file.get_slice("image")[row], file.get_slice("things")[row]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}  # another process opens for itself


def write_instances(
    folder, *, split: str = "train", count: int, side: int = 192, seed: int = 0, workers: int | None = None
) -> InstanceSet:
    """Lay down `count` scenes; files that are there already are kept."""
    folder, facts = Path(folder), {"split": split, "count": count, "side": side, "seed": seed}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / NOTE).is_file():
        found = json.loads((folder / NOTE).read_text("utf-8"))
        if found != facts:
            raise ValueError(f"{folder} holds other scenes ({found}), expected {facts}: name another folder")
        return InstanceSet(folder)
    starts = [start for start in range(0, count, PART) if not (folder / _name(start // PART)).is_file()]
    indices = [index for start in starts for index in range(start, min(start + PART, count))]
    rows = _rendered(indices, seed, split, side, workers)
    images, things = [], []
    for index, (image, ids) in zip(tqdm(indices, "scenes", unit=" scenes", disable=None), rows, strict=True):
        images.append(torch.from_numpy(image))
        things.append(torch.from_numpy(ids))
        if (index + 1) % PART == 0 or index + 1 == count:
            path = folder / _name(index // PART)
            half = path.with_name(f".{path.name}.incomplete")
            save_file({"image": torch.stack(images), "things": torch.stack(things)}, half)
            os.replace(half, path)
            images, things = [], []
    write_json(folder / NOTE, facts)
    return InstanceSet(folder)


def _name(part: int) -> str:
    return f"part-{part:05d}.safetensors"


def _rendered(indices: list[int], seed: int, split: str, side: int, workers: int | None) -> Iterator:
    tasks = [(index, seed, split, side) for index in indices]
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers == 0 or len(tasks) < WORTH_WORKERS:
        yield from map(_draw, tasks)
        return
    with get_context("spawn").Pool(min(workers, len(tasks))) as pool:
        yield from pool.imap(_draw, tasks, 8)


def _draw(task: tuple) -> tuple[np.ndarray, np.ndarray]:
    return scene_instances(*task)
