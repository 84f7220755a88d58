"""SEED-Bench, its questions about pictures (dimensions 1 to 9); those about videos are left out and counted.

Read are the Hub's tables (lmms-lab/SEED-Bench: test-*.parquet) and the official SEED-Bench.json with the pictures in
SEED-Bench-image/ beside it.  Both have question_id, question, choice_a … choice_d, answer, data_id, data_type and
question_type_id.
"""

from collections.abc import Iterator
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
    picture_in,
    read_all,
    read_json,
    sorted_by,
    table_rows,
    text_of,
    with_pictures,
)

DIMENSIONS = {
    1: "Scene Understanding",
    2: "Instance Identity",
    3: "Instance Attributes",
    4: "Instance Location",
    5: "Instances Counting",
    6: "Spatial Relation",
    7: "Instance Interaction",
    8: "Visual Reasoning",
    9: "Text Understanding",
}
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
COLUMNS = ("question_id", "question", *CHOICES, "answer", "data_id", "data_type", "question_type_id", "image")
JSON, IMAGES = "SEED-Bench.json", "SEED-Bench-image"
ENDINGS = ("", ".jpg", ".png", ".jpeg")


class SEEDBench(Choice):
    """Figures: accuracy over all questions, and in each dimension.  Questions on one picture are a group."""

    name = "seed-bench"
    splits = ("image",)

    def items(self, data: Path, split: str, tally: Tally) -> Iterator[Item]:
        for (key, question, options, letter, picture_id, dimension), picture in _questions(data, tally):
            tally.keep()
            text = f"{question}\n{listed(options)}\n{DIRECTLY}"
            yield self.ask(key, text, [picture], options, letter, group=picture_id, dimension=dimension)

    def figures(self, judgements: list[Judgement]) -> list[Figure]:
        parts = sorted_by(judgements, "dimension")
        return [
            share("accuracy", judgements, "right"),
            *(share(DIMENSIONS[number], rows, "right") for number, rows in parts.items()),
        ]


def _questions(data: Path, tally: Tally) -> Iterator[tuple[tuple, bytes]]:
    reader = _Reader()
    if (data / JSON).is_file():
        found = read_all(_listed(data / JSON), lambda row: _with_file(row, reader, data / IMAGES))
        for question, path in found.values():
            yield question, path.read_bytes()
    else:
        paths = parquet_files(data, "test", COLUMNS)
        if not paths:
            raise no_files(data, f"{JSON} with {IMAGES}, or test-*.parquet")
        found = read_all(table_rows(paths, leave_out=("image",)), reader.read)
        for place, question, row in with_pictures(found, ("image",)):
            cells = row["image"] if isinstance(row["image"], list) else [row["image"]]
            if len(cells) != 1:
                expected = "one for a question about a picture"
                problem = Problem(str(place.file), place.row, "image", f"{len(cells)}", expected, "fetch it again")
                raise DataError(problem)
            yield question, demand_bytes(place, "image", cells[0])
    if reader.videos:
        tally.drop("about a video", count=reader.videos)


class _Reader:
    """(question_id, question, options, letter, data_id, dimension) of each row about a picture."""

    def __init__(self):
        self.seen: set[str] = set()
        self.videos = 0

    def read(self, row: dict) -> tuple[str, str, dict[str, str], str, str, int] | None:
        if row.get("data_type") == "video":
            self.videos += 1
            return None
        if row.get("data_type") != "image":
            raise Wrong("data_type", f"{row.get('data_type')!r:.40}", "image or video", "take the published file")
        if row.get("question_type_id") not in DIMENSIONS:
            raise Wrong(
                "question_type_id", f"{row.get('question_type_id')!r:.40}", "1 to 9", "take the published file"
            )
        key = once(self.seen, "question_id", str(row.get("question_id")))
        options = options_of(text_of(row, name) for name in CHOICES)
        letter = letter_of(row, "answer", options)
        return key, text_of(row, "question"), options, letter, text_of(row, "data_id"), row["question_type_id"]


def _listed(path: Path) -> Iterator[tuple[Place, dict]]:
    content = read_json(path)
    questions = content.get("questions") if isinstance(content, dict) else None
    if not isinstance(questions, list) or not all(isinstance(row, dict) for row in questions):
        raise DataError(Problem(str(path), None, "questions", f"{questions!r:.60}", "a list of objects", "fetch it"))
    for number, row in enumerate(questions):
        yield Place(path, number), row


def _with_file(row: dict, reader: _Reader, images: Path) -> tuple[tuple, Path] | None:
    question = reader.read(row)
    if question is None:
        return None
    return question, picture_in(images, [f"{row['data_id']}{ending}" for ending in ENDINGS], "data_id")
