"""Pictures with a depth map each: the form in which ADE20K's pictures teach a model to write a depth map.

A folder of pictures and a folder of depth maps of the same names, as Depth Anything's script writes them
(`ADE_train_00000001.jpg`, `ADE_train_00000001_depth.png`, 8 or 16 bits, one channel or three equal ones).
"""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from ..depths import MAX_DEPTH_PIXELS, DepthError, encode_depth, normalise
from ..record import DataError, Problem, assistant, make_record, user
from ..tally import Tally
from .common import Unusable, choose, convert_rows, read_picture

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
DEPTH_NAMES = ("{}_depth.png", "{}.png")
QUESTIONS = (
    "What is the depth map of this picture?",
    "Give me the depth map of the picture.",
    "How far away are the things in this picture? Answer with a depth map.",
    "Estimate the depth of every part of this picture.",
)
ANSWER = "This is the depth map of the picture."


def read_ade(
    root: str | Path,
    *,
    tally: Tally,
    images: str = "images",
    depths: str = "depth",
    zero: str = "farthest",
    source: str = "ade20k-depth",
    licence: str = "unknown",
    split: str = "train",
) -> Iterator[dict]:
    """A record for each picture below `root/images` whose depth map is below `root/depths`.

    Larger values are nearer.  zero: what 0 says in the maps, "farthest" (Depth Anything scales the farthest point of
    each picture to it) or "none" (a hole).
    """
    if zero not in ("farthest", "none"):
        raise ValueError(f"`zero` is {zero!r}, expected 'farthest' or 'none'")
    folder, maps = Path(root) / images, Path(root) / depths

    def convert(path: Path, number: int) -> dict:
        name = path.relative_to(folder).as_posix()
        image = read_picture(folder, name)
        depth = _find_depth(maps, path.relative_to(folder))
        return make_record(
            id=f"{source}/{name}",
            image=image,
            messages=[user(choose(QUESTIONS, name)), assistant(ANSWER, "depth")],
            depth={"bytes": encode_depth(read_map(depth["bytes"], zero)), "path": depth["path"]},
            source=source,
            licence=licence,
            split=split,
        )

    yield from convert_rows(_pictures(folder), convert, tally, where="picture")


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(
            Problem(str(folder), None, "images", "no folder", "a folder of pictures", "name it with `images`")
        )
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    return sorted(path for path in paths if not path.stem.endswith("_depth"))


def _find_depth(maps: Path, picture: Path) -> dict:
    """The map of a picture: in the same subfolder, or directly in the folder of maps."""
    for parent in dict.fromkeys((picture.parent, Path())):
        for form in DEPTH_NAMES:
            name = (parent / form.format(picture.stem)).as_posix()
            if (maps / name).is_file():
                return read_picture(maps, name)
    raise Unusable("no depth map", picture.as_posix())


def read_map(data: bytes, zero: str = "farthest") -> np.ndarray:
    """The bytes of a depth map of 8 or 16 bits, larger is nearer → float32[H, W] in [0, 1], NaN for no value."""
    try:
        values = _one_channel(data)
        return normalise(np.where(values == 0, np.nan, values) if zero == "none" else values)
    except DepthError as error:
        raise Unusable("depth map not usable", str(error)) from error


def _one_channel(data: bytes) -> np.ndarray:
    try:
        with Image.open(BytesIO(data), formats=("PNG",)) as picture:
            if picture.width * picture.height > MAX_DEPTH_PIXELS:
                raise DepthError(f"the depth map is {picture.size}, expected at most {MAX_DEPTH_PIXELS} pixels in all")
            values = np.asarray(picture)
    except DepthError:
        raise
    except Exception as error:  # the decoders raise nearly anything
        raise DepthError(f"the depth map cannot be read ({error}), expected a PNG of 8 or 16 bits") from error
    if values.ndim == 3 and values.shape[-1] == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim != 2 or values.dtype == bool or picture.mode == "P":
        raise DepthError("the depth map has colours, expected one channel: a coloured rendering holds no depth")
    return values.astype(np.float64)
