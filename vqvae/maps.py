"""The depth maps that a depth tokenizer is trained and tried on, at its own resolution, in files that are read as
they are needed.

    python -m perceptio.vqvae.maps build/maps --source world --split train --count 40000
    python -m perceptio.vqvae.maps build/maps --source my_labels --split train

A source is "world" (our own rendered scenes), a folder of depth pictures as `perceptio label` writes them (one in
twenty is for the split "validation", the others for "train"), or a folder of shards with a depth column.  A part of
2,000 maps is one file; run again, the command goes on with the next part.
"""

import argparse
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..cli import refuse
from ..data.depths import TOP, DepthError, decode_depth
from ..data.label import fill_holes
from ..data.manifest import write_json
from ..extras import extra

PART = 2000  # maps of one file
NOTE, BEGUN = "maps.json", "maps.begun.json"
HELD_OUT = 20  # of a folder without splits one file in so many is for validation
OVERSAMPLED = 160  # pixels at which the world is rendered at least, so that edges are smooth after shrinking


class MapSet:
    """The maps of a folder: `maps[indices]` is float32[B, side, side] in [0, 1], larger is nearer.

    Nothing is read before it is asked for, and what was read may leave the memory again: the files are mapped.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        note = self.folder / NOTE
        if not note.is_file():
            raise FileNotFoundError(f"{self.folder} has no {NOTE}: write it with `python -m perceptio.vqvae.maps`")
        self.facts = json.loads(note.read_text("utf-8"))
        self.side: int = self.facts["side"]
        self.parts = [self._open(name, count) for name, count in self.facts["parts"]]
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])

    def _open(self, name: str, count: int) -> Tensor:
        try:
            values = load_file(self.folder / name)["maps"]
        except (OSError, SafetensorError, KeyError) as error:
            raise DepthError(
                f"{self.folder / name} cannot be read ({error}): remove it and write the maps again"
            ) from error
        if values.shape != (count, self.side, self.side) or values.dtype != torch.int16:
            raise DepthError(
                f"{self.folder / name} holds {values.dtype} of shape {tuple(values.shape)}, expected int16 of "
                f"{(count, self.side, self.side)}: remove it and write the maps again"
            )
        return values

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, indices) -> Tensor:
        rows = []
        for index in indices:
            part = int(np.searchsorted(self.starts, int(index), side="right")) - 1
            rows.append(self.parts[part][int(index) - int(self.starts[part])])
        return unpack(torch.stack(rows))


def pack(maps: Tensor) -> Tensor:
    """float[..., H, W] in [0, 1] → int16, of which the bits are those of a 16-bit picture without holes."""
    return (maps.double() * TOP).round().to(torch.int32).add(1).to(torch.int16)


def unpack(values: Tensor) -> Tensor:
    return ((values.to(torch.int32) & 0xFFFF).float() - 1) / TOP


def shrink(depth: np.ndarray, side: int) -> Tensor:
    """A map float32[H, W] of any size, NaN for no value → float32[side, side], as the tokenizer would see it."""
    filled = torch.from_numpy(np.ascontiguousarray(fill_holes(depth)))[None, None]
    if filled.shape[-2:] != (side, side):
        filled = F.interpolate(filled, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    return filled[0, 0].clamp(0, 1)


def write_maps(
    out,
    source: str = "world",
    *,
    split: str = "train",
    count: int | None = None,
    side: int = 160,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
) -> dict:
    """Write the maps of a source and return the note beside them.  Parts that are there already are kept.

    count: how many; all of a folder where none is given.  seed, workers: of the rendering.
    """
    folder = Path(out)
    wanted = {"source": _name(source), "split": split, "count": count, "side": side, "seed": seed}
    if not _begin(folder, wanted):
        return json.loads((folder / NOTE).read_text("utf-8"))
    sizes = _finished_parts(folder)
    skipped: Counter = Counter()
    if source == "world":
        maps = _of_world(split, count, seed, side, workers, sum(sizes))
    else:
        maps = islice(_of_folder(Path(source), split, side, skipped), sum(sizes), count)
    bar = tqdm(maps, "depth maps", count, initial=sum(sizes), unit=" maps", disable=None if progress else True)
    for rows in _groups(bar, PART):
        _write_part(folder / _part(len(sizes)), pack(torch.stack(rows)))
        sizes.append(len(rows))
    if not sizes:
        raise DepthError(f"{source} gave no depth map of the split {split!r} (left out: {dict(skipped) or 'none'})")
    parts = [[_part(number), size] for number, size in enumerate(sizes)]
    facts = wanted | _teacher(source) | {"skipped": dict(skipped), "parts": parts}
    write_json(folder / NOTE, facts)
    (folder / BEGUN).unlink()
    return facts


def _name(source: str) -> str:
    """What says in the note where the maps come from; not where on this machine the folder lies."""
    return source if source == "world" else Path(source).resolve().name


def _teacher(source) -> dict:
    """Who saw the depth, as far as the source says: the licence of a teacher reaches what is made of its maps."""
    note = Path(source) / "labels.json"
    if str(source) == "world" or not note.is_file():
        return {}
    found = json.loads(note.read_text("utf-8"))
    return {key: found.get(key) for key in ("teacher", "teacher_licence")}


def _begin(folder: Path, wanted: dict) -> bool:
    """Whether there is anything left to do.  Refuses a folder that holds other maps."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (NOTE, BEGUN):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text("utf-8"))
            if changed := [key for key in wanted if found.get(key) != wanted[key]]:
                raise DepthError(
                    f"{folder} holds other maps ({changed[0]} {found.get(changed[0])!r}), expected "
                    f"{wanted[changed[0]]!r}: name another folder, or remove this one"
                )
            if name == NOTE:
                return False
    write_json(folder / BEGUN, wanted)
    return True


