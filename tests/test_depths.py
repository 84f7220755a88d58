"""Depth maps: what goes into a file comes out of it, and what is no depth map is refused in words."""

import struct
import sys
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import OpenEXR
import pytest
from PIL import Image

from perceptio.data.depths import (
    DepthError,
    Scale,
    decode_depth,
    encode_depth,
    normalise,
    normalise_with_scale,
    read_depth,
    read_values,
)


def saved(values, kind="PNG") -> bytes:
    file = BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


def as_npy(values, **kwargs) -> bytes:
    file = BytesIO()
    np.save(file, values, **kwargs)
    return file.getvalue()


def as_exr(**channels) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "depth.exr"
        header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
        OpenEXR.File(header, channels).write(str(path))
        return path.read_bytes()


def in_metres(height: int = 10, width: int = 20) -> np.ndarray:
    return np.linspace(1, 10, height * width, dtype=np.float32).reshape(height, width)


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


def test_metres_in_every_form_and_unit_agree():
    metres, colour = in_metres(), np.random.default_rng(0).random((10, 20, 3)).astype(np.float32)
    millimetres = np.rint(metres * 1000).astype(np.uint16)
    forms = [
        (as_npy(metres.astype(np.float64)), 1),
        (saved(metres, "TIFF"), 1),
        (saved(millimetres), 0.001),
        (saved(millimetres, "TIFF"), 0.001),
        (as_npy(metres / 1000), 1000),
        (as_exr(Z=metres), 1),
        (as_exr(Z=metres, RGB=colour), 1),
        (as_exr(Y=metres), 1),
        (as_exr(R=metres), 1),
        (as_exr(distance=metres), 1),
        (as_exr(RGB=np.stack([metres] * 3, -1)), 1),
        (as_exr(RGBA=np.stack([metres, metres, metres, np.ones_like(metres)], -1)), 1),
    ]
    expected = normalise(1 / metres.astype(np.float64))
    for data, unit in forms:
        values = read_values(data, kind="metres", unit=unit)
        assert values.dtype == np.float64 and np.abs(values - metres).max() < 6e-4
        assert np.abs(read_depth(data, kind="metres", unit=unit) - expected).max() < 2e-3
    half = read_values(as_exr(Z=metres.astype(np.float16)), kind="metres")
    assert np.abs(half / metres - 1).max() < 1e-3


def test_holes_and_constants_in_openexr():
    holed = in_metres()
    holed[0, :3], holed[1, 0] = np.nan, 0
    found = read_depth(as_exr(Z=holed), kind="metres")
    assert np.isnan(found).sum() == 4 and np.isnan(found[0, :3]).all() and np.isnan(found[1, 0])
    assert (read_depth(as_exr(Z=np.full((4, 4), 3, np.float32)), kind="metres") == 0).all()
    with pytest.raises(DepthError, match="no valid value"):
        read_depth(as_exr(Z=np.full((4, 4), np.nan, np.float32)), kind="metres")
    with pytest.raises(DepthError, match="infinite"):
        read_depth(as_exr(Z=np.where(holed > 8, np.inf, holed).astype(np.float32)), kind="metres")


@pytest.mark.parametrize("length", [4, 50, 200, 0.5, -3])
def test_a_cut_openexr_file_is_refused(length):
    data = as_exr(Z=np.tile(in_metres(), (8, 8)))
    length = int(length * len(data)) if 0 < length < 1 else length
    with pytest.raises(DepthError, match="the lidar is a damaged OpenEXR file"):
        read_values(data[:length], "the lidar", "metres")


def test_nothing_is_read_of_an_openexr_file_that_promises_too_much():
    data = as_exr(Z=in_metres())
    start = data.index(b"dataWindow\0box2i\0") + len(b"dataWindow\0box2i\0") + 4
    bomb = data[:start] + struct.pack("<4i", 0, 0, 19999, 9999) + data[start + 16 :]
    with pytest.raises(DepthError, match="20000 × 10000 pixels, expected at most 64000000"):
        read_values(bomb, kind="metres")


def test_channels_that_leave_a_choice_are_named():
    with pytest.raises(DepthError, match="has the channels far, near, expected Z, Y, R or one alone"):
        read_values(as_exr(near=in_metres(), far=in_metres()))
    with pytest.raises(DepthError, match="expected .H, W.: save one channel"):
        read_values(as_exr(RGB=np.random.default_rng(0).random((4, 4, 3)).astype(np.float32)))


def test_without_the_library_the_extra_is_named(monkeypatch):
    data = as_exr(Z=in_metres())
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(DepthError, match=r'pip install "perceptio\[label\]"'):
        read_values(data, kind="metres")


@pytest.mark.parametrize("unit", [0, -1, float("nan"), float("inf"), "mm", None])
def test_a_unit_is_a_number_above_zero(unit):
    with pytest.raises(DepthError, match="`unit` of the depth map is .* expected a number above 0"):
        read_values(as_npy(in_metres()), kind="metres", unit=unit)


def test_a_kind_that_is_none_is_refused_before_zeros_are_taken_for_depth():
    with pytest.raises(DepthError, match="the kind of depth is 'meters', expected one of inverse, metres"):
        read_values(as_npy(in_metres()), kind="meters")


@pytest.mark.parametrize("kind", ["inverse", "metres"])
def test_a_scale_gives_back_what_was_measured(kind):
    values = in_metres().astype(np.float64)
    values[2, 3] = np.nan
    depth, scale = normalise_with_scale(values, kind, 0, 100)
    assert scale.kind == kind and np.array_equal(depth, normalise(values, kind, 0, 100), equal_nan=True)
    back = scale.undo(decode_depth(encode_depth(depth)))
    assert np.isnan(back[2, 3]) and np.nanmax(np.abs(back / values - 1)) < 1e-4


def test_the_scale_of_a_constant_map_and_of_none():
    depth, scale = normalise_with_scale(np.full((3, 3), 4.0), "metres")
    assert scale == Scale(0.25, 0.25, "metres") and (scale.undo(depth) == 4).all()
    assert normalise_with_scale(np.full((3, 3), np.nan))[1] is None
