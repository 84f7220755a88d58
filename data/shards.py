"""Records as Parquet shards: what `datasets` loads, the Hub's viewer shows and a job works through.

    folder/data/train-00000-of-00012.parquet …   the rows, with the schema inside
    folder/manifest.json                         every shard with its size and SHA-256, and what the rows hold

The manifest is written last: a shard that it does not list does not count. The same records give the same bytes.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .manifest import (
    MANIFEST,
    check_codebook,
    check_shard,
    join_manifest,
    join_summaries,
    read_manifest,
    sha256,
    shard_entries,
    write_manifest,
)
from .record import COLUMNS, FEATURES, DataError, Problem
from .row_groups import open_parquet, read_table
from .tally import Tally
from .thumbnail import mask_preview

ROWS_PER_GROUP, BYTES_PER_GROUP = 64, 16 << 20  # what a reader has to take at once
BYTES_PER_SHARD = 256 << 20
SPLIT = re.compile(r"\w+")  # a hyphen would end it in the name of a file
SCHEMA = FEATURES.arrow_schema
PICTURES = ("image", "depth", "mask_preview")  # compressed already
TEXTS = ("depth_codebook", "source", "licence", "split")  # few values, many rows


def _leaves(path: str, kind: pa.DataType) -> list[str]:
    """The columns of Parquet under one of ours."""
    if pa.types.is_struct(kind):
        return [leaf for field in kind for leaf in _leaves(f"{path}.{field.name}", field.type)]
    return _leaves(f"{path}.list.element", kind.value_type) if pa.types.is_list(kind) else [path]


PARQUET = {
    "compression": {
        leaf: "none" if field.name in PICTURES else "zstd"
        for field in SCHEMA
        for leaf in _leaves(field.name, field.type)
    },
    "use_dictionary": list(TEXTS),
    "write_page_index": True,
    "write_page_checksum": True,  # a flipped bit in a picture is found by whoever reads it
    "use_content_defined_chunking": True,  # the Hub stores a column that did not change once
}


def write_shards(
    records: Iterable[dict],
    out_dir,
    *,
    split: str = "train",
    rows_per_shard: int | None = None,
    bytes_per_shard: int = BYTES_PER_SHARD,
    rows_per_group: int = ROWS_PER_GROUP,
    codebook: str | None = None,
    tally: Tally | dict | None = None,
    overwrite: bool = False,
) -> dict:
    """Write the records of one split and return the manifest of the folder, with the splits it had before.

    A shard ends with the row that reaches `rows_per_shard` or `bytes_per_shard`. codebook: the hash that depth codes
    must have; without it, that of the first codes. tally: how the records came to be, kept in the manifest.
    """
    if not SPLIT.fullmatch(split):
        raise DataError(f"the split is called {split!r}, expected letters, digits and _ alone: rename it")
    folder = Path(out_dir)
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else join_manifest({})
    if split in manifest["splits"] and not overwrite:
        raise DataError(
            f"{folder} already has {manifest['splits'][split]['rows']} rows of the split {split!r}, expected a new "
            "one: choose another folder, or pass `overwrite=True`"
        )
    others = {name: entry for name, entry in manifest["splits"].items() if name != split}
    codebook = codebook or (manifest["codebook"] if others else None)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    written: list[ShardWriter] = []
    try:
        for row, record in enumerate(records):
            if record.get("split") != split:
                raise DataError(
                    Problem(str(folder), row, "split", repr(record.get("split")), repr(split), "write it as its own")
                )
            if not written or written[-1].closed:
                name = f"{split}-{len(written):05d}.parquet"
                written.append(ShardWriter(folder / "data" / name, rows_per_group, codebook))
            shard = written[-1]
            shard.write(record)
            codebook = shard.summary["codebook"]
            if shard.summary["rows"] == rows_per_shard or shard.bytes >= bytes_per_shard:
                shard.close()
        if not written:
            written.append(ShardWriter(folder / "data" / f"{split}-00000.parquet", rows_per_group, codebook))
        written[-1].close()
        if split in manifest["splits"]:  # from here on the old rows are gone, and the manifest says so first
            write_manifest(folder, join_manifest(others))
        for path in (folder / "data").glob(f"{split}-*-of-*.parquet"):
            path.unlink()
        for index, shard in enumerate(written):
            shard.publish(f"{split}-{index:05d}-of-{len(written):05d}.parquet")
    finally:
        for shard in written:
            shard.discard()
    return write_manifest(
        folder, join_manifest({**others, split: join_summaries([shard.total() for shard in written], tally, split)})
    )


class ShardWriter:
    """One Parquet file, written under a hidden name until `publish` gives it its own."""

    def __init__(self, path: Path, rows_per_group: int = ROWS_PER_GROUP, codebook: str | None = None):
        self.path, self.rows_per_group = path, rows_per_group
        self.half = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
        self.summary = {"rows": 0, "pictures": 0, "masks": 0, "depth": 0, "depth_codes": 0, "codebook": codebook}
        self.summary |= {"sources": {}, "perception": Counter()}
        self.entry, self.closed, self.bytes = {}, False, 0
        self._rows, self._waiting = [], 0
        self._file = pq.ParquetWriter(self.half, SCHEMA, **PARQUET)

    def write(self, record: dict) -> None:
        """Add a record; a record with masks and no preview gets one, so set it None where masks are changed."""
        row = {column: record.get(column) for column in COLUMNS}
        self._count(row, set(record) - set(COLUMNS))
        if row["mask_preview"] is None:
            row["mask_preview"] = mask_preview(row)
        self._rows.append(row)
        size = sum(len((row[name] or {}).get("bytes") or b"") for name in PICTURES)
        size += sum(len(mask["counts"]) for mask in row["masks"]) + sum(len(m["content"]) for m in row["messages"])
        self.bytes, self._waiting = self.bytes + size, self._waiting + size
        if len(self._rows) == self.rows_per_group or self._waiting >= BYTES_PER_GROUP:
            self._flush()

    def _count(self, row: dict, strange: set[str]) -> None:
        place = self.path.name, self.summary["rows"]
        if strange:
            raise DataError(
                Problem(*place, "record", f"the key {min(strange)!r}", ", ".join(COLUMNS), "use `make_record`")
            )
        found, expected = row["depth_codebook"], self.summary["codebook"]
        if row["depth_codes"] is not None and found != (expected or found or ""):
            remedy = f"label {row['id']!r} and the others with one depth tokenizer"
            raise DataError(
                Problem(*place, "depth_codebook", repr(found), expected or "the hash of the codebook", remedy)
            )
        summary = self.summary
        summary["rows"] += 1
        summary["pictures"] += row["image"] is not None
        summary["masks"] += len(row["masks"])
        summary["depth"] += row["depth"] is not None
        if row["depth_codes"] is not None:
            summary["depth_codes"] += 1
            summary["codebook"] = found
        summary["sources"].setdefault(row["source"], Counter())[row["licence"]] += 1
        summary["perception"].update(m["perception"] for m in row["messages"] if m["role"] == "assistant")

    def _flush(self) -> None:
        try:
            table = pa.Table.from_pylist(self._rows, SCHEMA)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, TypeError, ValueError):
            for row in self._rows:  # whose fault was it?
                _convert(row, self.path.name)
            raise
        self._file.write_table(table, row_group_size=len(self._rows))
        self._rows, self._waiting = [], 0

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._file.close()
        self.closed = True
        with open(self.half, "rb") as file:
            os.fsync(file.fileno())

    def publish(self, name: str | None = None) -> dict:
        """Give the file its name; returns its entry for the manifest."""
        path = self.path.with_name(name or self.path.name)
        self.entry = {
            "file": f"data/{path.name}",
            "rows": self.summary["rows"],
            "bytes": self.half.stat().st_size,
            "sha256": sha256(self.half),
        }
        os.replace(self.half, path)
        return self.entry

    def total(self) -> dict:
        """What the published file adds to its split."""
        return {**self.summary, "shards": [self.entry]}

    def discard(self) -> None:
        """Remove what has not been published."""
        if not self.closed:
            self._file.close()
        self.half.unlink(missing_ok=True)


def _convert(row: dict, file: str) -> None:
    for column, value in row.items():
        try:
            pa.array([value], SCHEMA.field(column).type)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, TypeError, ValueError) as error:
            raise DataError(
                Problem(file, None, column, f"{error} in {row['id']!r}", str(FEATURES[column]), "use `make_record`")
            ) from error


def read_shards(
    folder, split: str | None = None, *, verify: bool = False, codebook: str | None = None
) -> Iterator[dict]:
    """The records of a folder, one row group in memory at a time; of all splits unless one is named.

    verify: compare each shard with its checksum before it is read. codebook: the hash that the codes must have.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_codebook(folder, manifest, codebook)
    for entry in shard_entries(folder, manifest, split):
        if problem := check_shard(folder, entry, verify):
            raise DataError(problem)
        yield from read_rows(folder / entry["file"])


def read_rows(path) -> Iterator[dict]:
    """The records of one Parquet file; an error names the file."""
    try:
        with open_parquet(path) as file:
            for group in range(file.num_row_groups):
                yield from read_table(file, group).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(damaged(path, error)) from error


def damaged(path, error) -> Problem:
    found = f"damaged ({' '.join(str(error).split())[:200]})"
    return Problem(str(path), None, "file", found, "a whole Parquet file", "fetch or write the shard again")


def remove_leftovers(folder: Path) -> None:
    for path in (folder / "data").glob(".*.incomplete"):
        path.unlink(missing_ok=True)
