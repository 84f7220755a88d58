"""GranD-f's four files in their published layouts."""

import json

import numpy as np
import pytest
from PIL import Image

from perceptio.data.masks import decode_mask, encode_mask
from perceptio.data.sources.grandf import PARTS, read_grandf
from perceptio.data.tally import Tally
from perceptio.data.validate import check_records

SIZE = (40, 60)  # height, width
CAPTION = "A brown dog sits beside a red ball on the grass."


def save(path, orientation=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.effect_noise(SIZE[::-1], 50).convert("RGB").save(path, "JPEG", exif=exif)


def box(top, left, bottom, right, size=SIZE) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


DOG, BALL, GRASS = box(5, 5, 20, 20), box(5, 30, 15, 45), box(25, 0, 40, 60)


def span(phrase, caption=CAPTION):
    return [caption.index(phrase), caption.index(phrase) + len(phrase)]


def grounding(phrase, *masks, caption=CAPTION):
    return {"token_positives": span(phrase, caption), "rle_masks": [encode_mask(mask) for mask in masks]}


def read(root, part, content, **options):
    path = root / "GranDf/annotations/train" / PARTS[part].file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    tally = Tally(part)
    records = list(read_grandf(root, tally=tally, part=part, **options))
    tally.check(len(content["images"]) if isinstance(content, dict) else len(content))
    assert [problem for _, problems in check_records(records) for problem in problems] == []
    assert len(records) == tally.kept
    return records, tally


def row(groundings, caption=CAPTION, name="sa_1.jpg"):
    return {"file_name": name, "height": SIZE[0], "width": SIZE[1], "caption": caption, "groundings": groundings}


@pytest.fixture
def root(tmp_path):
    for part in PARTS.values():
        save(tmp_path / part.images / "sa_1.jpg")
    return tmp_path


@pytest.mark.parametrize("part", ["granddf_ha", "openpsg"])
def test_each_phrase_has_its_mask_and_the_first_opens_the_answer(root, part):
    """The published order is by phrase name; the order of the [SEG]s is that of the text."""
    groundings = {
        "the grass": grounding("the grass", GRASS),
        "a red ball": grounding("a red ball", BALL),
        "A brown dog": grounding("A brown dog", DOG),
    }
    (record,), _ = read(root, part, [row(groundings, caption=f'"{CAPTION}"')])
    question, answer = record["messages"]
    assert answer == {"role": "assistant", "content": CAPTION, "perception": "seg"}
    assert "mask" in question["content"] or "segment" in question["content"]
    ends = [-1, CAPTION.index(" on"), CAPTION.index(".")]
    assert [mask["offset"] for mask in record["masks"]] == ends
    for mask, expected in zip(record["masks"], (DOG, BALL, GRASS), strict=True):
        assert np.array_equal(decode_mask(mask), expected)


def test_several_masks_of_one_phrase_are_united(root):
    (record,), _ = read(root, "granddf_ha", [row({"A brown dog": grounding("A brown dog", DOG, BALL)})])
    assert np.array_equal(decode_mask(record["masks"][0]), DOG | BALL)


def test_a_caption_that_ends_with_a_phrase_gets_a_full_stop(root):
    """A [SEG] stands before a character of the text, so that none can stand at its end."""
    caption = "A brown dog beside a red ball"
    groundings = {phrase: grounding(phrase, DOG, caption=caption) for phrase in ("A brown dog", "a red ball")}
    (record,), _ = read(root, "granddf_ha", [row(groundings, caption)])
    text = record["messages"][1]["content"]
    assert text == caption + "." and record["masks"][1]["offset"] == len(caption)


def test_of_two_phrases_with_one_end_the_longer_counts(root):
    groundings = {
        "red ball": grounding("red ball", DOG),
        "a red ball": grounding("a red ball", BALL),
        "A brown dog": grounding("A brown dog", DOG),
    }
    (record,), _ = read(root, "granddf_ha", [row(groundings)])
    assert np.array_equal(decode_mask(record["masks"][1]), BALL)
    assert json.loads(record["extra"]) == {"phrases": 2, "phrases_left_out": 1}


def test_a_mask_is_not_given_to_other_words_than_its_phrase(root):
    groundings = {"A brown dog": grounding("a red ball", DOG), "the grass": grounding("the grass", GRASS)}
    (record,), _ = read(root, "granddf_ha", [row(groundings)])
    assert json.loads(record["extra"]) == {"phrases": 1, "phrases_left_out": 1}
    assert np.array_equal(decode_mask(record["masks"][0]), GRASS)


def test_broken_rows_are_dropped_by_reason(root):
    good = {"A brown dog": grounding("A brown dog", DOG)}
    outside = {"A brown dog": {**good["A brown dog"], "token_positives": [0, 500]}}
    small = {"A brown dog": grounding("A brown dog", box(0, 0, 5, 5, (20, 30)))}
    cut = {"A brown dog": {"token_positives": span("A brown dog"), "rle_masks": [{"size": SIZE, "counts": "0"}]}}
    rows = [
        row(good),
        row({}),
        row(outside),
        row(small),
        row(cut),
        row(good, caption='""'),
        row(good, name="none.jpg"),
        row(good, name="../../../etc/passwd"),
        {**row(good), "height": 41},
        [],
    ]
    records, tally = read(root, "granddf_ha", rows)
    assert tally.dropped == {
        "no grounded phrase": 1,
        "a phrase outside the caption": 1,
        "mask not usable": 2,
        "no caption": 1,
        "picture missing": 1,
        "path outside the folder": 1,
        "picture of another size": 1,
        "not an object": 1,
    }
    assert len(records) == 1


def test_masks_turn_with_a_picture_that_is_shown_turned(root):
    """The annotations are drawn on the stored pixels; the record's masks lie on the picture as a person sees it."""
    save(root / PARTS["granddf_ha"].images / "turned.jpg", orientation=6)
    rows = [row({"A brown dog": grounding("A brown dog", DOG)}, name="turned.jpg")]
    (record,), _ = read(root, "granddf_ha", rows)
    assert np.array_equal(decode_mask(record["masks"][0]), np.rot90(DOG, -1))


def test_refcocog_finds_its_phrases_in_the_caption(root):
    """Its sentences are in lower case and without positions; those that the caption has not are counted."""
    polygon = [[5, 5, 20, 5, 20, 20, 5, 20]]
    refs = [
        {"sentence": "a red ball", "segmentation": polygon},
        {"sentence": "a brown dog", "segmentation": polygon},
        {"sentence": "the man", "segmentation": polygon},
    ]
    rows = [
        {"123": {"img_file_name": "sa_1.jpg", "caption": CAPTION, "refs": refs}},
        {"124": {"img_file_name": "sa_1.jpg", "caption": CAPTION, "refs": refs[2:]}},
        {},
    ]
    records, tally = read(root, "refcocog", rows)
    assert tally.dropped == {"no grounded phrase": 1, "not an object": 1}
    assert [mask["offset"] for mask in records[0]["masks"]] == [-1, CAPTION.index(" on")]
    assert np.array_equal(decode_mask(records[0]["masks"][0]), box(5, 5, 20, 20))
    assert json.loads(records[0]["extra"])["phrases_left_out"] == 1


def flickr_annotation(number, image, phrase, mask, **changes):
    entry = {"id": number, "image_id": image, "bbox": [5, 5, 10, 10], "area": 100, "iscrowd": 0, "category_id": 1}
    return {**entry, "tokens_positive": [span(phrase)], "sam_mask": encode_mask(mask), **changes}


def test_flickr_joins_captions_and_annotations(root):
    """Each image entry is one caption of a picture; several boxes of one phrase are one mask."""
    image = {"file_name": "sa_1.jpg", "height": SIZE[0], "width": SIZE[1], "caption": CAPTION}
    content = {
        "info": [],
        "images": [
            {**image, "id": 7},
            {**image, "id": 8, "caption": "a dog"},
            {**image, "id": 9, "height": 20},
            {**image, "id": 10},
        ],
        "annotations": [
            flickr_annotation(1, 7, "the grass", GRASS),
            flickr_annotation(2, 7, "A brown dog", DOG),
            flickr_annotation(3, 7, "A brown dog", BALL),
            flickr_annotation(4, 7, "a red ball", BALL, bbox=[500, 5, 10, 10]),
            flickr_annotation(5, 10, "a red ball", BALL, ignore=True),
        ],
        "categories": [{"id": 1, "name": "object"}],
    }
    (record,), tally = read(root, "flickr", content)
    assert tally.dropped == {
        "caption of fewer than three words": 1,
        "picture of fewer than 32 pixels a side": 1,
        "no grounded phrase": 1,
    }
    assert [mask["offset"] for mask in record["masks"]] == [-1, len(CAPTION) - 1]
    assert np.array_equal(decode_mask(record["masks"][0]), DOG | BALL)


def test_an_unknown_part_is_named(root):
    with pytest.raises(ValueError, match="`part` is 'granddf', expected one of granddf_ha, openpsg, refcocog, flickr"):
        list(read_grandf(root, tally=Tally(), part="granddf"))
