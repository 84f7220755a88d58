"""Masks: every form in, one form out, and nothing unchecked reaches the C library."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from perceptio.data.masks import (
    MaskError,
    area,
    check_rle,
    decode_mask,
    encode_mask,
    merge,
    rle_from_coco,
    rle_from_picture,
    transpose,
)


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31 - 1), st.floats(0, 1))
def test_decode_inverts_encode_and_the_area_is_counted_without_decoding(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    rle = encode_mask(mask)
    assert np.array_equal(decode_mask(rle), mask)
    assert area(rle) == mask.sum() == coco.area({**rle, "counts": rle["counts"].encode()})


@settings(max_examples=300)
@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=130), max_size=30))
def test_any_text_as_run_lengths_is_read_or_refused(counts):
    try:
        found = check_rle([9, 7], counts)
    except MaskError:
        return
    mask = decode_mask({"size": [9, 7], "counts": counts})
    assert mask.shape == (9, 7) and mask.sum() == found


@pytest.mark.parametrize(
    "size, counts, says",
    [
        ([4, 4], "", "run lengths"),
        ([4, 4], None, "run lengths"),
        ([4, 4], "4", "cover 4 pixels"),
        ([4, 4], "P", "cut off"),
        ([4, 4], "\x01", "character"),
        ([4, 4], "o" * 20, "40 bits"),
        ([0, 4], "0", "at least 1"),
        ([4], "0", "size of the mask"),
        ([2**20, 2**20], "0", "at most"),
        ([4.5, 4], "0", "size of the mask"),
        ("44", "`0", "size of the mask"),
    ],
)
def test_wrong_run_lengths_are_named(size, counts, says):
    with pytest.raises(MaskError, match=says):
        check_rle(size, counts)


def test_a_mask_of_another_size_names_both():
    rle = encode_mask(np.ones((4, 6), bool))
    with pytest.raises(MaskError, match=r"6 × 4 pixels, expected the picture's 4 × 6"):
        check_rle(rle["size"], rle["counts"], (6, 4))


def test_the_three_forms_of_coco_agree():
    mask = np.zeros((12, 10), bool)
    mask[3:9, 2:7] = True
    rle = encode_mask(mask)
    flat = mask.T.ravel()
    runs = [len(list(group)) for _, group in itertools.groupby(flat)]
    assert rle_from_coco({"size": [12, 10], "counts": runs}, (12, 10)) == rle
    assert rle_from_coco(rle, (12, 10)) == rle
    assert rle_from_coco({**rle, "counts": rle["counts"].encode()}, (12, 10)) == rle
    square = [2, 3, 7, 3, 7, 9, 2, 9]
    for polygons in ([square], square, [[[2, 3], [7, 3], [7, 9], [2, 9]]]):
        assert rle_from_coco(polygons, (12, 10)) == rle


def test_polygons_in_either_direction_and_beyond_the_edge_fill_the_same_pixels():
    there = [[-5, -5, 6, -5, 6, 6, -5, 6]]
    back = [[-5, 6, 6, 6, 6, -5, -5, -5]]
    mask = decode_mask(rle_from_coco(there, (12, 10)))
    assert np.array_equal(mask, decode_mask(rle_from_coco(back, (12, 10))))
    assert mask[:6, :6].all() and not mask[7:].any() and not mask[:, 7:].any()


@pytest.mark.parametrize(
    "segmentation, says",
    [
        ([], "polygons"),
        (None, "polygons"),
        ("abc", "polygons"),
        ([[1, 2, 3, 4]], "three points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "even number"),
        ([[1, 2, 3, 4, 5, float("nan")]], "numbers"),
        ([[1, 2, 3, 4, 5, "6"]], "numbers"),
        ([[1, 2, 3, 4, 5, 1e300]], "pixels"),
        ([[]], "three points"),
        ({"size": [12, 10], "counts": [5, -1, 116]}, "at least 0"),
        ({"size": [12, 10], "counts": [5, 1]}, "cover 6 pixels"),
        ({"size": [10, 12], "counts": [120]}, "expected the picture's"),
        ({"size": 5, "counts": [120]}, "expected the picture's"),
        ({"counts": "0"}, "size of the mask"),
    ],
)
def test_wrong_segmentations_are_named(segmentation, says):
    with pytest.raises(MaskError, match=says):
        rle_from_coco(segmentation, (12, 10))


def drawn(values, mode=None) -> Image.Image:
    return Image.fromarray(np.asarray(values, np.uint8), mode)


SHAPE = np.zeros((6, 8), np.uint8)
SHAPE[2:4, 3:6] = 1


@pytest.mark.parametrize("scale", [1, 255, 77])
def test_two_values_are_a_mask_whatever_they_are(scale):
    assert np.array_equal(decode_mask(rle_from_picture(drawn(SHAPE * scale), (6, 8))), SHAPE == 1)


def test_palette_one_bit_rgb_and_soft_edges():
    palette = drawn(SHAPE, "P")
    palette.putpalette([0, 0, 0, 200, 30, 30])
    soft = SHAPE.astype(np.uint8) * 255
    soft[1, 3], soft[1, 4] = 127, 128
    expected = SHAPE == 1
    for picture in (palette, drawn(SHAPE * 255).convert("1"), drawn(SHAPE * 255).convert("RGB")):
        assert np.array_equal(decode_mask(rle_from_picture(picture)), expected)
    edge = expected.copy()
    edge[1, 4] = True
    assert np.array_equal(decode_mask(rle_from_picture(drawn(soft))), edge)


def test_a_picture_of_several_things_or_colours_or_another_size_is_refused():
    many = SHAPE.copy()
    many[0, 0] = 2
    coloured = np.zeros((6, 8, 3), np.uint8)
    coloured[2:4, 3:6, 0] = 255
    palette = drawn(many, "P")
    palette.putpalette([0, 0, 0, 200, 30, 30, 30, 30, 200])
    for picture, says in (
        (drawn(many), "numbered things"),
        (palette, "2 things"),
        (drawn(coloured), "colours"),
        (b"no picture", "no picture"),
    ):
        with pytest.raises(MaskError, match=says):
            rle_from_picture(picture)
    with pytest.raises(MaskError, match="8 × 6 pixels, expected the picture's 6 × 8"):
        rle_from_picture(drawn(SHAPE), (8, 6))


def test_merge_is_the_union_of_one_size():
    left, right = np.zeros((5, 5), bool), np.zeros((5, 5), bool)
    left[:2], right[:, :2] = True, True
    assert np.array_equal(decode_mask(merge([encode_mask(left), encode_mask(right)])), left | right)
    with pytest.raises(MaskError, match="sizes"):
        merge([encode_mask(left), encode_mask(np.ones((4, 5), bool))])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_turns_as_pillow_turns_its_picture(orientation, tmp_path):
    """A mask drawn on the stored pixels must fall on the same thing when the picture is shown upright."""
    from PIL import ImageOps

    picture = drawn(SHAPE * 255)
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as stored:
        shown = np.asarray(ImageOps.exif_transpose(stored)) > 0
    assert np.array_equal(decode_mask(transpose(encode_mask(SHAPE == 1), orientation)), shown)
