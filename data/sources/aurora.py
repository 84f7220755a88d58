"""AURORA's files for depth: LLaVA's form, where the answer holds a depth map as a string of tokens.

    depth generation   the answer is `<DEPTH_START><DEPTH_17>…<DEPTH_END>`, with or without a sentence around it
    chain of thought   "Point A is located at …. The depth map for the image is <DEPTH_START>…<DEPTH_END>. Since point
                       B has a higher pixel value …"
    direct             "(B)"

The string leaves the text and becomes the record's depth codes; an answer that had one opens with a depth span, and
the rest of it stays.  The codes are ids of AURORA's own codebook (128 codes, 10 × 10): a model with another codebook
needs other codes of these pictures, from a labelling job.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from ..record import assistant, make_record
from ..tally import Tally
from .ade import ANSWER
from .common import Unusable, as_dict, convert_rows, read_picture
from .conversations import to_messages
from .json_stream import read_rows

SPAN = re.compile(r"<DEPTH_START>((?:\s*<DEPTH_\d+>)*)\s*<DEPTH_END>")
CODE = re.compile(r"<DEPTH_(\d+)>")
# The sentence whose object was the string says nothing without it.
SENTENCE = re.compile(
    r"(?:The depth map (?:for|of) (?:the|this) (?:image|picture) is:?\s*)?" + SPAN.pattern + r"\s*\.?", re.I
)
AURORA_CODES, AURORA_LENGTH = 128, 100


def read_aurora(
    root: str | Path,
    *,
    tally: Tally,
    file: str = "train_depth_20k.json",
    images: str = "",
    num_codes: int = AURORA_CODES,
    span_length: int = AURORA_LENGTH,
    codebook: str = "aurora",
    repeated: bool = False,
    source: str = "aurora-depth",
    licence: str = "unknown",
    split: str = "train",
) -> Iterator[dict]:
    """The rows of `root/file`, with pictures below `root/images`.

    num_codes, span_length: a string with a larger code, or of another length, drops its row.
    codebook: what the records name as theirs: a hash, or "aurora".
    repeated: keep rows whose published id was there before; the files of ten epochs hold each row many times.
    """
    folder, seen = Path(root) / images, set()

    def convert(row, number: int) -> dict:
        published = first_time(as_dict(row).get("id"), seen, repeated)
        image = read_picture(folder, row.get("image"))
        messages, codes = take_out_depth(row.get("conversations"), num_codes, span_length)
        seen.add(published)
        return make_record(
            id=f"{source}/{Path(file).stem}/{number:06d}",
            image=image,
            messages=messages,
            depth_codes=codes,
            depth_codebook=None if codes is None else codebook,
            source=source,
            licence=licence,
            split=split,
            extra={"id": published},
        )

    yield from convert_rows(read_rows(Path(root) / file), convert, tally)


def first_time(published, seen: set, repeated: bool) -> str | None:
    """The published id of a row, None when it has none; raises where it was there before."""
    published = str(published) if isinstance(published, (str, int)) else None
    if published is not None and published in seen and not repeated:
        raise Unusable("repeated row", published)
    return published


def take_out_depth(conversations, num_codes: int, span_length: int) -> tuple[list[dict], list[int] | None]:
    """(messages without depth strings, the codes of the one map that they held)."""
    maps: list[list[int]] = []

    def answer(text: str) -> dict:
        found = [[int(code) for code in CODE.findall(span)] for span in SPAN.findall(text)]
        maps.extend(found)
        return assistant(_without_spans(text) or ANSWER, "depth") if found else assistant(text)

    messages = to_messages(conversations, has_picture=True, answer=answer)
    if any("<DEPTH_" in message["content"] for message in messages):
        raise Unusable("part of a depth string")
    if any(codes != maps[0] for codes in maps):
        raise Unusable("two different depth strings")
    if maps and len(maps[0]) != span_length:
        raise Unusable(f"depth string of other than {span_length} codes", f"{len(maps[0])} codes")
    if maps and max(maps[0]) >= num_codes:
        raise Unusable(f"depth code past {num_codes - 1}", f"code {max(maps[0])}")
    return messages, maps[0] if maps else None


def _without_spans(text: str) -> str:
    pieces = SENTENCE.sub("\0", text).split("\0")
    return " ".join(piece.strip() for piece in pieces if piece.strip())
