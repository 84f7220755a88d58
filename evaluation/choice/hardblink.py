"""HardBLINK: which of 3, 4 or 5 points in a photo is the closest; asked in the published words.

    questions/blink_3pointscenter_questions.jsonl   question_id, image, text
    answers/blink_3pointscenter_answers.jsonl       question_id, text: "(B)"
    images/blink3pointscenter/7.png                 the points are drawn in it

and the same with 4 and 5, on the photos of BLINK's relative depth.  `.hardblink_build` makes such a folder anew.
"""

from collections.abc import Iterator
from pathlib import Path

from ...data.record import DataError, Problem
from ...data.tally import Tally
from ..benchmark import Figure, Item, Judgement, share
from .common import (
    LETTERS,
    Choice,
    Place,
    Wrong,
    letter_of,
    macro,
    no_files,
    options_of,
    picture_in,
    read_all,
    read_jsonl,
    sorted_by,
    text_of,
)

ALL, LEVELS = "all", (3, 4, 5)


class HardBLINK(Choice):
    """Figures: accuracy with each number of points, and the mean of these.  Questions on one photo are a group."""

    name = "hardblink"
    splits = (ALL, *map(str, LEVELS))

    def items(self, data: Path, split: str, tally: Tally) -> Iterator[Item]:
        levels = LEVELS if split == ALL else (int(split),)
        paths = [path for level in levels for path in files_of(data, level)[:2]]
        if not any(path.is_file() for path in paths):
            raise no_files(data, "the folders questions, answers and images")
        if missing := [path for path in paths if not path.is_file()]:
            remedy = "fetch it, or name a `--split` that is there"
            raise DataError([Problem(str(path), None, "file", "missing", "a file", remedy) for path in missing])
        rows = [row for level in levels for row in _rows(data, level)]
        for level, key, question, letter, picture in read_all(rows, lambda row: _read(data, row)).values():
            tally.keep()
            options = options_of([""] * level)
            yield self.ask(
                f"{level}/{key}", question, [picture.read_bytes()], options, letter, group=key, points=level
            )

    def figures(self, judgements: list[Judgement]) -> list[Figure]:
        found = [share(f"{level} points", rows, "right") for level, rows in sorted_by(judgements, "points").items()]
        if len(found) > 1:
            found.append(macro("mean", judgements, "right", "points"))
        return found


def files_of(data: Path, level: int) -> tuple[Path, Path, Path]:
    """The questions, the answers, and the folder of the pictures with so many points."""
    stem = f"blink_{level}pointscenter"
    return (
        data / "questions" / f"{stem}_questions.jsonl",
        data / "answers" / f"{stem}_answers.jsonl",
        data / "images" / f"blink{level}pointscenter",
    )


def _rows(data: Path, level: int) -> Iterator[tuple[Place, dict]]:
    """Every question with its answer, then every answer that none of them has."""
    questions, answers, _ = files_of(data, level)
    left = read_jsonl(answers)
    by_id = {_key(row): row for _, row in left}
    for place, row in read_jsonl(questions):
        answer = by_id.pop(_key(row), None)
        left = [(at, other) for at, other in left if other is not answer]
        yield place, {"level": level, "question": row, "answer": answer}
    for place, row in left:
        yield place, {"level": level, "question": None, "answer": row}


def _key(row: dict) -> str:
    return str(row.get("question_id"))


def _read(data: Path, row: dict) -> tuple[int, str, str, str, Path]:
    """(level, id, question, letter, path of the picture)."""
    level, question, answer = row["level"], row["question"], row["answer"]
    if question is None:
        raise Wrong("question_id", f"answer {_key(answer)}", "one to each question", "remove the line")
    key = _key(question)
    if answer is None:
        expected = f"one answer to each question in {files_of(data, level)[1]}"
        raise Wrong("question_id", f"question {key}", expected, "fetch both files again")
    letter = letter_of(answer, "text", LETTERS[:level])
    picture = picture_in(files_of(data, level)[2], [text_of(question, "image")], "image")
    return level, key, text_of(question, "text"), letter, picture
