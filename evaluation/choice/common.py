"""What the benchmarks of multiple choice share: reading, judging, and means over categories.

Data is read twice: everything but the pictures first, so that all that is wrong is told in one error before the model
is asked anything; then the pictures, one after another.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyarrow
import pyarrow.parquet as pq

from ...data.paths import PathError, locate
from ...data.record import DataError, Problem
from ..benchmark import Benchmark, Figure, Item, Judgement, Prediction
from ..metrics import parse_letter, wilson

T = TypeVar("T")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIRECTLY = "Answer with the option's letter from the given choices directly."


class Place(NamedTuple):
    """Of a row: the file, and its number in it."""

    file: Path
    row: int | None


class Wrong(ValueError):
    """One field that cannot be used: Wrong(field, found, expected, remedy)."""


class Choice(Benchmark):
    """One letter is right.  `truth` holds the options by their letters, the right letter, and in `about` what the
    figures are sorted by."""

    perception = "seg+depth"  # of a question with one picture, as a chat is answered by default
    answer_tokens = 32

    def ask(self, id: str, question: str, pictures, options: Mapping[str, str], letter: str, *, group=None, **about):
        """The item of one question.  options: letter → its words, which may be empty."""
        truth = {
            "options": dict(options),
            "letter": letter,
            "answer": f"({letter}) {options[letter]}".strip(),
            "about": about,
        }
        perception = self.perception if len(pictures) == 1 else "none"
        return Item(id, question, tuple(pictures), perception, truth, group=group)

    def judge(self, item: Item, prediction: Prediction) -> Judgement:
        options = item.truth["options"]
        found = parse_letter(prediction.answer, "".join(options), options)
        invalid = prediction.error or (None if found else "no letter that can be read")
        right = invalid is None and found == item.truth["letter"]
        return Judgement(item.id, {"right": right, **item.truth["about"]}, invalid, float(right))


def options_of(words: Iterable[str]) -> dict[str, str]:
    """Letter → words, in alphabetical order."""
    return dict(zip(LETTERS, words, strict=False))


def listed(options: Mapping[str, str]) -> str:
    """ "A. red" and so on, a line each."""
    return "\n".join(f"{letter}. {words}" for letter, words in options.items())


def macro(name: str, judgements: list[Judgement], key: str, by: str) -> Figure:
    """Mean over the categories of the mean within each, in percent, with Wilson's interval for as many independent
    items as would vary as much.  The values lie between 0 and 1.

    That categories differ counts as variation too, which makes the interval rather too wide than too narrow.
    """
    counts = Counter(row.values[by] for row in judgements)
    groups = [("item", row.id) if row.group is None else ("group", row.group) for row in judgements]
    weights = [1 / counts[row.values[by]] for row in judgements]
    numbers = wilson([row.values[key] for row in judgements], groups, weights)
    value, low, high = (None if number is None else 100 * number for number in numbers)
    return Figure(name, value, len(judgements), low, high, sum(row.invalid is not None for row in judgements))


def sorted_by(judgements: list[Judgement], key: str) -> dict[str, list[Judgement]]:
    """The judgements of each category, in alphabetical order."""
    parts: dict[str, list[Judgement]] = {}
    for row in judgements:
        parts.setdefault(row.values[key], []).append(row)
    return dict(sorted(parts.items()))


# Reading


def read_all(rows: Iterable[tuple[Place, dict]], parse: Callable[[dict], T | None]) -> dict[Place, T]:
    """What `parse` makes of each row; None leaves it out.  All that is `Wrong` becomes one error."""
    found, problems = {}, []
    for place, row in rows:
        try:
            parsed = parse(row)
        except Wrong as wrong:
            problems.append(Problem(str(place.file), place.row, *wrong.args))
            continue
        if parsed is not None:
            found[place] = parsed
    if problems:
        raise DataError(problems)
    return found


def once(seen: set, field: str, value):
    """`value`, which must not have been seen yet."""
    if value in seen:
        raise Wrong(field, f"{value!r} a second time", "each once", "remove one of the rows")
    seen.add(value)
    return value


def text_of(row: Mapping, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise Wrong(field, f"{value!r:.80}", "some text", "take the published file")
    return value.strip()


def letter_of(row: Mapping, field: str, letters: Iterable[str]) -> str:
    """The right answer, as "B" or "(B)"."""
    value, letters = row.get(field), "".join(letters)
    found = parse_letter(value, letters) if isinstance(value, str) else None
    if found is None:
        expected = f"one of {', '.join(letters)}"
        raise Wrong(field, f"{value!r:.80}", expected, "take a split whose answers are published")
    return found


def picture_in(root: Path, names: Iterable[str], field: str) -> Path:
    """The first of the names that is a file below `root`."""
    errors = []
    for name in names:
        try:
            return locate(root, name)
        except PathError as error:
            errors.append(error)
    raise Wrong(field, errors[0].found, errors[0].expected, errors[0].remedy) from errors[0]


def cell_bytes(cell) -> bytes | None:
    """The bytes of a picture as the Hub's tables hold it."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    return data if isinstance(data, bytes) and data else None


