"""Several tables of records as one sequence per epoch: exact shares, one order for a seed, random access.

The order of an epoch is a list of (source, row), known before a record is read.  A rank, a worker or a job that goes
on after a break takes its places of that list; how many they are changes nothing.
"""

import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .record import DataError, Problem
from .row_groups import UNREADABLE, Group, damaged, read_group, with_patience
from .shards import PARQUET, ROWS_PER_GROUP, SCHEMA

WINDOW = 4  # row groups whose rows are shuffled together
OPEN_GROUPS = 2 * WINDOW  # held in memory for each source; a repeat begins while the one before it ends


class Mixture:
    """The sources of a recipe, opened.  tables: for each entry of `recipe.sources`, its records by row."""

    def __init__(self, recipe, tables: "list[RecordTable]"):
        self.recipe, self.tables = recipe, tables
        for entry, table in zip(recipe.sources, tables, strict=True):
            if not len(table):
                raise DataError(
                    Problem(
                        entry.path, None, entry.name, "no record", "at least one", "see its tally, or leave it out"
                    )
                )

    def counts(self, epoch: int = 0) -> list[int]:
        """How many records of each source an epoch has."""
        shares = [entry.share(epoch) for entry in self.recipe.sources]
        if self.recipe.rows_per_epoch is None:
            sizes = [len(table) * entry.repeats for entry, table in zip(self.recipe.sources, self.tables, strict=True)]
            return [round(size * share) for size, share in zip(sizes, shares, strict=True)]
        weights = [entry.weight * share for entry, share in zip(self.recipe.sources, shares, strict=True)]
        if not any(weights):
            return [0] * len(weights)
        return apportion(weights, self.recipe.rows_per_epoch)

    def epoch(self, epoch: int = 0) -> "Epoch":
        return Epoch(self, epoch)

    def describe(self, epoch: int = 0) -> str:
        """A table: source, its rows, how often each is seen, its rows in the epoch and their share."""
        counts, unit = self.counts(epoch), "weight" if self.recipe.rows_per_epoch else "repeats"
        lines = [("source", "reader", "rows", unit, "in the epoch", "share")]
        for entry, table, count in zip(self.recipe.sources, self.tables, counts, strict=True):
            share = f"{count / max(sum(counts), 1):.1%}"
            lines.append((entry.name, entry.reader, str(len(table)), f"{getattr(entry, unit):g}", str(count), share))
        lines.append(("all", "", str(sum(map(len, self.tables))), "", str(sum(counts)), "100.0%"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = (
            "  ".join(_pad(cell, w, i) for i, (cell, w) in enumerate(zip(line, widths, strict=True))) for line in lines
        )
        return "\n".join(row.rstrip() for row in rows)


class Epoch(Sequence):
    """The records of one epoch in their order."""

    def __init__(self, mixture: Mixture, epoch: int):
        self.mixture = mixture
        names, counts = [entry.name for entry in mixture.recipe.sources], mixture.counts(epoch)
        if not any(counts):
            raise DataError(f"epoch {epoch} of the recipe has no record, expected some: change `share_by_epoch`")
        self.source, self.row = order(names, mixture.tables, counts, mixture.recipe.seed, epoch)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: int) -> dict:
        source = self.source[place]
        entry = self.mixture.recipe.sources[source]
        record = self.mixture.tables[source][int(self.row[place])]
        return as_told(record, entry)

    def part(self, rank: int = 0, world: int = 1, start: int = 0) -> Iterator[dict]:
        """The records of one of `world` readers, after the first `start` places of all of them."""
        if not 0 <= rank < world:
            raise ValueError(f"`rank` is {rank} of a `world` of {world}, expected 0 to {world - 1}")
        if start < 0:
            raise ValueError(f"`start` is {start}, expected 0 or the number of places that are done")
        return (self[place] for place in range(start + rank, len(self), world))


def apportion(weights: list[float], total: int) -> list[int]:
    """Whole numbers in proportion to `weights` that add up to `total`; the largest remainders are rounded up."""
    exact = np.asarray(weights, np.float64) / sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts.tolist()


def order(names: list[str], tables: "list[RecordTable]", counts: list[int], seed: int, epoch: int):
    """(source int16[n], row int64[n]) of an epoch.

    The k-th of a source's c records lies at a random point of the k-th of c equal parts of the epoch, so that every
    stretch of it holds the sources in their shares, give or take a record or two.  What comes of one source does not
    change with the others.
    """
    sources, rows, places = [], [], []
    for index, (name, table, count) in enumerate(zip(names, tables, counts, strict=True)):
        draw = np.random.default_rng([seed, epoch, zlib.crc32(name.encode())])
        passes = [_shuffled(table.blocks, draw) for _ in range(-(-count // len(table)))]
        rows.append(np.concatenate([np.empty(0, np.int64), *passes])[:count])
        places.append((np.arange(count) + draw.random(count)) / max(count, 1))
        sources.append(np.full(count, index, np.int16))
    by_place = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate(sources)[by_place], np.concatenate(rows)[by_place]


def _shuffled(blocks: list[tuple[int, int]], draw: np.random.Generator) -> np.ndarray:
    """All rows in random order, but so that it stays within a few blocks at a time: reading them costs."""
    mixed = [np.arange(*blocks[index]) for index in draw.permutation(len(blocks))]
    windows = (mixed[start : start + WINDOW] for start in range(0, len(mixed), WINDOW))
    return np.concatenate([draw.permutation(np.concatenate(window)) for window in windows])


def as_told(record: dict, entry) -> dict:
    """The record as the entry of a recipe wants its answers to open."""
    record = with_perception(record, entry.perception) if entry.perception else record
    return without_perception(record, entry.without) if entry.without else record


def without_perception(record: dict, mode: str) -> dict:
    """The record whose answers leave out the mask, the depth span, or both."""
    left_out = set(mode.split("+"))
    messages = []
    for message in record["messages"]:
        if message["role"] == "assistant":
            kept = [part for part in (message["perception"] or "none").split("+") if part not in left_out]
            message = {**message, "perception": "+".join(kept) or "none"}
        messages.append(message)
    depth = {"depth": None, "depth_codes": None, "depth_codebook": None} if "depth" in left_out else {}
    masks = [] if "seg" in left_out else record["masks"]
    return {**record, "messages": messages, "masks": masks, **depth}


def with_perception(record: dict, mode: str) -> dict:
    """The record with all its answers opening in one mode; what the mode has no use for is left out."""
    turns = [turn for turn, message in enumerate(record["messages"]) if message["role"] == "assistant"]
    masks = record["masks"] if "seg" in mode else []
    missing = "masks" if "seg" in mode and {m["turn"] for m in masks if m["offset"] == -1} != set(turns) else None
    if "depth" in mode and record["depth"] is None and record["depth_codes"] is None:
        missing = "depth"
    if missing:
        raise DataError(
            Problem(
                record["source"], None, missing, f"none in {record['id']}", mode, "change `perception`, or label it"
            )
        )
    depth = {} if "depth" in mode else {"depth": None, "depth_codes": None, "depth_codebook": None}
    messages = [{**m, "perception": mode} if m["role"] == "assistant" else m for m in record["messages"]]
    return {**record, "messages": messages, "masks": masks, **depth}


def lay_down(records: Iterable[dict], path: Path) -> list[Group]:
    """Records in a Parquet file, so that they are read once and need no memory."""
    rows, groups = iter(records), []
    with pq.ParquetWriter(path, SCHEMA, **PARQUET) as file:
        while batch := list(islice(rows, ROWS_PER_GROUP)):
            file.write_table(pa.Table.from_pylist(batch, SCHEMA))
            groups.append(Group(str(path), len(groups), 0, len(batch)))
    return groups


class RecordTable(Sequence):
    """The records of row groups by their row.  take: only the first so many.

    blocks: (first row, past the last) of each row group, the unit that is read.
    """

    def __init__(self, groups: Iterable[Group], take: int | None = None):
        self.groups, self.blocks, first = [], [], 0
        for group in groups:
            size = group.stop - group.start
            size = size if take is None else min(size, take - first)
            if size > 0:
                self.groups.append(group)
                self.blocks.append((first, first + size))
                first += size
        self.rows, self.starts = first, [start for start, _ in self.blocks]
        self.open: OrderedDict[int, list[dict]] = OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "open": OrderedDict()}  # another process reads for itself

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict:
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of {self.rows}")
        group = bisect_right(self.starts, row) - 1
        return self._read(group)[row - self.starts[group]]

    def _read(self, group: int) -> list[dict]:
        if group not in self.open:
            place = self.groups[group]
            try:
                self.open[group] = with_patience(read_group, place)
            except UNREADABLE as error:
                raise damaged(place.file, f"row group {place.index} cannot be read ({error!s:.200})") from error
            if len(self.open) > OPEN_GROUPS:
                self.open.popitem(last=False)
        self.open.move_to_end(group)
        return self.open[group]


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)
