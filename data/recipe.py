"""A recipe: which sources a training run mixes, how often each is seen, and what its answers open with.

    seed: 0
    root: data                    # paths are below it
    sources:
      - name: refcoco             # one of its own; the reader's when it is left out
        reader: refer             # a name of `data.sources.READERS`, or "shards": Parquet files written before
        path: refcoco             # of shards also a URL, or several folders at once: parts/*/scenes
        split: train
        repeats: 4                # or `weight`, and then for every source, with `rows_per_epoch` for all
        take: 1000                # only the first
        perception: seg           # every answer opens so, whatever the source says
        without: depth            # no answer has it: seg, depth or seg+depth
        share_by_epoch: [1.0, 0.5, 0.1]   # of its repeats or weight; the last holds from there on
        options: {dataset: refcoco}       # further arguments of the reader

A reader that is not "shards" reads its source from the start at every opening and lays its records down in a temporary
folder; large sources are written as shards once.
"""

import difflib
import importlib
import inspect
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, replace
from glob import glob
from itertools import islice
from pathlib import Path

import yaml

from ..processing_perceptio import PERCEPTION_MODES
from .mixture import Mixture, RecordTable, lay_down
from .record import DataError, Problem
from .row_groups import find_groups
from .sources import READERS
from .tally import Tally

SHARDS = "shards"
OURS = ("root", "tally", "split")  # parameters of a reader that are no options


@dataclass(frozen=True)
class Source:
    """One entry of a recipe."""

    reader: str
    path: str
    name: str = ""
    split: str | None = None
    repeats: float = 1.0
    weight: float = 1.0
    take: int | None = None
    perception: str | None = None
    without: str | None = None
    share_by_epoch: tuple[float, ...] = (1.0,)
    options: dict = field(default_factory=dict)

    def share(self, epoch: int) -> float:
        return self.share_by_epoch[min(epoch, len(self.share_by_epoch) - 1)]


@dataclass(frozen=True)
class Recipe:
    sources: tuple[Source, ...]
    seed: int = 0
    root: str = "."
    rows_per_epoch: int | None = None


def read_recipe(path: str | Path, root: str | Path | None = None) -> Recipe:
    """The recipe of a YAML file.  root: in place of the file's own.  All that is wrong is in one `DataError`."""
    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:  # ValueError: no UTF-8, a 13th month
        raise DataError(
            Problem(str(path), None, "file", f"not readable ({error})", "a recipe in YAML", "see recipes/data")
        ) from error
    recipe = parse_recipe(content, str(path))
    return recipe if root is None else replace(recipe, root=str(root))


def parse_recipe(content, file: str = "the recipe") -> Recipe:
    """The recipe of an object as YAML gives it."""
    problems = _Problems(file)
    values = problems.keys(content, Recipe, "", RECIPE_CHECKS)
    entries = values.pop("sources", [])
    sources = [problems.keys(entry, Source, f"sources[{i}].", SOURCE_CHECKS) for i, entry in enumerate(entries)]
    for index, source in enumerate(sources):
        _check_source(source, index, values, problems)
    _check_names(sources, problems)
    if problems.found:
        raise DataError(problems.found)
    built = (Source(**{"name": source["reader"], **source}) for source in sources)
    return Recipe(tuple(replace(s, share_by_epoch=tuple(map(float, s.share_by_epoch))) for s in built), **values)


class _Problems:
    def __init__(self, file: str):
        self.file, self.found = file, []

    def add(self, where: str, found: str, expected: str, remedy: str) -> None:
        self.found.append(Problem(self.file, None, where, found, expected, remedy))

    def keys(self, content, kind: type, where: str, checks: dict) -> dict:
        """The good keys of an object; what is unknown, missing or of another type is a problem."""
        if not isinstance(content, dict):
            self.add(where.rstrip(".") or "recipe", f"{content!r:.60}", "keys and values", "see recipes/data")
            return {}
        known = {entry.name: entry for entry in fields(kind)}
        good = {}
        for key, value in content.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                self.add(
                    f"{where}{key}",
                    "an unknown key",
                    ", ".join(known),
                    f"write `{near[0]}`" if near else "take it out",
                )
                continue
            test, expected = checks[key]
            if test(value):
                good[key] = value
            else:
                self.add(f"{where}{key}", f"{value!r:.60}", expected, "change the value")
        for key in known:
            needed = known[key].default is MISSING and known[key].default_factory is MISSING
            if needed and key not in content:
                self.add(f"{where}{key}", "nothing", checks[key][1], "add the key")
        return good


def _is_number(value, above: float = -math.inf) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > above


def _is_whole(value, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_shares(value) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_number(share) and share >= 0 for share in value)


