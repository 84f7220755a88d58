"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO in the layouts in which they are published."""

import collections
import json
import pickle
import random

import numpy as np
import pytest
from referring_samples import (
    HEIGHT,
    OTHER,
    WIDTH,
    annotation,
    box_of,
    file_name,
    jpeg,
    picture,
    read_all,
    ref,
    write_grefcoco,
    write_refer,
)
from test_sources_fuzz import spoilt

from perceptio.data.masks import area, decode_mask, encode_mask
from perceptio.data.record import DataError
from perceptio.data.sources.grefcoco import read_grefcoco
from perceptio.data.sources.refer import read_refer, refer_items
from perceptio.data.tally import Tally
from perceptio.data.validate import check_records

# refer


def test_one_record_per_picture_with_its_expressions_as_turns(tmp_path):
    refs = [
        ref(1, 581857, 11, "The lady with the blue shirt.", "lady  with back to us"),
        ref(2, 7, 12, "dog"),
        ref(3, 581857, 13, "left cup"),
    ]
    annotations = [annotation(11, 581857), annotation(12, 7, OTHER, 2), annotation(13, 581857, OTHER)]
    write_refer(tmp_path, refs, annotations, [picture(581857), picture(7)])
    records, tally = read_all(read_refer, tmp_path, 4)
    assert [record["id"] for record in records] == ["refcoco/unc/train/581857", "refcoco/unc/train/7"]
    first = records[0]
    assert first["image"]["bytes"] == (tmp_path / "images/mscoco/images/train2014" / file_name(581857)).read_bytes()
    assert [m["perception"] for m in first["messages"]] == [None, "seg"] * 3
    text = "\n".join(message["content"] for message in first["messages"])
    assert "the lady with the blue shirt" in text and "lady with back to us" in text and "left cup" in text
    turns = json.loads(first["extra"])["turns"]
    boxes = {"1": (8, 8, 23, 19), "3": (40, 16, 59, 43)}
    for turn, mask in zip(turns, first["masks"], strict=True):
        assert box_of(mask) == boxes[turn["ref"]] and turn["category"] == "cup"
    assert json.loads(records[1]["extra"])["turns"] == [{"ref": "2", "category": "dog"}]
    assert not tally.dropped


@pytest.mark.parametrize(
    "dataset, split_by, source",
    [("refcoco", "google", "refcoco/google"), ("refcoco+", None, "refcoco+/unc"), ("refcocog", None, "refcocog/umd")],
)
def test_the_other_sets_and_their_splits(tmp_path, dataset, split_by, source):
    published = split_by or source.split("/")[1]
    write_refer(tmp_path, [ref(1, 1, 1, "cup")], [annotation(1, 1)], [picture(1)], dataset, published)
    records, _ = read_all(read_refer, tmp_path, 1, dataset=dataset, split_by=split_by)
    assert records[0]["source"] == source


def test_only_the_split_is_read(tmp_path):
    splits = ["train", "val", "testA", "testB", "testAB", "val"]
    refs = [ref(n, 1, 1, f"cup {n}", split=split) for n, split in enumerate(splits)]
    write_refer(tmp_path, refs, [annotation(1, 1)], [picture(1)])
    counts = {"train": 1, "val": 2, "testA": 2, "testB": 2, "test": 3}
    assert {split: read_all(read_refer, tmp_path, n, split=split)[1].kept for split, n in counts.items()} == counts
    with pytest.raises(DataError, match="no entry of 'dev'; expected testA, testAB, testB, train, val"):
        read_all(read_refer, tmp_path, 0, split="dev")


