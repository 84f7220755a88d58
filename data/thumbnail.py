"""The masks of a record as a small picture for people: the photo in grey, each mask in a colour of its own."""

from io import BytesIO

import numpy as np
from PIL import Image

from ..drawing import MASK_COLOURS
from ..processing_perceptio import PictureError, load_picture
from .masks import decode_mask

SIDE = 256  # pixels; what a table shows
LEVELS = 16  # of grey: more would double the file and tell nobody more


def mask_preview(record: dict) -> dict | None:
    """{"bytes": 8-bit PNG with a palette, "path": None}, or None for a record without masks.

    Grey levels stand for the photo, coloured ones for the masks; where two overlap, the later is shown. A photo that
    cannot be read leaves the masks on black: that is the validator's business, not that of a preview.
    """
    if not record["masks"]:
        return None
    height, width = record["masks"][0]["size"]
    scale = min(1, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    levels = _grey_levels(record["image"], size)
    colour = np.zeros(levels.shape, np.uint8)
    for number, mask in enumerate(record["masks"]):
        inside = Image.fromarray(decode_mask(mask)).resize(size, Image.Resampling.NEAREST)
        colour[np.asarray(inside)] = number % len(MASK_COLOURS) + 1
    picture = Image.fromarray(colour * LEVELS + levels, "P")
    picture.putpalette(_palette())
    file = BytesIO()
    picture.save(file, "PNG", compress_level=6)
    return {"bytes": file.getvalue(), "path": None}


def _grey_levels(image: dict | None, size: tuple[int, int]) -> np.ndarray:
    try:
        photo = load_picture((image or {}).get("bytes") or b"")
    except PictureError:
        return np.zeros((size[1], size[0]), np.uint8)
    grey = np.asarray(photo.convert("L").resize(size, Image.Resampling.BOX, reducing_gap=2.0))
    return (grey // (256 // LEVELS)).astype(np.uint8)


def _palette() -> list[int]:
    """First the greys, then as many shades of each mask's colour; a mask on black is still seen."""
    share = np.linspace(0, 1, LEVELS)[:, None]
    greys = np.repeat(share * 255, 3, axis=1)
    shades = [(0.45 + 0.55 * share) * np.array(colour)[None] for colour in MASK_COLOURS]
    return np.concatenate([greys, *shades]).round().astype(int).flatten().tolist()
