"""The row groups of shards, in folders, on the Hub or behind any URL that fsspec opens: found and read one by one."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from .manifest import MANIFEST, check_codebook, parse_manifest, shard_entries
from .record import COLUMNS, DataError, Problem

ATTEMPTS, PAUSE = 3, 0.2  # of reading, and seconds before the second; they double
UNREADABLE = (pa.ArrowException, OSError, ValueError)


@dataclass(frozen=True)
class Group:
    """Rows `start` to `stop` of one row group of one file."""

    file: str
    index: int
    start: int
    stop: int


def with_patience(read: Callable, *arguments):
    """What `read` returns; a source that fails for a moment is asked again."""
    for attempt in range(ATTEMPTS):
        try:
            return read(*arguments)
        except OSError:
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(PAUSE * 2**attempt)


def read_group(group: Group) -> list[dict]:
    with open_parquet(group.file) as parquet:
        return read_table(parquet, group.index).slice(group.start, group.stop - group.start).to_pylist()


@contextmanager
def open_parquet(name) -> Iterator[pq.ParquetFile]:
    """A local path goes to Arrow as a path: its threads, and a Python file, have ended interpreters in an abort."""
    with ExitStack() as stack:
        source = stack.enter_context(fsspec.open(name, "rb")) if "://" in str(name) else str(name)
        yield stack.enter_context(pq.ParquetFile(source, page_checksum_verification=True))


def read_table(parquet: pq.ParquetFile, group: int) -> pa.Table:
    # Without threads, for the same reason; stored pictures need no decompression that would pay for them.
    return parquet.read_row_group(group, columns=list(COLUMNS), use_threads=False)


def find_groups(folders: list[str], split: str, codebook: str | None) -> Iterator[Group]:
    """The row groups of a split, from the footers of its files."""
    for folder in folders:
        found, files = with_patience(_find_files, folder, split, codebook)
        codebook = codebook or found
        for name, rows in files:
            try:
                counts = with_patience(_row_counts, name)
            except UNREADABLE as error:
                raise damaged(name, f"its footer cannot be read ({' '.join(str(error).split())[:200]})") from error
            if rows is not None and sum(counts) != rows:
                raise damaged(name, f"{sum(counts)} rows instead of the manifest's {rows}")
            yield from (Group(name, index, 0, count) for index, count in enumerate(counts) if count)


def damaged(name: str, found: str) -> DataError:
    return DataError(Problem(name, None, "file", found, "a whole shard", "fetch or write it again"))


def _row_counts(name: str) -> list[int]:
    with open_parquet(name) as parquet:
        missing = set(COLUMNS) - set(parquet.schema_arrow.names)
        if missing:
            raise ValueError(f"it has no column {min(missing)!r}")
        return [parquet.metadata.row_group(index).num_rows for index in range(parquet.metadata.num_row_groups)]


def _find_files(folder: str, split: str, codebook: str | None) -> tuple[str | None, list[tuple[str, int | None]]]:
    """The codebook, and (file, rows) of a split as the manifest says; without one, the files called like the split."""
    if "://" not in folder and not Path(folder).exists() and folder.count("/") == 1:
        folder = f"hf://datasets/{folder}"
    system, root = fsspec.core.url_to_fs(folder)
    full = system.unstrip_protocol if "://" in folder else str
    if system.exists(f"{root}/{MANIFEST}"):
        manifest = parse_manifest(system.cat_file(f"{root}/{MANIFEST}"), f"{folder}/{MANIFEST}")
        check_codebook(folder, manifest, codebook)
        files = [(full(f"{root}/{entry['file']}"), entry["rows"]) for entry in shard_entries(folder, manifest, split)]
        return manifest["codebook"], files
    inside = system.ls(f"{root}/data", detail=False) if system.exists(f"{root}/data") else []
    names = sorted(name for name in inside if fnmatch(name.rpartition("/")[2], f"{split}-*.parquet"))
    if not names:
        raise DataError(f"{folder} holds no data/{split}-*.parquet, expected a folder of shards: check name and split")
    return None, [(full(name), None) for name in names]
