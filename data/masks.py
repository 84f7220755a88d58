"""Masks in and out of COCO's run lengths: pictures, polygons and run lengths of any kind, checked before use."""

from io import BytesIO

import numpy as np
from PIL import Image

from ..extras import extra

with extra("data", "masks need"):
    from pycocotools import mask as coco

MAX_MASK_PIXELS = 64_000_000
MASK_THRESHOLD = 128  # of a soft edge, out of 255


class MaskError(ValueError):
    """A mask that cannot be read as one."""


def encode_mask(mask: np.ndarray) -> dict:
    """bool[H, W] → {"size": [H, W], "counts": str}."""
    if mask.ndim != 2:
        raise MaskError(f"the mask has shape {mask.shape}, expected [H, W]: pass one mask at a time")
    return _plain(coco.encode(np.asfortranarray(mask, dtype=np.uint8)))


def decode_mask(rle: dict) -> np.ndarray:
    """{"size", "counts"} → bool[H, W]."""
    check_rle(rle["size"], rle["counts"])
    encoded = {"size": list(rle["size"]), "counts": rle["counts"].encode("ascii")}
    return np.asarray(coco.decode(encoded), bool)


def area(rle: dict) -> int:
    return check_rle(rle["size"], rle["counts"])


def check_rle(size, counts: str, expected_size: tuple[int, int] | None = None) -> int:
    """Area of the mask; raises `MaskError` unless the runs fill exactly `size`, which is `expected_size` (H, W).

    The library reads run lengths unchecked, past the end of its memory if they say so.
    """
    height, width = _check_size(size)
    if expected_size is not None and (height, width) != tuple(expected_size):
        raise MaskError(
            f"the mask is {width} × {height} pixels, expected the picture's {expected_size[1]} × {expected_size[0]}: "
            "draw it on the picture as it is shown (EXIF rotation applied), at the same size"
        )
    runs = _runs(counts)
    if sum(runs) != height * width:
        raise MaskError(
            f"the run lengths cover {sum(runs)} pixels, expected {height} × {width} = {height * width}: encode the "
            "mask again"
        )
    return sum(runs[1::2])


def _check_size(size) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in size)
        exact = all(int(side) == side for side in size)
    except (TypeError, ValueError):
        raise MaskError(f"the size of the mask is {size!r:.80}, expected [height, width]") from None
    if not exact or height < 1 or width < 1 or height * width > MAX_MASK_PIXELS:
        raise MaskError(
            f"the size of the mask is {size!r:.80}, expected [height, width] of at least 1 and together at most "
            f"{MAX_MASK_PIXELS} pixels"
        )
    return height, width


def _runs(counts: str) -> list[int]:
    """The run lengths of COCO's compressed form: six bits a character, each run from the third as a difference."""
    if not isinstance(counts, str) or not counts:
        raise MaskError(f"the run lengths are {counts!r:.80}, expected COCO's compressed text")
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise MaskError(f"the run lengths hold the character {character!r}, expected COCO's compressed text")
        value |= (bits & 31) << shift
        shift += 5
        if shift > 40:
            raise MaskError("the run lengths hold a number of more than 40 bits, expected COCO's compressed text")
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            value += runs[-2] if len(runs) > 2 else 0
            if value < 0:
                raise MaskError(f"run {len(runs)} of the mask has length {value}, expected at least 0")
            runs.append(value)
            value = shift = 0
    if shift:
        raise MaskError("the run lengths end in the middle of a number: the text was cut off")
    return runs


def rle_from_coco(segmentation, size: tuple[int, int]) -> dict:
    """COCO's `segmentation` in any of its forms → run lengths of `size` (H, W).

    Polygons [[x, y, …], …] (or one flat list), {"size", "counts": [int, …]}, {"size", "counts": str}.
    """
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        if isinstance(counts, (list, tuple)):
            return _from_counts(counts, segmentation.get("size"), size)
        counts = counts.decode("ascii", "replace") if isinstance(counts, bytes) else counts
        check_rle(segmentation.get("size"), counts, size)
        return {"size": [int(side) for side in size], "counts": counts}
    polygons = _polygons(segmentation)
    height, width = _check_size(size)
    return merge([_plain(rle) for rle in coco.frPyObjects(polygons, height, width)])


def _from_counts(counts, found_size, size: tuple[int, int]) -> dict:
    if not isinstance(found_size, (list, tuple)) or tuple(found_size) != tuple(size):
        raise MaskError(f"the mask has size {found_size!r:.80}, expected the picture's {list(size)} (height, width)")
    if any(not isinstance(run, int) or isinstance(run, bool) or run < 0 for run in counts):
        wrong = next(run for run in counts if not isinstance(run, int) or isinstance(run, bool) or run < 0)
        raise MaskError(f"a run of the mask has length {wrong!r:.40}, expected a whole number of at least 0")
    height, width = _check_size(size)
    if sum(counts) != height * width:
        raise MaskError(
            f"the run lengths cover {sum(counts)} pixels, expected {height} × {width} = {height * width}: encode the "
            "mask again"
        )
    values = np.arange(len(counts)) % 2 == 1
    return encode_mask(np.repeat(values, counts).reshape(width, height).T)