def demand_bytes(place: Place, field: str, cell) -> bytes:
    data = cell_bytes(cell)
    if data is None:
        raise DataError(
            Problem(str(place.file), place.row, field, "no bytes", "an encoded picture", "fetch the file again")
        )
    return data


def read_jsonl(path: Path) -> list[tuple[Place, dict]]:
    rows, problems = [], []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError:
            content = None
        if isinstance(content, dict):
            rows.append((Place(path, number), content))
        else:
            problems.append(Problem(str(path), number, "line", f"{line!r:.60}", "a JSON object", "fetch it again"))
    if problems:
        raise DataError(problems)
    return rows


def read_json(path: Path):
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise _unreadable(path, error, "JSON") from error


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, "text in UTF-8") from error


def _unreadable(path: Path, error: Exception, expected: str) -> DataError:
    found = f"not readable ({' '.join(str(error).split()):.160})"
    return DataError(Problem(str(path), None, "file", found, expected, "fetch it again"))


# Parquet


def parquet_files(data: Path, split: str, columns: Iterable[str]) -> list[Path]:
    """The files of a split, which are named after it, with all of the columns."""
    paths = [path for path in sorted(data.rglob("*.parquet")) if _split_of(path) == split]
    problems = []
    for path in paths:
        names = _columns(path)
        if missing := [name for name in columns if name not in names]:
            problems.append(
                Problem(str(path), None, "columns", ", ".join(names), f"also {', '.join(missing)}", "fetch it again")
            )
    if problems:
        raise DataError(problems)
    return paths


def no_files(data: Path, expected: str) -> DataError:
    """The error of a folder in which nothing published was found."""
    found = sorted({path.name for path in data.iterdir()})
    names = ", ".join(found[:8]) + (" …" if len(found) > 8 else "") if found else "nothing"
    return DataError(Problem(str(data), None, "files", names, expected, "name the folder that has them"))


def table_rows(
    paths: Iterable[Path], leave_out: tuple[str, ...] = (), only: tuple[str, ...] = ()
) -> Iterator[tuple[Place, dict]]:
    """The rows, counted from 0 in each file."""
    for path in paths:
        names = [name for name in _columns(path) if name not in leave_out and (not only or name in only)]
        number = 0
        try:
            with pq.ParquetFile(path) as table:
                for batch in table.iter_batches(batch_size=16, columns=names, use_threads=False):
                    for row in batch.to_pylist():
                        yield Place(path, number), row
                        number += 1
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise _unreadable(path, error, "Parquet") from error


def with_pictures(found: Mapping[Place, T], columns: tuple[str, ...]) -> Iterator[tuple[Place, T, dict]]:
    """(place, what was read, its columns with pictures), in the order of the files."""
    for place, row in table_rows(dict.fromkeys(place.file for place in found), only=columns):
        if place in found:
            yield place, found[place], row


def _columns(path: Path) -> list[str]:
    try:
        return pq.read_schema(path).names
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise _unreadable(path, error, "Parquet") from error


def _split_of(path: Path) -> str:
    return re.split(r"[-.]", path.name)[0]
