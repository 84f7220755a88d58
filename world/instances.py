"""Pictures of scenes with what every pixel shows: what a segmenter and a vision tower are trained on."""

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
from .marks import LETTERS, choose_points
from .records import SPLITS, WORTH_WORKERS
from .scene import sample_scene
from .shapes import NOUNS
from .surfaces import COLOURS, PATTERNS
from .views import inverse_depth, thing_map

PART = 500  # scenes of a file
MOST = 255  # things of a scene, and the value of what there is not
NOTE = "instances.json"


def scene_instances(index: int, seed: int = 0, split: str = "train", side: int = 192) -> dict[str, np.ndarray]:
    """What every pixel of a scene shows.

    image: uint8[side, side, 3];  things: uint8[side, side], 0 where there is no thing, else its number from 1 on;
    depth: float16[side, side], relative inverse depth;  names: uint8[256, 3], by number its noun, colour and pattern,
    each counted from 1 on, 0 for none;  places: int16[5, 2], (x, y) of points that differ in depth, -1 for none.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = sample_scene(rng, side, side)
    inverse = inverse_depth(scene.rendering.depth)
    names = np.zeros((MOST + 1, 3), np.uint8)
    for number, thing in enumerate(scene.things[:MOST], 1):
        names[number] = [
            1 + NOUNS.index(thing.noun),
            1 + list(COLOURS).index(thing.colour),
            1 + PATTERNS.index(thing.pattern),
        ]
    places = np.full((len(LETTERS), 2), -1, np.int16)
    for count in (5, 3, 2):
        found = choose_points(rng, inverse, scene.rendering.depth, count)
        if found is not None:
            places[:count] = found
            break
    indices = thing_map(scene)
    things = np.where(indices < MOST, indices + 1, 0)
    return {
        "image": scene.rendering.image,
        "things": things.astype(np.uint8),
        "depth": inverse.astype(np.float16),
        "names": names,
        "places": places,
    }


class InstanceSet:
    """Scenes that `write_instances` laid down, read from the disk when they are asked for."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.facts = json.loads((self.folder / NOTE).read_text("utf-8"))
        self._open: dict[int, object] = {}

    def __len__(self) -> int:
        return self.facts["count"]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """A scene by the names of `scene_instances`."""
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        part, row = divmod(index, PART)
        if part not in self._open:
            self._open[part] = safe_open(self.folder / _name(part), "pt")
        file = self._open[part]
        return {name: file.get_slice(name)[row] for name in file.keys()}

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
    part: list[dict] = []
    for index, row in zip(tqdm(indices, "scenes", unit=" scenes", disable=None), rows, strict=True):
        part.append(row)
        if (index + 1) % PART == 0 or index + 1 == count:
            path = folder / _name(index // PART)
            half = path.with_name(f".{path.name}.incomplete")
            save_file({name: torch.from_numpy(np.stack([row[name] for row in part])) for name in row}, half)
            os.replace(half, path)
            part = []
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


def _draw(task: tuple) -> dict[str, np.ndarray]:
    return scene_instances(*task)
