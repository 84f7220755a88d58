"""Pictures: seen as a person sees them, whatever holds them; what is none is refused by name, and costs no memory."""

import base64
import io
import os
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perceptio.processing_perceptio import PictureError, load_picture

PIXELS = np.random.RandomState(0).randint(0, 255, (30, 50, 3), dtype=np.uint8)
PHOTO = Image.fromarray(PIXELS)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encoded(PHOTO)


def first_row(source) -> list[int]:
    return np.asarray(load_picture(source))[0, :, 0].tolist()


@pytest.mark.parametrize("way", ["path", "Path", "bytes", "bytearray", "base64", "data", "file", "PIL", "HWC", "CHW",
                                 "torch", "torch CHW", "float"])  # fmt: skip
def test_one_picture_is_the_same_however_it_is_handed_over(way, tmp_path):
    path = tmp_path / "a photo, ünïcödé.png"
    path.write_bytes(PNG)
    source = {
        "path": str(path),
        "Path": path,
        "bytes": PNG,
        "bytearray": bytearray(PNG),
        "base64": base64.b64encode(PNG).decode(),
        "data": "data:image/png;base64," + base64.b64encode(PNG).decode(),
        "file": io.BytesIO(PNG),
        "PIL": PHOTO,
        "HWC": PIXELS,
        "CHW": PIXELS.transpose(2, 0, 1),
        "torch": torch.tensor(PIXELS),
        "torch CHW": torch.tensor(PIXELS).permute(2, 0, 1),
        "float": PIXELS.astype(np.float32) / 255,
    }[way]
    assert np.array_equal(np.asarray(load_picture(source)), PIXELS)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_modes_become_rgb_and_keep_their_look(mode):
    """Against PIL's own conversion of the same pixels, which is right for opaque pictures of eight bits."""
    image = PHOTO.convert(mode)
    loaded = load_picture(encoded(image, "TIFF"))
    assert loaded.mode == "RGB" and np.array_equal(np.asarray(loaded), np.asarray(image.convert("RGB")))


def _palette_with_hole() -> bytes:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0] * 256)
    return encoded(image, transparency=0)


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0))),
        encoded(Image.new("LA", (4, 4), (0, 0))),
        _palette_with_hole(),
        encoded(Image.new("RGB", (4, 4), (9, 9, 9)), transparency=(9, 9, 9)),
    ],
    ids=["RGBA", "LA", "palette", "RGB with a transparent colour"],
)
def test_transparency_is_laid_on_white(data):
    """By default the colour under the alpha shows: a transparent black logo becomes a black square."""
    assert np.asarray(load_picture(data)).min() == 255


@pytest.mark.parametrize("as_object", [False, True])
def test_exif_rotation_is_applied_also_to_pil_objects(as_object):
    """The library rotates what it loads itself, and not what it is handed: masks then fit one of the two only."""
    exif = Image.Exif()
    exif[274] = 6
    data = encoded(PHOTO, "JPEG", exif=exif)
    assert load_picture(Image.open(io.BytesIO(data)) if as_object else data).size == (30, 50)


def test_broken_exif_does_not_lose_the_picture():
    exif = Image.Exif()
    exif[274] = 6
    data = encoded(PHOTO, "JPEG", exif=exif).replace(b"Exif\0\0MM\0*", b"Exif\0\0MM\0\xff")
    assert sorted(load_picture(data).size) == [30, 50]


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(load_picture(data))[0, 0].tolist() == [255, 0, 0]


SIXTEEN = np.array([[0, 257, 65535, 32896]], np.uint16)


@pytest.mark.parametrize(
    "source",
    [encoded(Image.fromarray(SIXTEEN)), encoded(Image.fromarray(SIXTEEN), "TIFF"), Image.fromarray(SIXTEEN), SIXTEEN,
     Image.fromarray(SIXTEEN).convert("I")],
    ids=["PNG", "TIFF", "PIL", "array", "mode I"],
)  # fmt: skip
def test_sixteen_bits_are_scaled(source):
    """The libraries' default saturates 99% of such a picture at white."""
    assert first_row(source) == [0, 1, 255, 128]


