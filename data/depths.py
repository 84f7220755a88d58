"""Depth maps in and out of files.

Everywhere: relative inverse depth, scaled per picture, from 0 (farthest) to 1 (nearest); NaN where there is no value.
On disk: a 16-bit picture whose value 0 has no value, and v = 1 … 65535 is (v - 1) / 65534.
"""

import os
import tempfile
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

MAX_DEPTH_PIXELS = 64_000_000
TOP = 65534
KINDS = ("inverse", "metres")
EXR_START = b"\x76\x2f\x31\x01"


class DepthError(ValueError):
    """A depth map that cannot be read as one."""


def encode_depth(depth: np.ndarray) -> bytes:
    """float[H, W] in [0, 1], NaN for no value → the bytes of a 16-bit PNG."""
    if depth.ndim != 2 or 0 in depth.shape:
        raise DepthError(f"the depth map has shape {depth.shape}, expected [H, W]")
    valid = ~np.isnan(depth)
    if valid.any() and not (depth[valid].min() >= 0 and depth[valid].max() <= 1):
        raise DepthError(
            f"the depth map reaches from {depth[valid].min():g} to {depth[valid].max():g}, expected 0 (farthest) to 1 "
            "(nearest): scale it with `normalise`"
        )
    values = np.zeros(depth.shape, np.uint16)
    values[valid] = np.rint(depth[valid] * TOP).astype(np.uint16) + 1
    file = BytesIO()
    Image.fromarray(values).save(file, "PNG", compress_level=1)
    return file.getvalue()


def decode_depth(data: bytes) -> np.ndarray:
    """The bytes of such a picture → float32[H, W], NaN for no value."""
    values = _pixels(data, "the depth map")
    if values.dtype != np.uint16:
        raise DepthError(f"the depth map holds {values.dtype} values, expected a 16-bit picture of one channel")
    return np.where(values == 0, np.float32("nan"), (values.astype(np.float32) - 1) / TOP)


def read_depth(source, name: str = "the depth map", kind: str = "inverse", unit: float = 1.0) -> np.ndarray:
    """A person's own depth file → float32[H, W] as above."""
    return normalise(read_values(source, name, kind, unit), kind)


def read_values(source, name: str = "the depth map", kind: str = "inverse", unit: float = 1.0) -> np.ndarray:
    """A person's own depth file → float64[H, W] as measured, NaN for no value.

    source: path or bytes of an 8- or 16-bit PNG, a TIFF of floats, an OpenEXR file or an .npy file of numbers.
    kind: "inverse" (larger is nearer) or "metres" (larger is farther).  Zeros of whole-number pictures and of metres
    and NaN have no value.
    unit: what one step of the file is worth, as 0.001 for metres that are stored as millimetres.
    """
    _check_kind(kind)
    if not (isinstance(unit, (int, float)) and 0 < unit < float("inf")):
        raise DepthError(f"`unit` of {name} is {unit!r}, expected a number above 0, as 0.001 for millimetres")
    values = _pixels(source, name)
    if values.ndim != 2:
        raise DepthError(f"{name} has shape {values.shape}, expected [H, W]: save one channel")
    if values.dtype.kind not in "uif":
        raise DepthError(f"{name} holds values of type {values.dtype}, expected numbers")
    valid = ~np.isnan(values) if values.dtype.kind == "f" else values != 0
    values = values.astype(np.float64) * unit
    if np.isinf(values).any():
        raise DepthError(f"{name} holds infinite values, expected finite ones: write NaN or 0 where there is no value")
    if kind == "metres":
        valid &= values != 0
    if values[valid].size and values[valid].min() < 0:
        raise DepthError(f"{name} holds negative values ({values[valid].min():g}), expected 0 or more")
    if not valid.any():
        raise DepthError(f"{name} has no valid value, expected some that are neither 0 nor NaN: leave the depth out")
    return np.where(valid, values, np.nan)


@dataclass(frozen=True)
class Scale:
    """What a normalised map was before: the value v stands for `low + v * (high - low)`, in the unit of `kind`.

    kind: "inverse", or "metres", of which the inverse (1 / metres) is meant.
    """

    low: float
    high: float
    kind: str = "inverse"

    def undo(self, depth: np.ndarray) -> np.ndarray:
        """float[H, W] in [0, 1] → the values as they were measured, but for those that were cut at the ends."""
        values = self.low + np.asarray(depth, np.float64) * (self.high - self.low)
        return values if self.kind == "inverse" else 1 / np.maximum(values, 1e-12)


def normalise(values: np.ndarray, kind: str = "inverse", low: float = 2, high: float = 98) -> np.ndarray:
    """float[H, W], NaN for no value → float32[H, W] in [0, 1], larger is nearer.

    Metres are inverted first.  The `low` and `high` percentiles go to 0 and 1 and what lies beyond is cut, so that one
    wrong pixel does not squeeze the rest; when they are equal the extremes do, and a constant map is 0 everywhere.
    """
    return normalise_with_scale(values, kind, low, high)[0]


