"""A contact sheet: pictures with their masks, depth, questions and answers."""

from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.depths import decode_depth
from ..data.masks import decode_mask
from ..drawing import INK, MASK_COLOURS, PAPER, SOFT, colour_depth, lay_mask_over, wrap

MARGIN, LINE = 12, 17


def contact_sheet(records: list[dict], columns: int = 4, side: int = 180, lines: int = 5) -> Image.Image:
    """One cell per record: the picture with the mask of its first question, its depth, and question and answer."""
    if not records:
        raise ValueError("`records` is empty, expected at least one record: render some scenes")
    width, height = 2 * side + 4, side + lines * LINE + 8
    rows = -(-len(records) // columns)
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN), PAPER)
    for place, record in enumerate(records):
        left = MARGIN + place % columns * (width + MARGIN)
        top = MARGIN + place // columns * (height + MARGIN)
        _draw_cell(sheet, record, left, top, side, lines)
    return sheet


def _draw_cell(sheet, record: dict, left: int, top: int, side: int, lines: int) -> None:
    photo = Image.open(BytesIO(record["image"]["bytes"])).convert("RGB")
    size = _fitted(photo.size, side)
    photo = photo.resize(size, Image.Resampling.LANCZOS)
    mask = decode_mask(record["masks"][0])
    if mask.any():
        photo = lay_mask_over(photo, Image.fromarray(mask.astype(np.uint8) * 255), MASK_COLOURS[0])
    depth = colour_depth(decode_depth(record["depth"]["bytes"])).resize(size, Image.Resampling.BILINEAR)
    sheet.paste(photo, (left, top))
    sheet.paste(depth, (left + side + 4, top))
    draw, below = ImageDraw.Draw(sheet), top + side + 4
    question, answer = (message["content"] for message in record["messages"][:2])
    font = ImageFont.load_default(13)
    shown = [(line, SOFT) for line in wrap(question, font, 2 * side, lines - 2)]
    shown += [(line, INK) for line in wrap(answer, font, 2 * side, lines - len(shown))]
    for index, (line, colour) in enumerate(shown):
        draw.text((left, below + index * LINE), line, colour, font)


def _fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
