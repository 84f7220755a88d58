"""BLINK in the Hub's layout (BLINK-Benchmark/BLINK): a folder for each subtask with val-*.parquet.

The columns are idx ("val_Relative_Depth_1"), image_1 … image_4, choices, prompt and answer ("(A)").  The published
prompt is asked as it is; it lists the options.  Several pictures are shown as several, before the prompt, as BLINK
does it with models that take more than one; such a question is asked without perception, which is about one picture.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from ...data.tally import Tally
from ..benchmark import Figure, Item, Judgement, share
from .common import (
    LETTERS,
    Choice,
    Wrong,
    cell_bytes,
    demand_bytes,
    letter_of,
    macro,
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

VAL = "val"
SUBTASKS = (
    "Art_Style",
    "Counting",
    "Forensic_Detection",
    "Functional_Correspondence",
    "IQ_Test",
    "Jigsaw",
    "Multi-view_Reasoning",
    "Object_Localization",
    "Relative_Depth",
    "Relative_Reflectance",
    "Semantic_Correspondence",
    "Spatial_Relation",
    "Visual_Correspondence",
    "Visual_Similarity",
)
PICTURES = ("image_1", "image_2", "image_3", "image_4")


class BLINK(Choice):
    """Figures: accuracy in each subtask, their mean, which is BLINK's own total, and over all questions.

    The split is "val", or one subtask of it; the answers of "test" are not published.
    """

    name = "blink"
    splits = (VAL, *SUBTASKS)

    def items(self, data: Path, split: str, tally: Tally) -> Iterator[Item]:
        paths = parquet_files(data, VAL, ("idx", "image_1", "choices", "prompt", "answer"))
        if not paths:
            raise no_files(data, "val-*.parquet, in a folder for each subtask")
        found = read_all(table_rows(paths, leave_out=PICTURES), _Reader(split).read)
        for place, (key, subtask, prompt, options, letter), row in with_pictures(found, PICTURES):
            demand_bytes(place, "image_1", row["image_1"])
            pictures = [data for name in PICTURES if (data := cell_bytes(row.get(name))) is not None]
            tally.keep()
            yield self.ask(key, prompt, pictures, options, letter, subtask=subtask)

    def figures(self, judgements: list[Judgement]) -> list[Figure]:
        parts = sorted_by(judgements, "subtask")
        found = [share(subtask, rows, "right") for subtask, rows in parts.items()]
        if len(parts) > 1:
            found.append(macro(f"mean of {len(parts)} subtasks", judgements, "right", "subtask"))
            found.append(share("all questions", judgements, "right"))
        return found


class _Reader:
    """(idx, subtask, prompt, options, letter) of each row of the split."""

    def __init__(self, split: str):
        self.split, self.seen = split, set()

    def read(self, row: dict) -> tuple[str, str, str, dict[str, str], str] | None:
        key = once(self.seen, "idx", text_of(row, "idx"))
        named = re.fullmatch(rf"{VAL}_(.+)_\d+", key)
        if named is None or named[1] not in SUBTASKS:
            raise Wrong("idx", f"{key!r:.80}", "val_, a subtask, and a number", "take the published file")
        if self.split not in (VAL, named[1]):
            return None
        choices = row["choices"]
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
            raise Wrong("choices", f"{choices!r:.80}", "two or more", "take the published file")
        options = options_of(map(str, choices))
        return key, named[1], text_of(row, "prompt"), options, letter_of(row, "answer", options)