SEEING_MODES = [mode for mode in PERCEPTION_MODES if mode != "none"]
RECIPE_CHECKS = {
    "sources": (lambda value: isinstance(value, list) and bool(value), "a list of sources"),
    "seed": (lambda value: _is_whole(value, 0), "a whole number of at least 0"),
    "root": (_is_text, "a folder"),
    "rows_per_epoch": (lambda value: _is_whole(value, 1), "a whole number of at least 1"),
}
SOURCE_CHECKS = {
    "reader": (_is_text, "the name of a reader"),
    "path": (_is_text, "a path below `root`"),
    "name": (_is_text, "a name"),
    "split": (_is_text, "the name of a split"),
    "repeats": (lambda value: _is_number(value, 0), "a number above 0"),
    "weight": (lambda value: _is_number(value, 0), "a number above 0"),
    "take": (lambda value: _is_whole(value, 1), "a whole number of at least 1"),
    "perception": (lambda value: value in list(PERCEPTION_MODES), "one of " + ", ".join(PERCEPTION_MODES)),
    "without": (lambda value: value in SEEING_MODES, "one of " + ", ".join(SEEING_MODES)),
    "share_by_epoch": (_are_shares, "a list of numbers of at least 0"),
    "options": (lambda value: isinstance(value, dict), "keys and values"),
}


def _check_source(source: dict, index: int, recipe: dict, problems: _Problems) -> None:
    where = f"sources[{index}]."
    if "rows_per_epoch" in recipe and "repeats" in source:
        problems.add(f"{where}repeats", "`repeats` beside `rows_per_epoch`", "`weight`", "take one of them out")
    if "rows_per_epoch" not in recipe and "weight" in source:
        problems.add(
            f"{where}weight", "`weight` without `rows_per_epoch`", "`repeats`, or both", "add `rows_per_epoch`"
        )
    reader = source.get("reader", SHARDS)
    if reader == SHARDS:
        for key in source.get("options", {}):
            problems.add(f"{where}options.{key}", "an unknown option", "none for shards", "take it out")
        return
    if reader not in READERS:
        near = difflib.get_close_matches(reader, [SHARDS, *READERS], 1)
        names = ", ".join([SHARDS, *sorted(READERS)])
        problems.add(f"{where}reader", repr(reader), names, f"write `{near[0]}`" if near else "name one of these")
        return
    parameters = inspect.signature(load_reader(reader)).parameters
    known = {name: parameter for name, parameter in parameters.items() if name not in OURS}
    options = source.get("options", {})
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            remedy = f"write `{near[0]}`" if near else "take it out"
            problems.add(f"{where}options.{key}", "an unknown option", ", ".join(sorted(known)), remedy)
        elif known[key].annotation in (bool, int, str) and type(value) is not known[key].annotation:
            kind = known[key].annotation.__name__
            problems.add(f"{where}options.{key}", f"{value!r:.60}", f"a value of type {kind}", "change the value")
    for key, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and key not in options:
            problems.add(f"{where}options.{key}", "nothing", f"an option that {reader} needs", "add the key")


def _check_names(sources: list[dict], problems: _Problems) -> None:
    names = [source.get("name", source.get("reader")) for source in sources]
    for index, name in enumerate(names):
        if name is not None and name in names[:index]:
            where = f"sources[{index}].name"
            problems.add(where, f"{name!r}, as in sources[{names.index(name)}]", "one of its own", "give it a `name`")


def load_reader(name: str):
    """The function that a name of `READERS` stands for."""
    module, _, function = READERS[name].partition(":")
    return getattr(importlib.import_module(module, f"{__package__}.sources"), function)


@contextmanager
def open_recipe(recipe: Recipe, cache: str | Path | None = None, tallies: dict | None = None) -> Iterator[Mixture]:
    """The sources of a recipe, read.

    cache: where records of sources that are not shards are laid down, a temporary folder by default; gone at the end.
    tallies: gets the tally of each source by its name.
    """
    with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as folder:
        files = (Path(folder, f"{index}.parquet") for index in range(len(recipe.sources)))
        tables = [_open_source(recipe, *pair, tallies) for pair in zip(recipe.sources, files, strict=True)]
        yield Mixture(recipe, tables)


def _open_source(recipe: Recipe, source: Source, file: Path, tallies: dict | None) -> RecordTable:
    path = source.path if "://" in source.path else Path(recipe.root) / source.path
    paths = [path]
    if isinstance(path, Path) and not path.exists():
        paths = sorted(glob(str(path))) if source.reader == SHARDS else []
    if not paths:
        raise DataError(
            Problem(str(path), None, source.name, "no such path", "the source's files", "fetch it, or fix `root`")
        )
    if source.reader == SHARDS:
        return RecordTable(find_groups([str(path) for path in paths], source.split or "train", None), source.take)
    tally = Tally(source.name)
    if tallies is not None:
        tallies[source.name] = tally
    split = {} if source.split is None else {"split": source.split}
    records = load_reader(source.reader)(path, tally=tally, **split, **source.options)
    return RecordTable(lay_down(islice(records, source.take), file))


def mix(recipe: Recipe, epoch: int = 0, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[dict]:
    """The records of an epoch (of its reader `rank` of `world`, after `start` places), in the order of the seed."""
    with open_recipe(recipe) as mixture:
        yield from mixture.epoch(epoch).part(rank, world, start)


def describe(recipe: Recipe, epoch: int = 0) -> str:
    """A table of the sources: rows, repeats or weight, rows in the epoch and their share."""
    with open_recipe(recipe) as mixture:
        return mixture.describe(epoch)