def normalise_with_scale(
    values: np.ndarray, kind: str = "inverse", low: float = 2, high: float = 98
) -> tuple[np.ndarray, Scale | None]:
    """As `normalise`, with what 0 and 1 stand for; None for a map without any value."""
    _check_kind(kind)
    values = np.asarray(values, np.float64)
    valid = np.isfinite(values)
    if kind == "metres":
        if (values[valid] <= 0).any():
            raise DepthError(f"the metres reach down to {values[valid].min():g}, expected more than 0, or NaN")
        values = 1 / values
    if not valid.any():
        return np.full(values.shape, np.nan, np.float32), None
    bottom, top = np.percentile(values[valid], [low, high])
    if top <= bottom:
        bottom, top = values[valid].min(), values[valid].max()
    spread = top - bottom
    scaled = np.clip((values - bottom) / spread, 0, 1) if spread > 0 else np.where(valid, 0.0, np.nan)
    return np.where(valid, scaled, np.nan).astype(np.float32), Scale(float(bottom), float(top), kind)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise DepthError(f"the kind of depth is {kind!r}, expected one of {', '.join(KINDS)}")


def _pixels(source, name: str) -> np.ndarray:
    data = source if isinstance(source, (bytes, bytearray)) else None
    if data is None:
        with open(os.fspath(source), "rb") as file:
            data = file.read()
    try:
        if data[:6] == b"\x93NUMPY":
            return _numpy(data, name)
        if data[:4] == EXR_START:
            return _exr(data, name)
        with Image.open(BytesIO(data), formats=("PNG", "TIFF")) as picture:
            _check_size(picture.width, picture.height, name)
            if picture.mode not in ("L", "I", "I;16", "I;16B", "I;16L", "F"):
                raise DepthError(
                    f"{name} is a picture of mode {picture.mode}, expected one channel of 8 or 16 bits or of floats: "
                    "a coloured rendering holds no depth"
                )
            picture.load()  # a cut file raises here; the conversion alone would give what there is
            values = np.asarray(picture)
            return values.astype(values.dtype.newbyteorder("="))
    except DepthError:
        raise
    except Exception as error:  # the decoders raise nearly anything
        raise DepthError(
            f"{name} is no depth map that can be read ({error}), expected a 16-bit PNG, a TIFF of floats, an "
            "OpenEXR or an .npy file"
        ) from error


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_DEPTH_PIXELS:
        raise DepthError(f"{name} is {width} × {height} pixels, expected at most {MAX_DEPTH_PIXELS} in all")


def _exr(data: bytes, name: str) -> np.ndarray:
    """The channel Z, Y or R, or the only one; of a picture in RGB all three must be equal."""
    try:
        import OpenEXR
    except ImportError as error:
        raise DepthError(
            f'{name} is an OpenEXR file, which needs the extra "label": pip install "perceptio[label]"'
        ) from error
    with tempfile.NamedTemporaryFile(suffix=".exr") as file:
        file.write(data)
        file.flush()
        try:
            channels = _exr_channels(OpenEXR, file.name, name)
        except (RuntimeError, MemoryError, OSError) as error:
            raise DepthError(f"{name} is a damaged OpenEXR file, expected a whole one: write it again") from error
    key = next((key for key in ("Z", "Y", "R", "RGB", "RGBA") if key in channels), None)
    if key is None and len(channels) > 1:
        raise DepthError(f"{name} has the channels {', '.join(sorted(channels))}, expected Z, Y, R or one alone")
    values = channels[key or next(iter(channels))]
    if values.ndim == 3 and (values[..., :3] == values[..., :1]).all():
        values = values[..., 0]
    return values.astype(np.float32) if values.dtype == np.float16 else values


def _exr_channels(library, path: str, name: str) -> dict[str, np.ndarray]:
    """The channels of the first part; nothing is read of one that is too large."""
    with library.File(path, header_only=True) as opened:
        for part in opened.parts:
            low, high = part.header["dataWindow"]
            width, height = (int(b) - int(a) + 1 for a, b in zip(low, high, strict=True))
            _check_size(width, height, name)
    with library.File(path) as opened:
        if not opened.parts:  # it warns of damage, and goes on without the part
            raise OSError("no part could be read")
        return {key: np.asarray(channel.pixels) for key, channel in opened.channels().items()}


def _numpy(data: bytes, name: str) -> np.ndarray:
    file = BytesIO(data)
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    if dtype.hasobject:
        raise DepthError(f"{name} holds Python objects, expected numbers: such files can run code and are not read")
    if int(np.prod(shape, dtype=np.int64)) > MAX_DEPTH_PIXELS:
        raise DepthError(f"{name} has shape {shape}, expected at most {MAX_DEPTH_PIXELS} values")
    file.seek(0)
    values = np.lib.format.read_array(file, allow_pickle=False)
    return values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values


def nearness(value: float) -> int:
    """Relative inverse depth as one digit: 0 (far) to 9 (near)."""
    return min(int(10 * value), 9)