def _part(number: int) -> str:
    return f"maps-{number:05d}.safetensors"


def _finished_parts(folder: Path) -> list[int]:
    """Sizes of the parts from the first on.  Only whole files have their final name."""
    sizes = []
    while (path := folder / _part(len(sizes))).is_file():
        with safe_open(path, "pt") as file:
            sizes.append(file.get_slice("maps").get_shape()[0])
    return sizes


def _write_part(path: Path, values: Tensor) -> None:
    half = path.with_name(f".{path.name}.incomplete")
    save_file({"maps": values}, half)
    os.replace(half, path)


def _groups(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while group := list(islice(items, size)):
        yield group


def _of_world(split: str, count: int | None, seed: int, side: int, workers: int | None, done: int) -> Iterator[Tensor]:
    if count is None or count < 1:
        raise ValueError(f"`count` is {count!r}, but the world has no end: say how many scenes to render")
    with extra("world", "the world needs"):
        from ..world.maps import world_maps
    side_rendered = side * max(1, OVERSAMPLED // side)
    for depth in world_maps(count - done, seed, split, side_rendered, first=done, workers=workers):
        yield shrink(depth, side)


def _of_folder(folder: Path, split: str, side: int, skipped: Counter) -> Iterator[Tensor]:
    for data in _stored_maps(folder, split):
        try:
            yield shrink(decode_depth(data), side)
        except DepthError as error:
            skipped[str(error)[:80]] += 1


def _stored_maps(folder: Path, split: str) -> Iterator[bytes]:
    """16-bit pictures of depth: the depth column of shards, or the PNG files of a folder."""
    if (folder / "manifest.json").is_file():
        from ..data.shards import read_shards

        yield from (row["depth"]["bytes"] for row in read_shards(folder, split) if row["depth"] is not None)
        return
    root = folder / "depth" if (folder / "depth").is_dir() else folder
    paths = sorted(root.rglob("*.png"))
    if not paths:
        raise FileNotFoundError(
            f"{folder} has neither manifest.json nor PNG files, expected shards or depth pictures: name another folder"
        )
    for path in paths:
        if split in ("all", split_of(path.relative_to(root).as_posix())):
            yield path.read_bytes()


def split_of(name: str) -> str:
    """Where a file without a split belongs: by its name, so that it stays there when others join it."""
    return "validation" if zlib.crc32(name.encode()) % HELD_OUT == 0 else "train"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m perceptio.vqvae.maps",
        description="Write the depth maps that a depth tokenizer is trained on. Run again, it goes on.",
        epilog="Example: python -m perceptio.vqvae.maps build/maps --count 40000 --side 80",
    )
    parser.add_argument("out", metavar="DIR", help="folder to write")
    parser.add_argument(
        "--source", default="world", help="world, a folder of depth pictures, or of shards (default: %(default)s)"
    )
    parser.add_argument(
        "--split", default="train", help="of the source; all: of a folder of pictures (default: %(default)s)"
    )
    parser.add_argument("--count", type=int, metavar="N", help="how many (default: all of a folder)")
    parser.add_argument("--side", type=int, default=160, metavar="PIXELS", help="resolution (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the world (default: %(default)s)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that render (default: one per core)")
    options = vars(parser.parse_args(arguments))
    try:
        facts = write_maps(**options, progress=True)
    except (ValueError, OSError, ImportError) as error:
        return refuse(error)
    print(f"{options['out']}: {sum(size for _, size in facts['parts'])} maps of {facts['side']} pixels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