DAMAGE = {
    "picture missing": lambda path: path.unlink(),
    "picture damaged": lambda path: path.write_bytes(path.read_bytes()[:-300]),
    "picture of another size": lambda path: path.write_bytes(jpeg((HEIGHT, WIDTH))),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_bad_picture_costs_its_expressions_and_no_others(tmp_path, reason):
    refs = [ref(1, 1, 11, "a", "b"), ref(2, 1, 11, "c"), ref(3, 2, 12, "d")]
    write_refer(tmp_path, refs, [annotation(11, 1), annotation(12, 2)], [picture(1), picture(2)])
    DAMAGE[reason](tmp_path / "images/mscoco/images/train2014" / file_name(1))
    records, tally = read_all(read_refer, tmp_path, 4)
    assert len(records) == 1 and tally.dropped == {reason: 3}


ODD_REFS = {
    "unknown annotation id": ref(1, 1, 99, "a"),
    "unknown image id": ref(1, 5, 11, "a"),
    "image id twice": ref(1, 3, 17, "a"),
    "annotation of another picture": ref(1, 1, 12, "a"),
    "annotation id twice": ref(1, 1, 13, "a"),
    "mask not usable": ref(1, 1, 14, "a"),
    "empty mask": ref(1, 1, 15, "a"),
    "picture of another size": ref(1, 2, 12, "a"),
    "path outside the folder": ref(1, 4, 16, "a"),
    "no sentence": ref(1, 1, 11),
    "sentence with control characters": ref(1, 1, 11, "the [SEG] cup"),
    "id that is no number": ref(1, 1, [11], "a"),
    "ref id twice": ref(0, 1, 11, "b"),
    "not an object": ["a list"],
}


@pytest.mark.parametrize("reason", ODD_REFS)
def test_what_cannot_be_used_is_counted_by_its_reason(tmp_path, reason):
    pictures = [picture(1), picture(2), {**picture(4), "file_name": "../../../../outside.jpg"}, picture(3)]
    pictures.append({**picture(3), "file_name": file_name(1)})
    annotations = [
        annotation(11, 1),
        annotation(12, 2),
        annotation(13, 1),
        annotation(13, 1, OTHER),
        annotation(14, 1, [[1, 2, 3]]),
        annotation(15, 1, [[-9, -9, -5, -9, -5, -5]]),
        annotation(16, 4),
        annotation(17, 3),
    ]
    write_refer(tmp_path, [ref(0, 1, 11, "good"), ODD_REFS[reason]], annotations, pictures)
    (tmp_path / "outside.jpg").write_bytes(jpeg())
    (tmp_path / "images/mscoco/images/train2014" / file_name(2)).write_bytes(jpeg((32, 32)))
    records, tally = read_all(read_refer, tmp_path, 2)
    assert len(records) == 1 and tally.dropped == {reason: 1}, tally


def test_sentences_without_a_word_and_repeated_ones_leave_the_others(tmp_path):
    sentences = ("left cup", "Left  cup.", ".", "", "cup at left")
    write_refer(tmp_path, [ref(1, 1, 1, *sentences)], [annotation(1, 1)], [picture(1)])
    records, tally = read_all(read_refer, tmp_path, 5)
    assert tally.kept == 2 and tally.dropped == {"sentence twice for one thing": 1, "no sentence": 2}


def test_two_equal_annotations_of_one_id_are_one(tmp_path):
    write_refer(tmp_path, [ref(1, 1, 1, "cup")], [annotation(1, 1), annotation(1, 1)], [picture(1)])
    assert read_all(read_refer, tmp_path, 1)[1].kept == 1


@pytest.mark.parametrize("compressed", [False, True])
def test_crowds_come_as_run_lengths(tmp_path, compressed):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[3:9, 5:11] = True
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat.astype(int))) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    rle = encode_mask(mask) if compressed else {"size": [HEIGHT, WIDTH], "counts": counts}
    write_refer(tmp_path, [ref(1, 1, 1, "crowd")], [annotation(1, 1, rle, iscrowd=1)], [picture(1)])
    records, _ = read_all(read_refer, tmp_path, 1)
    assert np.array_equal(decode_mask(records[0]["masks"][0]), mask)


@pytest.mark.parametrize("orientation, box", [(1, (8, 8, 23, 19)), (3, (40, 28, 55, 39)), (6, (28, 8, 39, 23))])
def test_a_mask_turns_with_its_picture(tmp_path, orientation, box):
    """COCO's masks lie on the stored pixels; 6 is a quarter clockwise, so that the left edge becomes the top."""
    write_refer(tmp_path, [ref(1, 1, 1, "cup")], [annotation(1, 1)], [picture(1)])
    path = tmp_path / "images/mscoco/images/train2014" / file_name(1)
    path.write_bytes(jpeg(orientation=orientation))
    records, _ = read_all(read_refer, tmp_path, 1)
    assert box_of(records[0]["masks"][0]) == box


def test_pictures_may_lie_elsewhere(tmp_path):
    write_refer(tmp_path, [ref(1, 1, 1, "cup")], [annotation(1, 1)], [picture(1)])
    (tmp_path / "images/mscoco/images/train2014").rename(tmp_path / "coco")
    with pytest.raises(DataError, match="train2014.*pass `images_dir`"):
        list(read_refer(tmp_path, tally=Tally()))
    for place in ("coco", str(tmp_path / "coco")):
        assert read_all(read_refer, tmp_path, 1, images_dir=place)[1].kept == 1


def test_unknown_sets_are_named(tmp_path):
    with pytest.raises(ValueError, match="'refclef', expected one of refcoco"):
        list(read_refer(tmp_path, tally=Tally(), dataset="refclef"))
    with pytest.raises(ValueError, match="`split_by` of refcoco\\+ is 'google', expected one of unc"):
        list(read_refer(tmp_path, tally=Tally(), dataset="refcoco+", split_by="google"))


def test_an_item_holds_all_expressions_of_its_picture(tmp_path):
    refs = [ref(n, 1, 1, *(f"{n} {k}" for k in range(3))) for n in range(4)]
    write_refer(tmp_path, refs, [annotation(1, 1)], [picture(1)])
    items = list(refer_items(tmp_path, tally=Tally()))
    assert [item.expressions() for item in items] == [12] and len(items[0].things) == 4


# gRefCOCO


def gref(number, image_id, annotations, *sentences, **more):
    return ref(number, image_id, annotations, *sentences, **{"no_target": annotations == [-1], **more})


