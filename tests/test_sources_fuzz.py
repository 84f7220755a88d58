"""Rows with anything in them: reading goes on, each row is kept or dropped, and what is kept is good."""

import copy
import json
import random

import numpy as np
import pytest
from PIL import Image

from perceptio.data.masks import encode_mask
from perceptio.data.record import DataError
from perceptio.data.sources.aurora import read_aurora
from perceptio.data.sources.counting import read_aurora_counting, read_instances
from perceptio.data.sources.grandf import PARTS, read_grandf
from perceptio.data.sources.llava import read_llava
from perceptio.data.tally import Tally
from perceptio.data.validate import check_records

JUNK = (
    None,
    True,
    -1,
    0,
    3,
    10**20,
    1.5,
    float("nan"),
    "",
    " ",
    "\ud800",
    "\x00",
    "<image>",
    "../a.jpg",
    "[SEG]",
    "é" * 30,
)
JUNK += ([], [[]], [[1, 2, 3]], {}, {"size": 5, "counts": [1]}, {"size": [8, 12], "counts": "0"}, [None], "<DEPTH_5>")
CAPTION = "a dog by a red ball"
MASK = encode_mask(np.eye(8, 12, dtype=bool))
TALK = [{"from": "human", "value": "<image>\nHow many cups are in the image?"}, {"from": "gpt", "value": "3"}]
CODES = "<DEPTH_START>" + "".join(f"<DEPTH_{n}>" for n in range(100)) + "<DEPTH_END>"


def spots(value, at=()):
    """The places of everything within a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*at, key)
        yield from spots(part, (*at, key))


def spoilt(row, draw: random.Random):
    """A copy with one or two of its parts replaced by junk or gone."""
    row = copy.deepcopy(row)
    for _ in range(draw.choice((1, 1, 2))):
        *path, last = draw.choice(list(spots(row)) or [()]) or [None]
        if last is None:
            return copy.deepcopy(draw.choice(JUNK))
        part = row
        for key in path:
            part = part[key]
        if draw.random() < 0.2:
            del part[last]
        else:
            part[last] = copy.deepcopy(draw.choice(JUNK))
    return row


def grounded(phrase):
    start = CAPTION.index(phrase)
    return {"token_positives": [start, start + len(phrase)], "rle_masks": [MASK]}


ROWS = {
    "llava": {"id": "1", "image": "a.png", "conversations": TALK},
    "aurora": {
        "id": "1",
        "image": "a.png",
        "conversations": [TALK[0], {"from": "gpt", "value": f"It is {CODES}. (A)"}],
    },
    "aurora-counting": {"id": "1", "image": "a.png", "conversations": TALK},
    "groundings": {
        "file_name": "a.png",
        "height": 8,
        "width": 12,
        "caption": CAPTION,
        "groundings": {"a dog": grounded("a dog"), "a red ball": grounded("a red ball")},
    },
    "refs": {
        "7": {
            "img_file_name": "a.png",
            "caption": CAPTION,
            "refs": [{"sentence": "a dog", "segmentation": [[1, 1, 5, 1, 5, 5]]}],
        }
    },
}


def read(kind: str, root, path, tally):
    options = {"tally": tally, "file": path.name, "images": ""}
    if kind in ("groundings", "refs"):
        part = next(name for name, part in PARTS.items() if part.layout == kind)
        return read_grandf(root, part=part, **options)
    readers = {"llava": read_llava, "aurora": read_aurora, "aurora-counting": read_aurora_counting}
    return readers[kind](root, **options)


@pytest.fixture
def root(tmp_path):
    Image.linear_gradient("L").resize((12, 8)).save(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize("kind", ROWS)
def test_a_spoilt_row_does_not_stop_the_others(root, kind):
    draw = random.Random(kind)
    rows = [ROWS[kind], *(spoilt(ROWS[kind], draw) for _ in range(600))]
    path = root / "rows.json"
    path.write_text(json.dumps(rows))
    tally = Tally(kind)
    records = list(read(kind, root, path, tally))
    tally.check(len(rows))
    assert 1 <= len(records) == tally.kept < len(rows) and len(tally.dropped) < 25
    assert [problem for _, problems in check_records(records) for problem in problems] == []
    for record in records:
        record["id"].encode(), record["extra"].encode()


COCO = {
    "images": [{"id": 1, "file_name": "a.png", "height": 8, "width": 12}],
    "annotations": [{"image_id": 1, "category_id": 2, "segmentation": MASK, "iscrowd": 0}],
    "categories": [{"id": 2, "name": "cup"}, {"id": 3, "name": "dog"}],
}
FLICKR = {
    "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 50, "caption": CAPTION}],
    "annotations": [{"image_id": 1, "bbox": [0, 0, 5, 5], "area": 25, "tokens_positive": [[0, 5]], "sam_mask": MASK}],
}


@pytest.mark.parametrize("kind", ["instances", "flickr"])
def test_a_spoilt_file_of_coco_s_layout_is_read_or_named(root, kind):
    draw = random.Random(kind)
    Image.linear_gradient("L").resize((50, 40)).save(root / "flickr.png")
    FLICKR["annotations"][0]["sam_mask"] = encode_mask(np.eye(40, 50, dtype=bool))
    good = COCO if kind == "instances" else {**FLICKR, "images": [{**FLICKR["images"][0], "file_name": "flickr.png"}]}
    outcomes = {"kept": 0, "dropped": 0, "named": 0}
    for content in [good, *(spoilt(good, draw) for _ in range(300))]:
        (root / "coco.json").write_text(json.dumps(content))
        tally, options = Tally(kind), {"file": "coco.json", "images": ""}
        try:
            reader = read_instances(root, tally=tally, **options) if kind == "instances" else None
            records = list(reader or read_grandf(root, tally=tally, part="flickr", **options))
        except DataError:
            outcomes["named"] += 1
            continue
        tally.check()
        assert [problem for _, problems in check_records(records) for problem in problems] == []
        outcomes["kept" if records else "dropped"] += 1
    assert all(outcomes.values()), outcomes