def test_floats_from_0_to_1_are_scaled():
    values = np.array([[0.0, 0.5, 1.0]], np.float32)
    assert first_row(values) == first_row(Image.fromarray(values)) == [0, 128, 255]
    assert load_picture(torch.rand(3, 8, 9).bfloat16()).size == (9, 8)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (PIXELS.astype(float), ["254"]),
        (np.full((3, 3), np.nan), ["NaN"]),
        (np.full((3, 3), np.inf), ["infinite"]),
        (-PIXELS.astype(np.float32) / 255, ["-"]),
        (np.array([[0, 300]], np.int32), ["300", "255"]),
        (np.zeros((3, 9, 3), np.uint8), ["(3, 9, 3)"]),
        (np.zeros((9, 9, 2), np.uint8), ["(9, 9, 2)"]),
        (np.zeros((1, 2, 9, 9, 3), np.uint8), ["shape"]),
        (np.zeros((0, 9, 3), np.uint8), ["0"]),
        (np.array([["a"]]), ["type"]),
    ],
    ids=["0 to 255 as float", "NaN", "infinite", "negative", "whole beyond 255", "3 x H x 3", "two channels",
         "five axes", "empty", "text"],
)  # fmt: skip
def test_an_ambiguous_array_is_refused_and_told_what_was_found(array, words):
    with pytest.raises(PictureError) as caught:
        load_picture(array)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (32767, 1)])
def test_extreme_shapes_work(size):
    assert load_picture(Image.new("RGB", size)).size == size
    assert load_picture(np.zeros((size[1], size[0], 3), np.uint8)).size == size


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(PictureError, match="0"):
        load_picture(Image.new("RGB", (0, 5)))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that promises width × height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 12_000, 20_000])
@pytest.mark.parametrize("filter_", ["default", "error"])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side, filter_):
    """Pillow only warns up to 179 megapixels, and then a file of 18 kB takes 432 MB."""
    with warnings.catch_warnings():
        warnings.simplefilter(filter_)
        with pytest.raises(PictureError, match="64000000.*max_pixels"):
            load_picture(bomb(side, side))


def test_the_limit_can_be_raised_and_lowered():
    assert load_picture(PHOTO, max_pixels=1500).size == (50, 30)
    with pytest.raises(PictureError, match="1499"):
        load_picture(PHOTO, max_pixels=1499)


BROKEN = {
    "cut JPEG": encoded(PHOTO, "JPEG")[:600],
    "cut PNG": PNG[: len(PNG) // 2],
    "empty": b"",
    "text": b"hello world",
    "an error page": b"<html><body>404</body></html>",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "a format that nobody needs": b"8BPS\0\1" + b"\0" * 50,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_picture_is_named(kind, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(PictureError, match="photo.jpg"):
        load_picture(path)
    with pytest.raises(PictureError):
        load_picture(BROKEN[kind])


def test_only_regular_files_are_opened(tmp_path):
    """A FIFO would wait for ever and a device never end."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(PictureError, match="regular"):
            load_picture(path)


@pytest.mark.parametrize(
    "source",
    ["/no/such.png", "x" * 300 + ".png", "a\0b.png", "A" * 64, "data:text/html,<b>", None, 3, "file:///etc/passwd"],
)
def test_other_sources_get_one_clear_error(source):
    with pytest.raises(PictureError):
        load_picture(source)


@pytest.mark.parametrize("address", ["http://127.0.0.1/x.png", "HTTPS://example.org/y"])
def test_addresses_are_fetched_only_when_asked(address):
    with pytest.raises(PictureError, match="allow_urls"):
        load_picture(address)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {"progressive": True}), ("JPEG", {"icc_profile": b"junk" * 40}), ("WEBP", {}), ("BMP", {}),
     ("TIFF", {"compression": "tiff_lzw"}), ("GIF", {})],
)  # fmt: skip
def test_common_files_open(kind, options):
    assert load_picture(encoded(PHOTO, kind, **options)).size == (50, 30)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_mutated_files_give_a_picture_or_the_one_error(kind):
    chance = random.Random(kind)
    source = encoded(PHOTO if kind != "GIF" else PHOTO.convert("P"), kind)
    opened = 0
    for _ in range(60):
        data = bytearray(source)
        for _ in range(chance.choice((1, 3, 20))):
            data[chance.randrange(min(len(data), chance.choice((60, len(data)))))] = chance.randrange(256)
        if chance.random() < 0.2:
            data = data[: chance.randrange(1, len(data))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load_picture(bytes(data), max_pixels=1_000_000)
                opened += 1
            except PictureError:
                continue
    assert opened < 60