def _polygons(segmentation) -> list[list[float]]:
    if not isinstance(segmentation, (list, tuple)) or not segmentation:
        raise MaskError(
            f"the mask is {segmentation!r:.80}, expected polygons [[x1, y1, x2, y2, …], …] or run lengths "
            '{"size", "counts"}'
        )
    flat = not isinstance(segmentation[0], (list, tuple))
    polygons = [list(polygon) for polygon in ([segmentation] if flat else segmentation)]
    for index, polygon in enumerate(polygons):
        pairs = polygon and all(isinstance(point, (list, tuple)) and len(point) == 2 for point in polygon)
        polygon = polygons[index] = [value for point in polygon for value in point] if pairs else polygon
        if any(not isinstance(v, (int, float)) or isinstance(v, bool) or not np.isfinite(v) for v in polygon):
            raise MaskError(f"polygon {index} is {polygon!r:.80}, expected numbers x1, y1, x2, y2, …")
        if len(polygon) < 6 or len(polygon) % 2:
            raise MaskError(
                f"polygon {index} has {len(polygon)} numbers, expected an even number of at least 6 (three points)"
            )
        if max(map(abs, polygon)) > 1e6:
            raise MaskError(f"polygon {index} reaches to {max(map(abs, polygon)):g}, expected pixels of the picture")
    return polygons


def rle_from_picture(source, size: tuple[int, int] | None = None, name: str = "the mask") -> dict:
    """A mask drawn as a picture (path, bytes or PIL) → run lengths; `size` (H, W) is checked when given.

    Two values: the higher is the thing, whatever they are (0/1, 0/255, a palette); one value: all of it, or nothing if
    it is 0. More values in grey are a soft edge, cut at 128 of 255; in a palette they are several things: an error.
    """
    try:
        picture = (
            source if isinstance(source, Image.Image) else Image.open(_file(source), formats=("PNG", "BMP", "TIFF"))
        )
        found = picture.size
        if found[0] * found[1] > MAX_MASK_PIXELS:
            raise MaskError(f"{name} is {found[0]} × {found[1]} pixels, expected at most {MAX_MASK_PIXELS} in all")
        if size is not None and found != (size[1], size[0]):
            raise MaskError(
                f"{name} is {found[0]} × {found[1]} pixels, expected the picture's {size[1]} × {size[0]}: draw it on "
                "the picture as it is shown (EXIF rotation applied), at the same size"
            )
        values = _grey(picture, name)
    except MaskError:
        raise
    except Exception as error:  # the decoders raise nearly anything
        raise MaskError(f"{name} is no picture that can be read ({error}), expected a PNG: save it as one") from error
    return encode_mask(_binary(values, picture.mode == "P", name))


def _file(source):
    return BytesIO(source) if isinstance(source, (bytes, bytearray)) else source


def _grey(picture: Image.Image, name: str) -> np.ndarray:
    if picture.mode in ("1", "L", "P", "I", "I;16", "I;16B"):
        return np.asarray(picture.convert("L") if picture.mode == "1" else picture)
    if picture.mode == "LA":
        return np.asarray(picture.getchannel("L"))
    channels = np.asarray(picture.convert("RGB"))
    if not (channels == channels[..., :1]).all():
        colours = len(np.unique(channels.reshape(-1, 3), axis=0))
        raise MaskError(
            f"{name} has {colours} colours, expected black and white: save one mask per file, white on black"
        )
    return channels[..., 0]


def _binary(values: np.ndarray, palette: bool, name: str) -> np.ndarray:
    found = np.unique(values)
    if len(found) == 1:
        return np.full(values.shape, found[0] > 0)
    if len(found) == 2:
        return values == found[1]
    if palette:
        raise MaskError(
            f"{name} holds {len(found) - 1} things (palette entries), expected one: save one mask per file"
        )
    if found[-1] > 255:
        raise MaskError(f"{name} holds {len(found)} values up to {found[-1]}, expected two, or a soft edge up to 255")
    if found[-1] < MASK_THRESHOLD:
        raise MaskError(
            f"{name} holds the values {', '.join(map(str, found[:5]))}… up to {found[-1]}, expected 0 and 255: a file "
            "of numbered things needs one mask per file"
        )
    return values >= MASK_THRESHOLD


def merge(rles: list[dict]) -> dict:
    """The union of masks of one size."""
    sizes = {tuple(rle["size"]) for rle in rles}
    if len(sizes) != 1:
        raise MaskError(f"the masks have sizes {sorted(sizes)}, expected one: they must be of the same picture")
    if len(rles) == 1:
        return rles[0]
    return _plain(coco.merge([{"size": rle["size"], "counts": rle["counts"].encode("ascii")} for rle in rles]))


def transpose(rle: dict, orientation: int) -> dict:
    """A mask drawn on the stored pixels of a picture with this EXIF orientation → one of the shown picture."""
    mask = decode_mask(rle)
    turned = {
        2: lambda m: m[:, ::-1],
        3: lambda m: m[::-1, ::-1],
        4: lambda m: m[::-1],
        5: lambda m: m.T,
        6: lambda m: m.T[:, ::-1],
        7: lambda m: m.T[::-1, ::-1],
        8: lambda m: m.T[::-1],
    }
    return encode_mask(turned[orientation](mask)) if orientation in turned else rle


def _plain(rle: dict) -> dict:
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
