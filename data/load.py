"""Any data a person may have → records: a folder, a JSONL file, our shards, or a `datasets` data set."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..processing_perceptio import MAX_IMAGE_PIXELS
from .jsonl import read_jsonl
from .own import ALIASES, KEYS, RowReader
from .record import COLUMNS, DataError, Problem
from .validate import check_record

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation",
               "dev": "validation", "test": "test"}  # fmt: skip


@dataclass
class Found:
    """One row after reading: the record, unless it has problems."""

    record: dict | None
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


Job = Callable[[], Found]  # the slow part of a row, to be done where one likes


def open_data(
    spec,
    *,
    split: str | None = None,
    columns: dict[str, str] | None = None,
    on_problem: str = "raise",
    allow_download: bool = False,
    max_pixels: int = MAX_IMAGE_PIXELS,
    tally=None,
) -> Iterator[dict]:
    """The records of `spec`.

    spec: a folder (with a JSONL file, in the Hub's folder form, or of our shards), a .jsonl file, a `datasets` data
    set, or the Hub id of one, which needs `allow_download`.
    columns: ours → theirs, for data under other names: {"question": "prompt", "answer": "reply"}.
    on_problem: "raise" stops at the first row that cannot be used, "skip" counts it in `tally` and goes on.
    """
    if on_problem not in ("raise", "skip"):
        raise ValueError(f'`on_problem` is {on_problem!r}, expected "raise" or "skip"')
    for job in row_jobs(spec, split=split, columns=columns, allow_download=allow_download, max_pixels=max_pixels):
        found = job()
        if found.record is not None:
            if tally is not None:
                tally.keep()
            yield found.record
        elif on_problem == "raise":
            raise DataError(found.problems)
        elif tally is not None:
            tally.drop(found.problems[0].field.partition("[")[0], str(found.problems[0]))


def read_own(root, *, tally, split: str | None = None) -> Iterator[dict]:
    """A person's folder as the source of a recipe: what cannot be used is counted."""
    yield from open_data(root, split=split, on_problem="skip", tally=tally)


def row_jobs(
    spec,
    *,
    split: str | None = None,
    columns: dict[str, str] | None = None,
    allow_download: bool = False,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Iterator[Job]:
    """One job per row, in order."""
    _check_columns(columns)
    if not isinstance(spec, (str, Path)):
        yield from _from_dataset(spec, "the data set", split, columns, max_pixels)
        return
    path = Path(spec)
    if path.is_file():
        yield from _from_table(path.parent, path, split, columns, max_pixels)
    elif path.is_dir():
        if (path / "manifest.json").is_file() and (path / "data").is_dir():
            yield from _from_shards(path, split, max_pixels)
            return
        for table in _tables(path, split):
            yield from _from_table(path, table, split, columns, max_pixels)
    elif isinstance(spec, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        yield from _from_dataset(_download(spec, split, allow_download), spec, split, columns, max_pixels)
    else:
        raise DataError(Problem(str(spec), None, "path", "nothing", "a folder, a .jsonl file or a Hub id", "check it"))


def _check_columns(columns) -> None:
    wrong = [name for name in columns or {} if name not in KEYS]
    if wrong:
        raise DataError(
            Problem("columns", None, str(wrong[0]), "an unknown name", ", ".join(KEYS), "name ours first, then theirs")
        )


# Folders


def _tables(folder: Path, split: str | None) -> list[Path]:
    """The files of rows in a folder: those of the split, if any is named for one."""
    found = [path for path in sorted(folder.glob("*.jsonl")) if path.name not in METADATA]
    found = found or [path for place in (folder, *sorted(folder.iterdir())) for path in _metadata(place)]
    if not found:
        names = sorted(entry.name for entry in folder.iterdir())[:8]
        raise DataError(
            Problem(
                str(folder),
                None,
                "folder",
                f"no rows (it holds {', '.join(names) or 'nothing'})",
                "a .jsonl file or metadata.jsonl",
                "write one line for each picture: image, question, answer",
            )  # fmt: skip
        )
    if split is not None and any(_split_of(path) for path in found):
        named = [path for path in found if _split_of(path) == split]
        if not named:
            splits = sorted({_split_of(path) or path.name for path in found})
            raise DataError(Problem(str(folder), None, "split", split, f"one of {', '.join(splits)}", "choose one"))
        return named
    return found


def _metadata(place: Path) -> list[Path]:
    return [place / name for name in METADATA if (place / name).is_file()] if place.is_dir() else []


def _split_of(path: Path) -> str | None:
    """The split that a file's or its folder's name speaks of."""
    for name in (path.stem, path.parent.name):
        if (word := re.split(r"[-_.]", name.lower())[0]) in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return None


def _from_table(root: Path, path: Path, split, columns, max_pixels) -> Iterator[Job]:
    named = _split_of(path)
    base = path.parent if path.name in METADATA else root
    reader = RowReader(base, path.name, columns=columns, split=named or split or "train", max_pixels=max_pixels)
    wanted = None if named else split
    ids: dict[str, int] = {}
    for row, content in _rows(path):
        if isinstance(content, Problem):
            yield lambda problem=content: Found(None, [problem])
        elif wanted is None or content.get("split", wanted) == wanted:
            yield _row_job(reader, row, content, ids)


def _row_job(reader: RowReader, row: int, content: dict, ids: dict[str, int]) -> Job:
    """The id is taken at once, in order; the rest is left to the job."""
    first = ids.setdefault(str(content["id"]), row) if isinstance(content.get("id"), (str, int)) else row

    def job() -> Found:
        record, problems, warnings = reader.read(row, content)
        if first != row:
            problems = [
                *problems,
                Problem(
                    reader.file, row, "id", f"{content['id']!r:.80}, as in row {first}", "one of its own", "rename one"
                ),
            ]
        return Found(None if problems else record, problems, warnings)

    return job


def _rows(path: Path) -> Iterable[tuple[int, dict | Problem]]:
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8-sig") as file:
            for row, content in enumerate(csv.DictReader(file), start=2):
                yield row, {key: value for key, value in content.items() if key is not None and value != ""}
    elif path.suffix == ".parquet":
        import pyarrow.parquet as pq

        row = 0
        for batch in pq.ParquetFile(path).iter_batches(256, use_threads=False):
            for content in batch.to_pylist():
                row += 1
                yield row, content
    elif path.suffix in (".jsonl", ".json", ".ndjson"):
        yield from read_jsonl(path)
    else:
        raise DataError(Problem(str(path), None, "file", path.suffix, ".jsonl, .csv or .parquet", "save it as one"))


def _from_shards(folder: Path, split: str | None, max_pixels: int) -> Iterator[Job]:
    from .shards import read_shards

    for row, record in enumerate(read_shards(folder, split=split)):
        yield lambda row=row, record=record: _checked(record, str(folder), row, max_pixels)


def _checked(record: dict, file: str, row: int, max_pixels: int) -> Found:
    problems = check_record(record, file, row, max_pixels=max_pixels)
    return Found(None if problems else record, problems)


# Data sets


def _download(name: str, split: str | None, allow_download: bool):
    from datasets import DownloadConfig, load_dataset

    try:
        config = None if allow_download else DownloadConfig(local_files_only=True)
        return load_dataset(name, split=split or "train", download_config=config)
    except Exception as error:  # what datasets and the Hub's client raise is nearly anything
        remedy = "check the name" if allow_download else "pass `allow_download=True` (`--download`) to fetch it"
        raise DataError(
            Problem(name, None, "path", f"no folder, and {str(error)[:120]}", "a folder or a data set", remedy)
        ) from error


def _from_dataset(dataset, name: str, split, columns, max_pixels) -> Iterator[Job]:
    from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict, List

    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        if split not in dataset and len(dataset) != 1:
            found = ", ".join(dataset)
            raise DataError(Problem(name, None, "split", repr(split), f"one of {found}", "choose a split"))
        dataset = dataset[split] if split in dataset else next(iter(dataset.values()))
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise DataError(
            Problem(
                name, None, "data", type(dataset).__name__, "a folder, file or `datasets` data set", "load it first"
            )
        )
    for column, kind in (dataset.features or {}).items():
        if isinstance(kind, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        elif isinstance(kind, List) and isinstance(kind.feature, Image):
            dataset = dataset.cast_column(column, List(Image(decode=False)))
    names = list(dataset.features or next(iter(dataset.take(1)), {}))
    if set(names) >= set(COLUMNS) - {"mask_preview"}:
        for row, record in enumerate(dataset):
            full = {**dict.fromkeys(COLUMNS), **record}
            yield lambda row=row, record=full: _checked(record, name, row, max_pixels)
        return
    _check_names(names, columns, name)
    reader = RowReader(None, name, columns=columns or _implied(names), split=split or "train", max_pixels=max_pixels)
    ids: dict[str, int] = {}
    for row, content in enumerate(dataset):
        yield _row_job(reader, row, content, ids)


def _implied(names: list[str]) -> dict[str, str]:
    """A map for data whose columns have our names among others."""
    aliases = {ours: theirs for theirs, ours in ALIASES.items() if theirs in names}
    return aliases | {key: key for key in KEYS if key in names}


def _check_names(names: list[str], columns: dict | None, name: str) -> None:
    import difflib

    for ours, theirs in (columns or {}).items():
        if theirs not in names:
            near = difflib.get_close_matches(theirs, names, 1)
            remedy = f"did you mean {near[0]!r}?" if near else "name one of these"
            raise DataError(Problem(name, None, theirs, f"no such column, for `{ours}`", ", ".join(names), remedy))
    known = columns or _implied(names)
    if "messages" not in known and not {"question", "answer"} <= set(known):
        raise DataError(
            Problem(
                name,
                None,
                "columns",
                ", ".join(names),
                "question and answer, or messages",
                'say which they are: columns={"question": …, "answer": …}',
            )  # fmt: skip
        )
