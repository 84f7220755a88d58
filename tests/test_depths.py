"""Depth maps: what goes into a file comes out of it, and what is no depth map is refused in words."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from perceptio.data.depths import DepthError, decode_depth, encode_depth, normalise, read_depth


def saved(values, kind="PNG") -> bytes:
    file = BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


def as_npy(values, **kwargs) -> bytes:
    file = BytesIO()
    np.save(file, values, **kwargs)
    return file.getvalue()


def test_a_map_survives_its_file_to_half_a_step_and_so_do_its_holes():
    depth = np.random.default_rng(0).random((31, 17)).astype(np.float32)
    depth[3, 4], depth[0, 0], depth[1, 1] = np.nan, 0, 1
    back = decode_depth(encode_depth(depth))
    assert np.isnan(back[3, 4]) and np.isnan(back).sum() == 1
    assert back[0, 0] == 0 and back[1, 1] == 1
    assert np.nanmax(np.abs(back - depth)) <= 0.5 / 65534 + 1e-7
    assert encode_depth(back) == encode_depth(depth)


@pytest.mark.parametrize(
    "depth, says",
    [
        (np.full((3, 3), 1.5), "normalise"),
        (np.full((3, 3), -0.1), "normalise"),
        (np.zeros((3, 3, 1)), "shape"),
        (np.full((2, 2), np.inf), "normalise"),
    ],
)
def test_what_is_not_scaled_is_not_written(depth, says):
    with pytest.raises(DepthError, match=says):
        encode_depth(depth)


def test_metres_and_inverse_depth_of_one_scene_agree():
    metres = np.linspace(1, 10, 200).reshape(10, 20)
    from_metres = read_depth(as_npy(metres), kind="metres")
    from_inverse = read_depth(as_npy(1 / metres), kind="inverse")
    assert np.allclose(from_metres, from_inverse, atol=1e-6)
    assert from_metres[0, 0] == 1 and from_metres[-1, -1] == 0 and (np.diff(from_metres.ravel()) <= 0).all()


def test_one_wild_pixel_does_not_squeeze_the_rest():
    values = np.linspace(0, 1, 1000).reshape(20, 50)
    wild = values.copy()
    wild[0, 0] = 1e6
    assert np.abs(normalise(values)[1:] - normalise(wild)[1:]).max() < 0.01


def test_constant_two_valued_and_partly_invalid_maps():
    assert (normalise(np.full((4, 4), 7.0)) == 0).all()
    two = np.zeros((10, 10))
    two[0, 0] = 5  # the percentiles coincide, the extremes do not
    assert normalise(two)[0, 0] == 1 and normalise(two)[1, 1] == 0
    holes = np.array([[np.nan, 1.0], [2.0, 3.0]])
    assert np.isnan(normalise(holes)[0, 0]) and np.isfinite(normalise(holes)).sum() == 3
    assert np.isnan(normalise(np.full((2, 2), np.nan))).all()


def test_every_kind_of_file_gives_the_same_map():
    ramp = np.arange(1, 201, dtype=np.uint8).reshape(10, 20)
    expected = read_depth(as_npy(ramp.astype(np.float32)))
    sixteen = ramp.astype(np.uint16) * 256
    for data in (saved(ramp), saved(sixteen), saved(ramp.astype(np.float32), "TIFF"), as_npy(sixteen[..., None])):
        assert np.allclose(read_depth(data), expected, atol=1e-6)


def test_zero_is_a_hole_in_pictures_and_in_metres_but_not_in_floats_of_inverse_depth():
    values = np.array([[0, 10], [20, 30]])
    assert np.isnan(read_depth(saved(values.astype(np.uint16)))[0, 0])
    assert np.isnan(read_depth(as_npy(values.astype(np.float32)), kind="metres")[0, 0])
    assert read_depth(as_npy(values.astype(np.float32)))[0, 0] == 0


@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "no depth map"),
        (b"\x93NUMPY\x01\x00", "no depth map"),
        (as_npy(np.array([{"a": 1}], object), allow_pickle=True), "can run code"),
        (as_npy(np.zeros((2, 3, 4))), "shape"),
        (as_npy(np.array([["a"]])), "type"),
        (as_npy(np.array([[np.inf, 1.0]])), "infinite"),
        (as_npy(np.array([[-1.0, 1.0]])), "negative"),
        (as_npy(np.array([[np.nan, np.nan]])), "no valid value"),
        (saved(np.zeros((4, 4), np.uint16)), "no valid value"),
        (saved(np.zeros((4, 4, 3), np.uint8)), "coloured"),
        (saved(np.arange(1, 17, dtype=np.uint16).reshape(4, 4))[:48], "no depth map"),
    ],
)
def test_what_is_no_depth_map_is_refused_in_words(data, says):
    with pytest.raises(DepthError, match=says):
        read_depth(data)


def test_a_header_that_promises_a_giant_array_reserves_nothing():
    header = as_npy(np.zeros((2, 2)))
    with pytest.raises(DepthError, match="at most"):
        read_depth(header.replace(b"(2, 2)", b"(99999, 99999)") + b"")
