"""Weights by name: lazy sources, recipes from source tensors to target tensors, and a writer that holds one shard.

A plan is a dict from target key to `Recipe`. Every source key must be used by the plan or be ignored by name, and
every target key must have a recipe; `check_plan` says which do not. Nothing here knows a model.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, contiguous_format, empty

from ..files_perceptio import INDEX_FILE, SINGLE_FILE, read_header, weight_files

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MOST_NAMED = 8  # keys spelled out in an error; the rest are counted


@dataclass(frozen=True)
class Recipe:
    """How one target tensor is made: `make(*source tensors)`, or the one source tensor itself where `make` is None."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor] | None = None

    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        tensors = [weights[key] for key in self.sources]
        return tensors[0] if self.make is None else self.make(*tensors)


class SafetensorsFolder(Mapping):
    """The tensors of a folder of safetensors files, sharded or not, read one at a time and never kept."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        paths = weight_files(self.folder)
        if not paths:
            raise ValueError(
                f"{self.folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: weights in .bin files are not read, "
                "convert them to safetensors first"
            )
        self._files, self._file_of = {}, {}
        for path in paths:
            self._file_of.update(dict.fromkeys(read_header(path), path))
            with _Reading(path):
                self._files[path] = safe_open(path, framework="pt")

    def __getitem__(self, key: str) -> Tensor:
        path = self._file_of[key]
        with _Reading(path):
            return self._files[path].get_tensor(key)

    def __iter__(self):
        return iter(self._file_of)

    def __len__(self):
        return len(self._file_of)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._files[self._file_of[key]].get_slice(key).get_shape())


class _Reading:
    """Names the file in whatever the safetensors library raises."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, (SafetensorError, OSError)):
            raise ValueError(f"{self.path} cannot be read as safetensors ({error}): download it again") from error


class Shaped(Mapping):
    """Tensors without content, made from their shapes when asked for: a rehearsal costs no memory."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = shapes

    def __getitem__(self, key: str) -> Tensor:
        return empty(self.shapes[key], device="meta")

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


def shape_of(weights: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """The shape of a tensor, without reading it where the source can tell."""
    return weights.shape(key) if isinstance(weights, SafetensorsFolder) else tuple(weights[key].shape)


def name_keys(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    rest = f" and {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else ""
    return ", ".join(keys[:MOST_NAMED]) + rest


def check_plan(
    part: str,
    plan: Mapping[str, Recipe],
    source_keys: Iterable[str],
    target_keys: Iterable[str],
    ignored: Iterable[str],
) -> None:
    """Every source key is used or ignored, every target key is made, and no recipe asks for what is not there."""
    source_keys, target_keys = set(source_keys), set(target_keys)
    used = {key for target, recipe in plan.items() for key in recipe.sources if target in target_keys}
    problems = {
        "missing from the source": used - source_keys,
        "left over in the source": source_keys - used - set(ignored),
        "made by nothing": target_keys - set(plan),
    }
    found = [f"{len(keys)} {what}: {name_keys(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(
            f"the weights of the {part} do not fit its configuration ({'; '.join(found)}): take weights and "
            "configuration from the same checkpoint"
        )


def parse_size(text: str | int) -> int:
    """`"5GB"` in bytes; a number is bytes already."""
    if isinstance(text, int):
        size = text
    else:
        number = text.strip().upper()
        unit = next((name for name in sorted(UNITS, key=len, reverse=True) if number.endswith(name)), None)
        try:
            size = int(float(number.removesuffix(unit or "")) * UNITS.get(unit, 1))
        except ValueError as error:
            raise ValueError(f"`max_shard_size` is {text!r}, expected for example 5GB or 500MB") from error
    if size <= 0:
        raise ValueError(f"`max_shard_size` is {text!r}, expected a size above zero")
    return size


def write_shards(
    folder: Path,
    sizes: Mapping[str, int],
    make: Callable[[str], Tensor],
    max_shard_size: str | int = "5GB",
    progress: Callable[[str], object] | None = None,
) -> list[str]:
    """Write `make(key)` for each key of `sizes` (bytes), in order, holding one shard at a time. Returns file names."""
    limit, shards, room = parse_size(max_shard_size), [], 0
    for key, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(key)
        room -= size
    one = len(shards) == 1
    names = [SINGLE_FILE if one else f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, keys in zip(names, shards, strict=True):
        tensors = {}
        for key in keys:
            tensors[key] = make(key).clone(memory_format=contiguous_format)  # own memory, not a view of a fused one
            if progress is not None:
                progress(key)
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if not one:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names
