"""MMBench, of which every question is asked once for each of its options, with the options rotated.

Read are the official table (MMBench_DEV_EN.tsv: pictures in base64) and those of the Hub (lmms-lab/MMBench:
en/dev-*.parquet), both with index, question, hint, A … E, answer, image, category and l2-category.  From 1,000,000 on
an index is one of the published rotations of a question: these rows are left out and made anew, so that the passes of
one question follow one another.  In the official table a short `image` is the index of the row that has the picture.
"""

import base64
import binascii
import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ...data.record import DataError, Problem
from ...data.tally import Tally
from ..benchmark import Figure, Item, Judgement, share
from .common import (
    DIRECTLY,
    Choice,
    Place,
    Wrong,
    demand_bytes,
    letter_of,
    listed,
    no_files,
    once,
    options_of,
    parquet_files,
    read_all,
    sorted_by,
    table_rows,
    text_of,
    with_pictures,
)

DEV = "dev"
ROTATIONS = 1_000_000
COLUMNS = ("index", "question", "A", "B", "answer", "category", "image")
ABSENT = ("", "nan")  # as a table writes what is not there
REFERENCE = 64  # characters: a longer `image` is a picture


@dataclass(frozen=True)
class Question:
    index: int
    text: str
    options: dict[str, str]
    letter: str
    category: str
    ability: str | None


class MMBench(Choice):
    """Figures: circular accuracy, for which a question counts as right when every rotation of it is; vanilla accuracy,
    with the options as published; circular accuracy by ability and by category.

    A question of which `--limit` left passes out has no circular value.  The answers of "test" are not published.
    """

    name = "mmbench"
    splits = (DEV,)

    def items(self, data: Path, split: str, tally: Tally) -> Iterator[Item]:
        for question, picture in _questions(data, tally):
            tally.keep()
            words = list(question.options.values())
            right = list(question.options).index(question.letter)
            for shift in range(len(words)):
                options = options_of(words[shift:] + words[:shift])
                yield self.ask(
                    f"{question.index}/{shift}",
                    f"{question.text}\n{listed(options)}\n{DIRECTLY}",
                    [picture],
                    options,
                    list(options)[(right - shift) % len(words)],
                    group=str(question.index),
                    index=question.index,
                    shift=shift,
                    passes=len(words),
                    category=question.category,
                    ability=question.ability,
                )

    def figures(self, judgements: list[Judgement]) -> list[Figure]:
        whole = circular(judgements)
        first = [row for row in judgements if row.values["shift"] == 0]
        found = [share("circular accuracy", whole, "right"), share("vanilla accuracy", first, "right")]
        for key in ("ability", "category"):
            parts = sorted_by([row for row in whole if row.values[key]], key)
            found += [share(f"circular, {name}", rows, "right") for name, rows in parts.items()]
        return found


def circular(judgements: list[Judgement]) -> list[Judgement]:
    """One for each question of which all passes were judged: right where all are, invalid where one is."""
    parts: dict[int, list[Judgement]] = {}
    for row in judgements:
        parts.setdefault(row.values["index"], []).append(row)
    return [
        replace(
            rows[0],
            values={**rows[0].values, "right": all(row.values["right"] for row in rows)},
            invalid=next((row.invalid for row in rows if row.invalid), None),
        )
        for rows in parts.values()
        if len(rows) == rows[0].values["passes"]
    ]


def _questions(data: Path, tally: Tally) -> Iterator[tuple[Question, bytes]]:
    tables = [path for path in sorted(data.rglob("*.tsv")) if DEV in path.stem.lower().split("_")]
    parquet = parquet_files(data, DEV, COLUMNS)
    sets = [str(path) for path in tables] + sorted({str(path.parent) for path in parquet})
    if not sets:
        raise no_files(data, "a table as MMBench_DEV_EN.tsv, or dev-*.parquet")
    if len(sets) > 1:
        found = ", ".join(sets)
        raise DataError(Problem(str(data), None, "files", found, "one data set", "name the folder of one alone"))
    reader = _Reader()
    if tables:
        yield from _resolved(read_all(_table(tables[0]), lambda row: _with_picture(row, reader)))
    else:
        found = read_all(table_rows(parquet, leave_out=("image",)), reader.read)
        for place, question, row in with_pictures(found, ("image",)):
            yield question, demand_bytes(place, "image", row["image"])
    if reader.left_out:
        tally.drop("published rotation, made anew", count=reader.left_out)


class _Reader:
    """The question of each row; None for the published rotations."""

    def __init__(self):
        self.seen: set[int] = set()
        self.left_out = 0

    def read(self, row: dict) -> Question | None:
        try:
            index = int(row["index"])
        except (TypeError, ValueError):
            raise Wrong("index", f"{row['index']!r:.80}", "a whole number", "take the published file") from None
        once(self.seen, "index", index)
        if index >= ROTATIONS:
            self.left_out += 1
            return None
        hint = row.get("hint")
        text = text_of(row, "question")
        options = _options(row)
        return Question(
            index,
            text if _absent(hint) else f"{hint.strip()}\n{text}",
            options,
            letter_of(row, "answer", options),
            text_of(row, "category"),
            row.get("l2-category") or row.get("L2-category"),
        )


def _options(row: dict) -> dict[str, str]:
    there = [letter for letter in "ABCDE" if not _absent(row.get(letter))]
    if len(there) < 2 or "".join(there) != "ABCDE"[: len(there)]:
        raise Wrong(
            "A … E", ", ".join(there) or "none", "two or more, from A without a gap", "take the published file"
        )
    return {letter: str(row[letter]).strip() for letter in there}


def _absent(value) -> bool:
    return value is None or str(value).strip() in ABSENT


# The official table


def _table(path: Path) -> Iterator[tuple[Place, dict]]:
    csv.field_size_limit(1 << 30)  # a picture in base64 is one field
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t")
            if missing := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
                found, expected = ", ".join(rows.fieldnames or ()), f"also {', '.join(missing)}"
                raise DataError(Problem(str(path), None, "columns", f"{found:.200}", expected, "fetch it again"))
            for number, row in enumerate(rows):
                yield Place(path, number), row
    except (UnicodeDecodeError, csv.Error) as error:
        found = f"not readable ({error!s:.160})"
        raise DataError(Problem(str(path), None, "file", found, "a table in UTF-8", "fetch it again")) from error


def _with_picture(row: dict, reader: _Reader) -> tuple[Question, bytes | int] | None:
    """(question, the picture or the index of the row that has it)."""
    question = reader.read(row)
    if question is None:
        return None
    image = text_of(row, "image")
    if len(image) <= REFERENCE and image.isdecimal():
        return question, int(image)
    try:
        return question, base64.b64decode(image, validate=True)
    except binascii.Error:
        raise Wrong("image", f"{image[:20]!r} …", "a picture in base64", "fetch the file again") from None


def _resolved(found: dict[Place, tuple[Question, bytes | int]]) -> Iterator[tuple[Question, bytes]]:
    pictures = {question.index: image for question, image in found.values() if isinstance(image, bytes)}
    problems = [
        Problem(str(place.file), place.row, "image", f"{image}", "the index of a picture", "fetch the file again")
        for place, (_, image) in found.items()
        if not isinstance(image, bytes) and image not in pictures
    ]
    if problems:
        raise DataError(problems)
    for question, image in found.values():
        yield question, image if isinstance(image, bytes) else pictures[image]
