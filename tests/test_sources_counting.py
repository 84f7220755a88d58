"""Counting: AURORA's file, and instances in COCO's and LVIS's layouts."""

import json

import numpy as np
import pytest
from PIL import Image

from perceptio.data.masks import decode_mask, encode_mask
from perceptio.data.record import DataError
from perceptio.data.sources.counting import read_aurora_counting, read_instances
from perceptio.data.tally import Tally
from perceptio.data.validate import check_records

BOXES = """\
Bounding box 1: (<PIXEL_1>,<PIXEL_2>,<PIXEL_30>,<PIXEL_40>)
Bounding box 2: (<PIXEL_5>,<PIXEL_6>,<PIXEL_335>,<PIXEL_0>)"""
THOUGHT = f"""\
Based on the analysis, here are the bounding boxes for the cups:
{BOXES}
Since there are 2 distinct bounding boxes and masks, we conclude there are 2 cups."""
HOW_MANY = "How many cups are in the image?"
STEPS = f"{HOW_MANY}.\n To solve this, first, identify the bounding boxes associated with the cups."


def save(path, size=(60, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize(size).convert("RGB").save(path, "JPEG")


def good(records, tally, read) -> None:
    tally.check(read)
    assert len(records) == tally.kept
    assert [problem for _, problems in check_records(records) for problem in problems] == []


def count(root, *pairs, **options):
    save(root / "coco/train2017/1.jpg")
    rows = [
        {
            "id": str(number),
            "image": "coco/train2017/1.jpg",
            "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
        }
        for number, (question, answer) in enumerate(pairs)
    ]
    (root / "train_lvis_annealing_data.json").write_text(json.dumps(rows))
    tally = Tally("counting")
    records = list(read_aurora_counting(root, tally=tally, **options))
    good(records, tally, len(rows))
    return records, tally


def test_boxes_leave_the_answer_and_the_count_stays(tmp_path):
    records, _ = count(
        tmp_path,
        ("Return the bounding boxes of cups.", f"Here are the bounding boxes for the cups:\n{BOXES}"),
        (STEPS, THOUGHT),
        (HOW_MANY, "2"),
        ("Please locate all of the cups in this image.", "There are no cups in the image."),
        (STEPS, "There are no cups in the image. We conclude there are 0 cups."),
    )
    assert {record["messages"][0]["content"] for record in records} == {"How many cups are in the picture?"}
    assert [record["messages"][1]["content"] for record in records] == [
        "There are 2 cups in the picture.",
        "There are 2 cups in the picture.",
        "2",
        "There are no cups in the picture.",
        "There are no cups in the picture.",
    ]
    assert json.loads(records[0]["extra"])["boxes_336"] == [[1, 2, 30, 40], [5, 6, 335, 0]]
    assert all(record["messages"][1]["perception"] == "none" for record in records)


def test_answers_whose_number_is_in_doubt_are_dropped(tmp_path):
    _, tally = count(
        tmp_path,
        (STEPS, THOUGHT.replace("there are 2 cups", "there are 3 cups")),
        (STEPS, THOUGHT.replace("<PIXEL_2>,", "")),
        (HOW_MANY, "several"),
        ("What is this?", "A cup."),
    )
    assert tally.dropped == {
        "the boxes are not as many as the answer says": 2,
        "part of a box": 1,
        "no question about a number": 1,
    }


SIZE = (40, 60)


def square(left, top=5, side=10) -> list:
    return [[left, top, left + side, top, left + side, top + side, left, top + side]]


def area(*corners, side=10) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    for left in corners:
        mask[5 : 5 + side, left : left + side] = True
    return mask


def annotation(number, image, category, segmentation, **more):
    return {"id": number, "image_id": image, "category_id": category, "segmentation": segmentation, **more}


@pytest.fixture
def instances():
    """COCO's layout: two cups and a crowd in picture 1, nothing in picture 2."""
    crowd = {"size": list(SIZE), "counts": [100, 50, 40 * 60 - 150]}
    return {
        "info": {},
        "licenses": [],
        "images": [
            {"id": 1, "file_name": "1.jpg", "height": 40, "width": 60},
            {"id": 2, "file_name": "2.jpg", "height": 40, "width": 60},
        ],
        "annotations": [
            annotation(1, 1, 10, square(0), iscrowd=0),
            annotation(2, 1, 10, {"size": list(SIZE), "counts": encode_mask(area(20))["counts"]}, iscrowd=0),
            annotation(3, 1, 11, crowd, iscrowd=1),
        ],
        "categories": [{"id": 10, "name": "cup"}, {"id": 11, "name": "person"}, {"id": 12, "name": "traffic_light"}],
    }


def read(root, content, read_count=None, **options):
    for entry in content["images"]:
        save(root / "images" / entry.get("file_name", "train2017/3.jpg"))
    (root / "instances.json").write_text(json.dumps(content))
    tally = Tally("instances")
    records = list(read_instances(root, tally=tally, **options))
    good(records, tally, len(content["images"]))
    return records, tally


def turns(record) -> dict:
    """{question: (answer, mask)}"""
    pairs = {}
    for mask in record["masks"]:
        question, answer = record["messages"][mask["turn"] - 1 : mask["turn"] + 1]
        pairs[question["content"].split('"')[1]] = answer["content"], decode_mask(mask)
    return pairs


def test_a_kind_is_counted_and_its_instances_are_one_mask(tmp_path, instances):
    (record,), tally = read(tmp_path, instances, absent=0)
    ((thing, (answer, mask)),) = turns(record).items()
    assert (thing, answer) == ("cup", "2") and np.array_equal(mask, area(0, 20))
    assert record["messages"][1]["perception"] == "seg"
    assert json.loads(record["extra"]) == {"kinds_left_out": {"with a crowd": 1}}
    assert tally.dropped == {"nothing that can be counted": 1}


def test_what_is_absent_has_the_count_zero_and_an_empty_mask(tmp_path, instances):
    records, _ = read(tmp_path, instances, absent=3)
    assert {thing: answer for thing, (answer, _) in turns(records[0]).items()} == {"cup": "2", "traffic light": "0"}
    assert not turns(records[0])["traffic light"][1].any()
    assert set(turns(records[1])) == {"cup", "person", "traffic light"}


def test_lvis_says_what_is_absent_and_what_may_be_incomplete(tmp_path, instances):
    instances["images"] = [
        {
            "id": 1,
            "coco_url": "http://images.cocodataset.org/train2017/3.jpg",
            "height": 40,
            "width": 60,
            "not_exhaustive_category_ids": [10],
            "neg_category_ids": [12],
        }
    ]
    instances["annotations"] = [annotation(1, 1, 10, square(0)), annotation(2, 1, 11, square(20))]
    (record,), _ = read(tmp_path, instances, absent=5)
    assert {thing: answer for thing, (answer, _) in turns(record).items()} == {"person": "1", "traffic light": "0"}
    assert json.loads(record["extra"]) == {"kinds_left_out": {"not labelled exhaustively": 1}}


def test_the_same_seed_asks_the_same_questions(tmp_path, instances):
    instances["categories"] += [{"id": 100 + n, "name": f"thing {n}"} for n in range(50)]
    first, again, other = (read(tmp_path, instances, absent=4, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again != other


def test_kinds_with_too_many_instances_are_not_asked_about(tmp_path, instances):
    (record, _), _ = read(tmp_path, instances, most=1, absent=1)
    assert set(turns(record)) == {"traffic light"}
    assert json.loads(record["extra"])["kinds_left_out"] == {"more than 1": 1, "with a crowd": 1}


def test_broken_masks_and_sizes_drop_their_picture(tmp_path, instances):
    instances["annotations"] = [annotation(1, 1, 10, [[1, 2, 3]]), annotation(2, 2, 10, square(0))]
    instances["images"][1]["width"] = 61
    _, tally = read(tmp_path, instances)
    assert tally.dropped == {"mask not usable": 1, "picture of another size": 1}


def test_an_annotation_of_no_picture_stops_the_reading(tmp_path, instances):
    """With an annotation lost, the count of some picture is wrong and nothing says of which."""
    del instances["annotations"][1]["image_id"]
    with pytest.raises(DataError, match=r"row 1.*annotations.image_id.*fetch the file again"):
        read(tmp_path, instances)
