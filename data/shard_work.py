"""One shard of a job: read, put through a function, written, and noted; once done, never done again."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .label import PROBLEM
from .manifest import check_shard, write_json
from .record import COLUMNS, DataError
from .shards import ShardWriter, read_rows
from .tally import Tally

NOTES = ".job"
MOST_ATTEMPTS = 20  # of one shard in one run: one that kills every worker must not be tried for ever


@dataclass(frozen=True)
class ShardTask:
    """One shard to do.  Paths are text, so that it crosses processes as plain data."""

    source: str
    entry: dict  # of the manifest
    out: str
    job: str  # fingerprint of what is done
    batch_size: int
    threads: int

    @property
    def name(self) -> str:
        return Path(self.entry["file"]).name

    @property
    def note(self) -> Path:
        return Path(self.out) / NOTES / f"{self.name}.json"

    @property
    def target(self) -> Path:
        return Path(self.out) / "data" / self.name


def do_shard(task: ShardTask, function: Callable[[dict], dict]) -> str | None:
    """Do one shard, unless it is done.  Returns what went wrong with it, as one line."""
    if read_note(task) is not None:
        return None
    tried, count = attempts(task), count_attempts(task)
    if count >= MOST_ATTEMPTS:
        return (
            f"{task.entry['file']}: {count} workers died of it, expected none: look at its rows, or give more memory"
        )
    tried.write_text(str(count + 1))
    before = torch.get_num_threads()
    torch.set_num_threads(task.threads)
    try:
        _do_rows(task, function)
    except (DataError, OSError) as error:
        return f"{task.entry['file']}: {' '.join(str(error).split())}"
    finally:
        torch.set_num_threads(before)
    tried.unlink(missing_ok=True)
    return None


def _do_rows(task: ShardTask, function: Callable[[dict], dict]) -> None:
    source = Path(task.source)
    if problem := check_shard(source, task.entry, verify=True):
        raise DataError(problem)
    tally, writer = Tally(task.name), ShardWriter(task.target)
    try:
        for batch in _batches(source / task.entry["file"], task.batch_size):
            done = function(batch)
            if len(done[PROBLEM]) != len(batch["id"]) or done["id"] != batch["id"]:
                raise RuntimeError(
                    f"the function gave {len(done[PROBLEM])} rows for {len(batch['id'])} of {task.entry['file']}, "
                    "expected the same rows in the same order: mark those to drop in `problem`"
                )
            for index, problem in enumerate(done[PROBLEM]):
                record = {name: done[name][index] for name in COLUMNS}
                if problem is None:
                    writer.write(record)
                    tally.keep()
                else:
                    reason, _, details = problem.partition(": ")
                    tally.drop(reason, f"{record['id']}: {details}")
        tally.check(task.entry["rows"])
        writer.close()
        writer.publish()
    finally:
        writer.discard()
    note = {"job": task.job, "source": task.entry, "total": writer.total(), "tally": tally.to_dict()}
    write_json(task.note, note)


def _batches(path: Path, size: int) -> Iterator[dict[str, list]]:
    rows: list[dict] = []
    for row in read_rows(path):
        rows.append(row)
        if len(rows) == size:
            yield {name: [row[name] for row in rows] for name in COLUMNS}
            rows = []
    if rows:
        yield {name: [row[name] for row in rows] for name in COLUMNS}


def read_note(task: ShardTask) -> dict | None:
    """The note of a shard that is done: by this job, from this very input, and still there."""
    try:
        note = json.loads(task.note.read_bytes())
        same = note["job"] == task.job and note["source"] == task.entry
        entry = note["total"]["shards"][0]
        return note if same and not check_shard(Path(task.out), entry) else None
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def attempts(task: ShardTask) -> Path:
    return task.note.with_suffix(".attempts")


def count_attempts(task: ShardTask) -> int:
    """How often this shard was begun and not ended."""
    tried = attempts(task)
    return int(tried.read_text() or 0) if tried.is_file() else 0
