"""The record: one row per picture, with the conversation about it, its masks and its depth.

id              unique in a data set
image           the picture as it was published, or None for text alone
messages        role, content and, for an answer, `perception`: what it opens with ("seg+depth", "seg", "depth",
                "none").  The picture stands at the start of the first question; texts hold no control tokens.
masks           in the order of their [SEG]: `turn` is the index of the answer in `messages`; `offset` -1 is the [SEG]
                that opens the answer, another is the character of its text before which a further one stands;
                `size` [H, W] of the upright picture and `counts` are COCO's run lengths.  An empty mask says that
                the thing is not in the picture.
depth           16-bit picture: 0 has no value, 1…65535 is relative inverse depth from 0 (farthest) to 1 (nearest)
depth_codes     the code ids of the whole map, row by row; depth_codebook is the hash of their codebook
source, licence, split
extra           a JSON object with what the source knows besides
mask_preview    the masks as a picture, for people; written with the shards, never read
"""

import json
import os
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image as PIL

from ..extras import extra

with extra("data", "data sets need"):
    from datasets import Features, Image, List, Value

from ..processing_perceptio import PERCEPTION_MODES, PICTURE_FORMATS

FEATURES = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "messages": List({"role": Value("string"), "content": Value("string"), "perception": Value("string")}),
        "masks": List(
            {"turn": Value("int32"), "offset": Value("int32"), "size": List(Value("int32")), "counts": Value("string")}
        ),
        "depth": Image(),
        "depth_codes": List(Value("int16")),
        "depth_codebook": Value("string"),
        "source": Value("string"),
        "licence": Value("string"),
        "split": Value("string"),
        "extra": Value("string"),
        "mask_preview": Image(),
    }
)
COLUMNS = tuple(FEATURES)
OPENING = -1  # the offset of the [SEG] that opens an answer
GIVEN = "given_span"  # true in `extra`: the depth span is read, and nothing of it is learned
READ = "read_span"  # true in `extra`: answers are told from the depth span, so that all its codes are kept right
ORIENTATION = 0x0112  # EXIF
TURNED = (5, 6, 7, 8)  # orientations that exchange width and height


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one row: where, what was found, what was expected, and what to change."""

    file: str
    row: int | None
    field: str
    found: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        place = ", ".join(
            filter(None, [self.file, "" if self.row is None else f"row {self.row}", f"field `{self.field}`"])
        )
        return f"{place}: {self.found}; expected {self.expected}: {self.remedy}"

    def to_dict(self) -> dict:
        return asdict(self)


class DataError(ValueError):
    """Data that cannot be used.  `problems` lists all that was found, the message the first ten."""

    def __init__(self, problems: "Problem | list[Problem] | str"):
        self.problems = [] if isinstance(problems, str) else [problems] if isinstance(problems, Problem) else problems
        lines = [problems] if isinstance(problems, str) else [str(problem) for problem in self.problems[:10]]
        if len(self.problems) > 10:
            lines.append(f"… and {len(self.problems) - 10} more")
        if len(self.problems) > 1:
            lines.insert(0, f"{len(self.problems)} problems in the data:")
        super().__init__("\n".join(lines))

    def __reduce__(self):  # an exception crosses processes with its arguments, which are not its message
        return type(self), (self.problems or str(self),)


def as_sentence(words: str) -> str:
    """Words that name something, as a whole answer."""
    return f"{words[0].upper()}{words[1:]}."


def user(text: str) -> dict:
    return {"role": "user", "content": text, "perception": None}


def assistant(text: str, perception: str = "none") -> dict:
    if perception not in PERCEPTION_MODES:
        raise ValueError(f"`perception` is {perception!r}, expected one of {', '.join(PERCEPTION_MODES)}")
    return {"role": "assistant", "content": text, "perception": perception}


def make_record(
    *,
    id: str,
    image,
    messages: list[dict],
    masks=(),
    depth=None,
    depth_codes=None,
    depth_codebook: str | None = None,
    source: str,
    licence: str,
    split: str = "train",
    extra: dict | None = None,
) -> dict:
    """A row of the schema.  image, depth: encoded bytes, a path, {"bytes", "path"} or None; extra: a dict.

    A mask may leave out `offset` (it opens its answer) and `turn` (the first answer).
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    defaults = {"turn": turns[0] if turns else 0, "offset": OPENING}
    return {
        "id": id,
        "image": _as_file(image),
        "messages": [{"perception": None, **message} for message in messages],
        "masks": [{**defaults, **mask, "size": [int(side) for side in mask["size"]]} for mask in masks],
        "depth": _as_file(depth),
        "depth_codes": None if depth_codes is None else [int(code) for code in depth_codes],
        "depth_codebook": depth_codebook,
        "source": source,
        "licence": licence,
        "split": split,
        "extra": json.dumps(extra or {}, ensure_ascii=False, sort_keys=True),
        "mask_preview": None,
    }


def _as_file(item) -> dict | None:
    if item is None:
        return None
    if isinstance(item, (bytes, bytearray)):
        return {"bytes": bytes(item), "path": None}
    if isinstance(item, (str, os.PathLike)):
        return {"bytes": Path(item).read_bytes(), "path": Path(item).name}
    return {"bytes": item["bytes"], "path": item.get("path")}


def stored_size(data: bytes) -> tuple[int, int, int]:
    """(width, height, EXIF orientation) of an encoded picture, from its header alone."""
    with PIL.open(BytesIO(data), formats=PICTURE_FORMATS) as picture:
        try:
            orientation = int(picture.getexif().get(ORIENTATION, 1))
        except Exception:  # a broken EXIF block says nothing about the pixels
            orientation = 1
        return (*picture.size, orientation)


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) of an encoded picture as a person sees it, from its header alone."""
    width, height, orientation = stored_size(data)
    return (height, width) if orientation in TURNED else (width, height)
