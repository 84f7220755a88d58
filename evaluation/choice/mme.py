"""MME: two questions about each picture, one to be answered yes and one no, asked in the published words.

Read are the Hub's table (lmms-lab/MME: test-*.parquet with question_id, image, question, answer, category) and the
official folder: one for each category with the pictures and, named as each picture, a text file with a question, a tab
and its answer on each line; in some categories these lie in images/ and questions_answers_YN/.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ...data.record import DataError, Problem
from ...data.tally import Tally
from ..benchmark import Figure, Item, Judgement, Prediction, share
from ..metrics import parse_yes_no
from .common import (
    Choice,
    Place,
    Wrong,
    demand_bytes,
    macro,
    no_files,
    parquet_files,
    picture_in,
    read_all,
    read_text,
    sorted_by,
    table_rows,
    text_of,
    with_pictures,
)

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
COLUMNS = ("question_id", "image", "question", "answer", "category")
ENDINGS = (".jpg", ".png", ".jpeg")
FULL = 200  # points of a category


class MME(Choice):
    """Figures: the scores of perception and cognition; of each category accuracy, and accuracy+, the share of pictures
    with both questions right.  A category scores the sum of both in percent, and a part the sum of its categories.

    A picture of which `--limit` left a question out has no accuracy+ and no score.
    """

    name = "mme"

    def items(self, data: Path, split: str, tally: Tally) -> Iterator[Item]:
        numbers: Counter[str] = Counter()
        for (picture_id, category, question, answer), picture in _questions(data):
            tally.keep()
            truth = {
                "answer": "Yes" if answer else "No",
                "yes": answer,
                "about": {"category": category, "picture": picture_id},
            }
            key = f"{picture_id}/{numbers[picture_id]}"
            numbers[picture_id] += 1
            yield Item(key, question, (picture,), self.perception, truth, group=picture_id)

    def judge(self, item: Item, prediction: Prediction) -> Judgement:
        found = parse_yes_no(prediction.answer)
        invalid = prediction.error or (None if found is not None else "neither yes nor no")
        right = invalid is None and found == item.truth["yes"]
        return Judgement(item.id, {"right": right, **item.truth["about"]}, invalid, float(right))

    def figures(self, judgements: list[Judgement]) -> list[Figure]:
        pictures = pairs(judgements)
        found = [
            score(name, [row for row in pictures if row.values["category"] in part])
            for name, part in (("perception", PERCEPTION), ("cognition", COGNITION))
            if any(row.values["category"] in part for row in pictures)
        ]
        both = sorted_by(pictures, "category")
        for category, rows in sorted_by(judgements, "category").items():
            found.append(share(f"{category}, accuracy", rows, "right"))
            found.append(share(f"{category}, accuracy+", both.get(category, []), "both"))
        return found


def pairs(judgements: list[Judgement]) -> list[Judgement]:
    """One for each picture with both questions judged; `score` is the mean of its accuracy and accuracy+."""
    found = []
    for name, rows in sorted_by(judgements, "picture").items():
        if len(rows) == 2:
            rights = [row.values["right"] for row in rows]
            values = {
                "category": rows[0].values["category"],
                "both": all(rights),
                "score": (sum(rights) / 2 + all(rights)) / 2,
            }
            found.append(Judgement(name, values, next((row.invalid for row in rows if row.invalid), None)))
    return found


def score(name: str, pictures: list[Judgement]) -> Figure:
    """Sum over the categories of the points of each."""
    count = len({row.values["category"] for row in pictures})
    figure = macro(f"{name} score, of {FULL * count}", pictures, "score", "category")
    scale = FULL * count / 100
    return replace(figure, unit="", value=scale * figure.value, low=scale * figure.low, high=scale * figure.high)


# Reading


def _questions(data: Path) -> Iterator[tuple[tuple[str, str, str, bool], bytes]]:
    paths = parquet_files(data, "test", COLUMNS)
    if paths:
        found = read_all(table_rows(paths, leave_out=("image",)), _read)
        _demand_pairs(found)
        for place, question, row in with_pictures(found, ("image",)):
            yield question, demand_bytes(place, "image", row["image"])
    else:
        found = read_all(_folder_rows(data), lambda row: (_read(row), _file_of(row)))
        _demand_pairs({place: question for place, (question, _) in found.items()})
        for question, path in found.values():
            yield question, path.read_bytes()


def _read(row: dict) -> tuple[str, str, str, bool]:
    """(picture, category, question, whether yes is right)."""
    if row["category"] not in PERCEPTION + COGNITION:
        expected = f"one of {', '.join(PERCEPTION + COGNITION)}"
        raise Wrong("category", f"{row['category']!r:.40}", expected, "take the published file")
    answer = parse_yes_no(text_of(row, "answer"))
    if answer is None:
        raise Wrong("answer", f"{row['answer']!r:.40}", "Yes or No", "take the published file")
    return text_of(row, "question_id"), row["category"], text_of(row, "question"), answer


def _demand_pairs(found: dict[Place, tuple[str, str, str, bool]]) -> None:
    places: dict[str, list[Place]] = {}
    for place, question in found.items():
        places.setdefault(question[0], []).append(place)
    problems = [
        Problem(
            str(rows[0].file), rows[0].row, "question_id", f"{len(rows)} of {key!r}", "two of each", "fetch it again"
        )
        for key, rows in places.items()
        if len(rows) != 2
    ]
    if problems:
        raise DataError(problems)


def _folder_rows(data: Path) -> Iterator[tuple[Place, dict]]:
    folders = [data / name for name in sorted(PERCEPTION + COGNITION) if (data / name).is_dir()]
    if not folders:
        raise no_files(data, "test-*.parquet, or a folder for each category, as existence and OCR")
    for folder in folders:
        texts, images = folder / "questions_answers_YN", folder / "images"
        for path in sorted((texts if texts.is_dir() else folder).glob("*.txt")):
            for number, line in enumerate(filter(str.strip, read_text(path).split("\n")), start=1):
                question, _, answer = line.partition("\t")
                yield (
                    Place(path, number),
                    {
                        "question_id": f"{folder.name}/{path.stem}",
                        "question": question,
                        "answer": answer,
                        "category": folder.name,
                        "folder": images if images.is_dir() else folder,
                        "stem": path.stem,
                    },
                )


def _file_of(row: dict) -> Path:
    return picture_in(row["folder"], [f"{row['stem']}{ending}" for ending in ENDINGS], "image")