def test_several_targets_are_one_mask_and_no_target_an_empty_one(tmp_path):
    refs = [gref(1, 1, [11, 12], "both cups"), gref(2, 1, [-1], "the elephant"), gref(3, 1, [12], "right cup")]
    write_grefcoco(tmp_path, refs, [annotation(11, 1), annotation(12, 1, OTHER)], [picture(1)])
    records, _ = read_all(read_grefcoco, tmp_path, 3)
    masks = {}
    for turn, mask in zip(json.loads(records[0]["extra"])["turns"], records[0]["masks"], strict=True):
        masks[turn["ref"]] = mask
        answer = records[0]["messages"][mask["turn"]]
        assert answer["perception"] == "seg"
        assert ("elephant" in answer["content"]) == (turn["ref"] == "2")
    assert area(masks["2"]) == 0 and masks["2"]["size"] == [HEIGHT, WIDTH]
    assert box_of(masks["1"]) == (8, 8, 59, 43) and area(masks["1"]) == 16 * 12 + 20 * 28
    assert box_of(masks["3"]) == (40, 16, 59, 43)


def test_one_kind_of_expression_alone(tmp_path):
    refs = [gref(1, 1, [11], "cup"), gref(2, 1, [-1], "dog", "cat"), gref(3, 2, [-1], "bird")]
    write_grefcoco(tmp_path, refs, [annotation(11, 1)], [picture(1), picture(2)])
    assert read_all(read_grefcoco, tmp_path, 1, only="targets")[1].kept == 1
    absent, _ = read_all(read_grefcoco, tmp_path, 3, only="no-target")
    assert len(absent) == 2 and {area(mask) for record in absent for mask in record["masks"]} == {0}
    with pytest.raises(ValueError, match="`only` is 'some'"):
        read_all(read_grefcoco, tmp_path, 0, only="some")


GREFS = {
    "target and no target": gref(1, 1, [-1], "a", no_target=False),
    "crowds alone": gref(1, 1, [12], "a"),
    "unknown annotation id": gref(1, 1, [11, 99], "a"),
}


@pytest.mark.parametrize("reason", GREFS)
def test_odd_entries_of_grefcoco_are_counted(tmp_path, reason):
    annotations = [annotation(11, 1), annotation(12, 1, {"size": [HEIGHT, WIDTH], "counts": [9, 3063]}, iscrowd=1)]
    write_grefcoco(tmp_path, [gref(0, 1, [11, 12], "good"), GREFS[reason]], annotations, [picture(1)])
    records, tally = read_all(read_grefcoco, tmp_path, 2)
    assert tally.dropped == {reason: 1} and box_of(records[0]["masks"][0]) == (8, 8, 23, 19)


def test_a_broken_file_of_grefcoco_is_named(tmp_path):
    write_grefcoco(tmp_path, [], [], [picture(1)])
    with pytest.raises(DataError, match="grefs.*list of 0; expected a list of expressions"):
        list(read_grefcoco(tmp_path, tally=Tally()))
    (tmp_path / "grefcoco/grefs(unc).json").write_text("[{")
    with pytest.raises(DataError, match="grefs.*not readable"):
        list(read_grefcoco(tmp_path, tally=Tally()))


# Files with anything in them


def _files(draw: random.Random) -> tuple[list, list, list]:
    """Expressions, annotations and pictures, of which one or two hold junk."""
    refs = [ref(1, 1, 11, "left cup", "cup"), ref(2, 2, 12, "dog"), ref(3, 1, 12, "of another picture")]
    content = {"refs": refs, "annotations": [annotation(11, 1), annotation(12, 2, OTHER)], "pictures": [picture(1)]}
    content["pictures"].append(picture(2))
    for _ in range(draw.choice((1, 2))):
        name = draw.choice(sorted(content))
        row = draw.randrange(len(content[name]))
        content[name][row] = spoilt(content[name][row], draw)
    return content["refs"], content["annotations"], content["pictures"]


@pytest.mark.parametrize("kind", ["refer", "grefcoco"])
def test_spoilt_files_are_read_or_named(tmp_path, kind):
    write_refer(tmp_path, [], [], [picture(1), picture(2)])
    draw = random.Random(kind)
    outcomes = collections.Counter()
    for _ in range(250):
        refs, annotations, pictures = _files(draw)
        instances = {"images": pictures, "annotations": annotations, "categories": [{"id": 1, "name": "cup"}]}
        folder = tmp_path / ("refcoco" if kind == "refer" else "grefcoco")
        folder.mkdir(exist_ok=True)
        (folder / "instances.json").write_text(json.dumps(instances))
        (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, 4))
        (folder / "grefs(unc).json").write_text(json.dumps(refs))
        tally = Tally(kind)
        try:
            records = list((read_refer if kind == "refer" else read_grefcoco)(tmp_path, tally=tally))
        except DataError as error:
            assert "refcoco" in str(error)
            outcomes["named"] += 1
            continue
        tally.check()
        assert tally.kept == sum(len(record["masks"]) for record in records)
        assert [problem for _, problems in check_records(records) for problem in problems] == []
        outcomes["kept" if tally.kept else "nothing kept"] += 1
        outcomes["dropped"] += bool(tally.dropped)
    assert outcomes["kept"] > 200 and outcomes["dropped"] > 200, outcomes
