"""Shards as a stream: `datasets`' IterableDataset over folders and Hub ids, in memory that does not grow with them.

The rows of all shards, their row groups shuffled by (seed, epoch), are one long line. Each rank takes its part of the
line and each DataLoader worker its part of that, to the row, so nothing is left out or read twice. A worker then
shuffles as many row groups at a time as fill its buffer. Row group, buffer and place in it are the whole state: unlike
a rolling buffer, whose rows are lost, it resumes with exactly the next record.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from datasets import DatasetInfo, Features, Image, IterableDataset

# The one base class with which a source can say itself how it is split, shuffled and resumed.
from datasets.iterable_dataset import _BaseExamplesIterable

from .record import FEATURES, DataError
from .row_groups import UNREADABLE, Group, damaged, find_groups, read_group, with_patience
from .tally import Tally

logger = logging.getLogger(__name__)
ENCODED = Features({name: Image(decode=False) if isinstance(kind, Image) else kind for name, kind in FEATURES.items()})
ON_ERROR = ("stop", "skip")
MOST_WORKERS = 1024
REASONS = ("kept", "unreadable row group", "refused record")


def stream(
    folders_or_ids,
    *,
    split: str = "train",
    shuffle_buffer: int = 256,
    seed: int = 0,
    epoch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    transform: Callable[[dict], object] | None = None,
    on_error: str = "stop",
    tally: "StreamTally | None" = None,
    codebook: str | None = None,
) -> IterableDataset:
    """The records of one or more folders of shards (or Hub ids, or URLs), pictures still encoded.

    shuffle_buffer: rows that are shuffled among each other, 0 for the order of the shards; this many records are in
        memory. The order depends on `seed` and `epoch` alone; `set_epoch` of the result changes the epoch.
    rank, world_size: this process among those that share the data; their parts differ by one record at most. Leave
        them out where something else splits the data set (accelerate's `prepare`).
    transform: record → what is yielded, run in the worker.
    on_error: "stop" raises where a row group cannot be read or `transform` raises ValueError or OSError; "skip" goes
        on without it, warns, and counts it in `tally`, which works across the workers of a DataLoader.
    codebook: the hash that the depth codes must have.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"`on_error` is {on_error!r}, expected one of {', '.join(ON_ERROR)}")
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` is {rank} of {world_size} processes, expected 0 to {world_size - 1}")
    folders = [folders_or_ids] if isinstance(folders_or_ids, (str, Path)) else list(folders_or_ids)
    groups = list(find_groups([str(folder) for folder in folders], split, codebook))
    rows = sum(group.stop for group in groups)
    if rows < world_size:
        raise DataError(
            f"{', '.join(map(str, folders))} holds {rows} records of the split {split!r} for {world_size} processes, "
            "expected at least one for each: use fewer processes, or add data"
        )
    source = _Rows(tuple(groups), shuffle_buffer, seed, _Policy(transform, on_error, tally or StreamTally()))
    features = ENCODED if transform is None else None
    dataset = IterableDataset(source.shard_data_sources(world_size, rank), info=DatasetInfo(features=features))
    dataset.set_epoch(epoch)
    return dataset


class StreamTally:
    """What became of the rows of a stream, counted across the worker processes of a DataLoader."""

    def __init__(self):
        # A line for each worker, so that no two ever write to the same place.
        self._counts = torch.zeros(MOST_WORKERS, len(REASONS), dtype=torch.int64).share_memory_()

    def count(self, reason: str, number: int = 1) -> None:
        worker = torch.utils.data.get_worker_info()
        self._counts[worker.id % MOST_WORKERS if worker else 0, REASONS.index(reason)] += number

    def total(self, name: str = "stream") -> Tally:
        kept, *dropped = self._counts.sum(0).tolist()
        tally = Tally(name)
        tally.keep(kept)
        for reason, number in zip(REASONS[1:], dropped, strict=True):
            if number:
                tally.drop(reason, count=number)
        return tally


@dataclass(frozen=True)
class _Policy:
    transform: Callable | None
    on_error: str
    tally: StreamTally


class _Lost:
    """Stands for a row that could not be read, so that the order of the others does not depend on it."""


class _Rows(_BaseExamplesIterable):
    """A part of the line of rows.  `cuts`: which part of which part, as (parts, index)."""

    _sleep_on_threads_shutdown = False

    def __init__(self, groups, buffer: int, seed: int, policy: _Policy, salt: tuple = (), cuts: tuple = ()):
        super().__init__()
        self.groups, self.buffer, self.seed, self.policy = groups, buffer, seed, policy
        self.salt, self.cuts = salt, cuts

    features = property(lambda self: ENCODED if self.policy.transform is None else None)
    is_typed = property(lambda self: self.policy.transform is None)

    def shuffle_data_sources(self, generator: np.random.Generator) -> "_Rows":
        if not self.buffer:
            return self
        salt = (*self.salt, int(generator.integers(1 << 62)))
        return _Rows(self.groups, self.buffer, self.seed, self.policy, salt, self.cuts)

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> "_Rows":
        return _Rows(self.groups, self.buffer, self.seed, self.policy, self.salt, (*self.cuts, (num_shards, index)))

    def reshard_data_sources(self) -> "_Rows":
        return self  # it can be cut anywhere as it is

    def _range(self) -> tuple[int, int]:
        start, stop = 0, sum(group.stop - group.start for group in self.groups)
        for parts, index in self.cuts:
            # The first ones get one more, as `datasets` expects: with fewer rows than parts it asks no others.
            length, more = divmod(stop - start, parts)
            start += length * index + min(index, more)
            stop = start + length + (index < more)
        return start, stop

    @property
    def num_shards(self) -> int:
        start, stop = self._range()
        return stop - start

    def _init_state_dict(self) -> dict:
        self._state_dict = {"block": 0, "row": 0, "stream": self._fingerprint(), "type": type(self).__name__}
        return self._state_dict

    def load_state_dict(self, state_dict: dict) -> dict:
        if state_dict.get("stream") != self._fingerprint():
            raise DataError(
                "the saved place belongs to another stream, expected the same files, seed, shuffle_buffer, number of "
                "processes and workers: resume with these, or start the epoch again"
            )
        return super().load_state_dict(state_dict)

    def _fingerprint(self) -> str:
        files = [(Path(group.file).name, group.index, group.start, group.stop) for group in self.groups]
        return hashlib.sha256(
            repr((files, self.buffer, self.seed, self.salt, self.cuts)).encode("utf-8", "surrogatepass")
        ).hexdigest()[:16]

    def _generator(self, *more: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, len(self.salt), *self.salt, *more])

    def _own_groups(self) -> Iterator[Group]:
        order = self._generator().permutation(len(self.groups)) if self.buffer else range(len(self.groups))
        start, stop = self._range()
        at = 0
        for number in order:
            group = self.groups[number]
            length = group.stop - group.start
            first, last = max(start - at, 0), min(stop - at, length)
            if first < last:
                yield replace(group, start=group.start + first, stop=group.start + last)
            at += length

    def _blocks(self) -> Iterator[list[Group]]:
        block, rows = [], 0
        for group in self._own_groups():
            block.append(group)
            rows += group.stop - group.start
            if rows >= self.buffer:
                yield block
                block, rows = [], 0
        if block:
            yield block

    def __iter__(self) -> Iterator[tuple[str, object]]:
        state = self._state_dict or {"block": 0, "row": 0}
        for number, block in enumerate(self._blocks()):
            if number < state["block"]:
                continue
            rows = [row for group in block for row in self._read(group)]
            order = self._generator(1, number).permutation(len(rows)) if self.buffer else range(len(rows))
            for place in order[state["row"] :]:
                (key, record), rows[place] = rows[place], None  # what has been given is freed
                state["row"] += 1
                found = self._finish(key, record)
                if found is not None:
                    yield key, found
            state["block"], state["row"] = state["block"] + 1, 0

    def _read(self, group: Group) -> Iterator[tuple[str, dict | _Lost]]:
        keys = [f"{group.file}:{group.index}:{row}" for row in range(group.start, group.stop)]
        try:
            records = with_patience(read_group, group)
        except UNREADABLE as error:
            found = f"row group {group.index} cannot be read ({' '.join(str(error).split())[:200]})"
            problem = damaged(group.file, found)
            if self.policy.on_error == "stop":
                raise problem from error
            logger.warning("%d records skipped: %s", len(keys), problem)
            records = [_Lost()] * len(keys)
        return zip(keys, records, strict=True)

    def _finish(self, key: str, record: dict | _Lost):
        """What is yielded for a row, None for a row that is skipped."""
        if isinstance(record, _Lost):
            self.policy.tally.count("unreadable row group")
            return None
        try:
            found = record if self.policy.transform is None else self.policy.transform(record)
        except (ValueError, OSError) as error:
            if self.policy.on_error == "stop":
                raise DataError(f"the record {record['id']!r} of {key} cannot be used: {error}") from error
            logger.warning("the record %r of %s is skipped: %s", record["id"], key, error)
            self.policy.tally.count("refused record")
            return None
        self.policy.tally.count("kept")
        return found
