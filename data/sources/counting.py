"""Counting: AURORA's data from LVIS, and instance masks in COCO's layout.

AURORA's file is of LLaVA's form; its answers list boxes as `(<PIXEL_x1>,<PIXEL_y1>,<PIXEL_x2>,<PIXEL_y2>)`, in pixels
of the picture at 336 × 336.  The boxes leave the text (they stay in `extra`) and the answer is the count.
"""

import json
import random
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..masks import MaskError, encode_mask, merge
from ..record import DataError, Problem, assistant, make_record, upright_size, user
from ..tally import Tally
from .aurora import first_time
from .common import Unusable, as_dict, convert_rows, published_mask, read_picture, stored_frame
from .conversations import to_messages
from .json_stream import read_rows, read_section

BOX = re.compile(r"\(\s*<PIXEL_(\d+)>\s*,\s*<PIXEL_(\d+)>\s*,\s*<PIXEL_(\d+)>\s*,\s*<PIXEL_(\d+)>\s*\)")
KIND = re.compile(r"here are the bounding boxes for the (.+?):|There are no (.+?) in the image", re.I)
QUESTION = re.compile(r"How many (.+?) are in the image\?", re.I)
CONCLUSION = re.compile(r"we conclude there are (\d+) ", re.I)


def read_aurora_counting(
    root: str | Path,
    *,
    tally: Tally,
    file: str = "train_lvis_annealing_data.json",
    images: str = "",
    repeated: bool = False,
    source: str = "aurora-counting",
    licence: str = "unknown",
    split: str = "train",
) -> Iterator[dict]:
    """The rows of `root/file`, with pictures below `root/images`; all become "How many … are in the picture?".

    repeated: keep rows whose published id was there before; the file of ten epochs holds each row many times.
    """
    folder, seen = Path(root) / images, set()

    def convert(row, number: int) -> dict:
        published = first_time(as_dict(row).get("id"), seen, repeated)
        image = read_picture(folder, row.get("image"))
        thing, count, boxes, direct = _count(to_messages(row.get("conversations"), has_picture=True))
        seen.add(published)
        answer = str(count) if direct else f"There are {count or 'no'} {thing} in the picture."
        return make_record(
            id=f"{source}/{number:06d}",
            image=image,
            messages=[user(f"How many {thing} are in the picture?"), assistant(answer)],
            source=source,
            licence=licence,
            split=split,
            extra={"id": published, "count": count, "boxes_336": boxes},
        )

    yield from convert_rows(read_rows(Path(root) / file), convert, tally)


def _count(messages: list[dict]) -> tuple[str, int, list[list[int]], bool]:
    """(what is counted, how many, their boxes, whether the answer was the bare number)."""
    question, answer = messages[0]["content"], messages[1]["content"]
    asked, named = QUESTION.search(question), KIND.search(answer)
    if len(messages) != 2 or not (asked or named):
        raise Unusable("no question about a number")
    thing = asked[1] if asked else named[1] or named[2]
    boxes = [[int(side) for side in box] for box in BOX.findall(answer)]
    if answer.count("<PIXEL_") != 4 * len(boxes) or "<PIXEL_" in question:
        raise Unusable("part of a box")
    if answer.isdecimal() and len(answer) < 4:
        return thing, int(answer), boxes, True
    concluded = CONCLUSION.search(answer)
    if not named or (concluded and int(concluded[1]) != len(boxes)) or (named[2] and boxes):
        raise Unusable("the boxes are not as many as the answer says")
    return thing, len(boxes), boxes, False


def read_instances(
    root: str | Path,
    *,
    tally: Tally,
    file: str = "instances.json",
    images: str = "images",
    questions: int = 3,
    absent: int = 1,
    most: int = 15,
    seed: int = 0,
    source: str = "instances",
    licence: str = "unknown",
    split: str = "train",
) -> Iterator[dict]:
    """Instance masks in COCO's or LVIS's layout: a record per picture, a turn per kind of thing, with one mask of all.

    questions: at most so many kinds that are there, and `absent` that are not (an empty mask), drawn with `seed`.
    most: kinds with more instances are not asked about; nor are those with crowds, and those that LVIS says are not
    labelled exhaustively.  Absent are LVIS's own negatives, or, in a file without them, all that has no annotation.
    """
    path, folder = Path(root) / file, Path(root) / images
    names = {kind["id"]: kind["name"].replace("_", " ") for kind in _section(path, "categories", id=int, name=str)}
    annotated, seen = _by_picture(path), set()

    def convert(entry: dict, number: int) -> dict:
        if entry["id"] in seen:
            raise Unusable("repeated id of a picture", str(entry["id"]))
        seen.add(entry["id"])
        things = annotated.pop(entry["id"], {})
        image = read_picture(folder, _file_name(entry))
        draw = random.Random(zlib.crc32(f"{seed}/{entry['id']}".encode()))
        present, left_out = _countable(things, entry, most)
        chosen = draw.sample(sorted(present), min(questions, len(present)))
        chosen += draw.sample(missing := _absent(entry, things, names), min(absent, len(missing)))
        draw.shuffle(chosen)
        if not chosen:
            raise Unusable("nothing that can be counted", str(dict(left_out)))
        messages, masks = [], []
        for kind in chosen:
            masks.append({**_union(things.get(kind, []), image, entry), "turn": len(messages) + 1})
            messages += [user(_ask(names, kind)), assistant(str(len(things.get(kind, []))), "seg")]
        return make_record(
            id=f"{source}/{entry['id']}",
            image=image,
            messages=messages,
            masks=masks,
            source=source,
            licence=licence,
            split=split,
            extra={"kinds_left_out": dict(left_out)},
        )

    yield from convert_rows(_section(path, "images", id=int), convert, tally)


def _ask(names: dict, kind) -> str:
    if kind not in names:
        raise Unusable("unknown category", f"{kind!r:.40}")
    return f'How many instances of "{names[kind]}" are in the picture?'


def _file_name(entry: dict) -> str | None:
    """LVIS names its pictures by the address at COCO, whose last two parts are the folder and the file."""
    if entry.get("file_name"):
        return entry["file_name"]
    address = entry.get("coco_url")
    return "/".join(address.split("/")[-2:]) if isinstance(address, str) else None


def _section(path: Path, key: str, **types: type) -> Iterator[dict]:
    """The entries of a section.  One without what all rests on makes the counts of its picture false: an error."""
    for number, entry in enumerate(read_section(path, key)):
        for name, kind in types.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
                found = f"{entry!r:.80}"
                raise DataError(
                    Problem(
                        str(path),
                        number,
                        f"{key}.{name}",
                        found,
                        f"`{name}` ({kind.__name__})",
                        "fetch the file again",
                    )
                )
        yield entry


def _by_picture(path: Path) -> dict[int, dict[int, list[tuple[bytes, bool]]]]:
    """{picture: {category: [(segmentation, whether it is a crowd)]}}; JSON takes a tenth of the memory of lists."""
    annotated = defaultdict(lambda: defaultdict(list))
    for entry in _section(path, "annotations", image_id=int, category_id=int):
        segmentation = json.dumps(entry.get("segmentation"), separators=(",", ":")).encode()
        annotated[entry["image_id"]][entry["category_id"]].append((segmentation, bool(entry.get("iscrowd"))))
    return annotated


def _countable(things: dict, entry: dict, most: int) -> tuple[list, Counter]:
    present, left_out = [], Counter()
    for kind, annotations in things.items():
        if kind in _ids(entry, "not_exhaustive_category_ids"):
            left_out["not labelled exhaustively"] += 1
        elif any(crowd for _, crowd in annotations):
            left_out["with a crowd"] += 1
        elif len(annotations) > most:
            left_out[f"more than {most}"] += 1
        else:
            present.append(kind)
    return present, left_out


def _absent(entry: dict, things: dict, names: dict) -> list:
    candidates = _ids(entry, "neg_category_ids") if "neg_category_ids" in entry else names
    return sorted(kind for kind in candidates if kind not in things)


def _ids(entry: dict, key: str) -> list[int]:
    ids = entry.get(key)
    return [kind for kind in ids if isinstance(kind, int)] if isinstance(ids, list) else []


def _union(annotations: list, image: dict, entry: dict) -> dict:
    if not annotations:
        stored_frame(image)
        width, height = upright_size(image["bytes"])
        return encode_mask(np.zeros((height, width), bool))
    size = (entry["height"], entry["width"]) if "height" in entry and "width" in entry else None
    try:
        return merge([published_mask(json.loads(segmentation), image, size) for segmentation, _ in annotations])
    except MaskError as error:
        raise Unusable("mask not usable", str(error)) from error
