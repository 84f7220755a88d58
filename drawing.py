"""One picture of a result: the photo with its masks, the depth map in colour with a legend, question and answer.

Needs only PIL and NumPy. Colours: the masks use a palette that colour-blind people can tell apart; those of depth run
from dark blue (far) to bright yellow (near) in even steps of lightness, so the order survives in grey as well.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

# Nine points at equal steps of OKLab lightness, from blue to yellow; in between, straight lines.
DEPTH_COLOURS = np.array(
    [
        [4, 24, 80],
        [7, 55, 91],
        [28, 83, 100],
        [56, 111, 107],
        [89, 138, 112],
        [128, 163, 114],
        [172, 188, 115],
        [219, 211, 112],
        [255, 234, 105],
    ],
    dtype=np.float32,
)
MASK_COLOURS = ((230, 60, 0), (0, 158, 225), (240, 228, 66), (204, 90, 170), (0, 175, 130), (230, 159, 0))
MASK_STRENGTH = 0.45
PAPER, INK, SOFT, WARNING, HOLE = (250, 250, 248), (28, 30, 34), (96, 100, 108), (176, 32, 0), (232, 232, 228)
MARGIN, PANEL_SIDE, LEAST_PANEL, LEGEND_HEIGHT = 24, 640, 320, 14
# Fonts with more letters than Pillow's own, tried only for a text that Pillow's own cannot show.
WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")


def colour_depth(depth: np.ndarray) -> Image.Image:
    """float[H, W] in [0, 1], larger is nearer -> RGB picture of the same size."""
    depth = np.clip(np.nan_to_num(np.asarray(depth, dtype=np.float32)), 0, 1)
    points = np.linspace(0, 1, len(DEPTH_COLOURS))
    channels = [np.interp(depth, points, DEPTH_COLOURS[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def lay_mask_over(photo: Image.Image, mask: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """`photo` tinted inside `mask` (mode L, 0/255, any size), with an outline that shows on light and on dark."""
    mask = mask.convert("L").resize(photo.size, Image.Resampling.BILINEAR).point(lambda value: 255 * (value >= 128))
    tint = Image.new("RGB", photo.size, colour)
    result = Image.composite(Image.blend(photo, tint, MASK_STRENGTH), photo, mask)
    framed = Image.new(
        "L", (photo.width + 2, photo.height + 2)
    )  # a mask that touches the border has an edge there too
    framed.paste(mask, (1, 1))
    inner = framed.filter(ImageFilter.MinFilter(3)).crop((1, 1, photo.width + 1, photo.height + 1))
    outer = framed.filter(ImageFilter.MaxFilter(5)).crop((1, 1, photo.width + 1, photo.height + 1))
    result.paste((255, 255, 255), mask=_difference(outer, mask))
    result.paste(colour, mask=_difference(mask, inner))
    return result


def draw_result(
    photo: Image.Image, question: str, answer: str, masks=None, depth: np.ndarray | None = None, notes=()
) -> Image.Image:
    """The result picture, RGB.

    photo: RGB. masks: list of PIL masks in the order of the answer, None for a thing that is not there; None when no
    mask was asked for. depth: float[H, W] in [0, 1], larger is nearer; None when no depth was asked for.
    notes: sentences printed in the colour of a warning.
    """
    shown = _fit(photo)
    panels = [_photo_panel(shown, masks), _depth_panel(shown.size, depth)]
    beside = shown.width <= 1.7 * shown.height
    width = 2 * MARGIN + (sum(panel.width for panel in panels) + MARGIN if beside else panels[0].width)
    caption = _caption(width - 2 * MARGIN, question, answer, notes)
    height = max(panel.height for panel in panels) if beside else sum(panel.height for panel in panels) + MARGIN // 2
    canvas = Image.new("RGB", (width, height + caption.height + 3 * MARGIN), PAPER)
    canvas.paste(panels[0], (MARGIN, MARGIN))
    second = (2 * MARGIN + panels[0].width, MARGIN) if beside else (MARGIN, MARGIN + panels[0].height + MARGIN // 2)
    canvas.paste(panels[1], second)
    canvas.paste(caption, (MARGIN, 2 * MARGIN + height))
    return canvas


def _fit(photo: Image.Image) -> Image.Image:
    """The photo at the size of a panel: large ones shrink, small ones grow, and no side falls below eight pixels."""
    scale = PANEL_SIDE / max(photo.size)
    size = tuple(max(8, round(side * scale)) for side in photo.size)
    return photo.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _photo_panel(shown: Image.Image, masks) -> Image.Image:
    present = [(number, mask) for number, mask in enumerate(masks or [], start=1) if mask is not None]
    picture = shown
    for number, mask in present:
        picture = lay_mask_over(picture, mask, MASK_COLOURS[(number - 1) % len(MASK_COLOURS)])
    if len(masks or []) > 1:
        for number, mask in present:
            _draw_number(picture, mask, number)
    if masks is None:
        title = "Photo (no mask was asked for)"
    elif not present:
        title = "Photo: nothing in it fits the question"
    elif len(masks) == 1:
        title = "Mask"
    else:
        title = f"Masks: {len(present)} of {len(masks)} things found"
    return _panel(picture, title, WARNING if masks is not None and not present else INK)


def _depth_panel(size: tuple[int, int], depth: np.ndarray | None) -> Image.Image:
    if depth is None:
        return _panel(Image.new("RGB", size, HOLE), "Depth (not asked for)", SOFT)
    picture = colour_depth(depth).resize(size, Image.Resampling.BILINEAR)
    return _panel(picture, "Relative inverse depth", INK, legend=True)


def _panel(picture: Image.Image, title: str, colour, legend: bool = False) -> Image.Image:
    """Title, picture in the middle of the panel's width, and room for the legend, so that panels stand level."""
    font, small = _font(20, title), _font(16, "")
    width = max(LEAST_PANEL, picture.width)
    top = 32
    panel = Image.new("RGB", (width, top + picture.height + LEGEND_HEIGHT + 36), PAPER)
    draw = ImageDraw.Draw(panel)
    draw.text((0, 0), title, font=font, fill=colour)
    left = (width - picture.width) // 2
    panel.paste(picture, (left, top))
    if legend:
        below = top + picture.height + 10
        ramp = np.tile(np.linspace(0, 1, width, dtype=np.float32), (LEGEND_HEIGHT, 1))
        panel.paste(colour_depth(ramp), (0, below))
        draw.text((0, below + LEGEND_HEIGHT + 2), "far (0)", font=small, fill=SOFT)
        draw.text((width, below + LEGEND_HEIGHT + 2), "near (1)", font=small, fill=SOFT, anchor="ra")
    return panel


def _draw_number(picture: Image.Image, mask: Image.Image, number: int) -> None:
    inside = np.argwhere(np.asarray(mask.convert("L").resize(picture.size)) >= 128)
    if len(inside):
        row, column = inside[np.abs(inside - inside.mean(axis=0)).sum(axis=1).argmin()]
        draw, position = ImageDraw.Draw(picture), (int(column), int(row))
        draw.text(
            position,
            str(number),
            font=_font(26, ""),
            fill=(255, 255, 255),
            anchor="mm",
            stroke_width=3,
            stroke_fill=INK,
        )


def _caption(width: int, question: str, answer: str, notes) -> Image.Image:
    lines = [(line, _font(20, question), SOFT) for line in wrap(question, _font(20, question), width)]
    lines += [(line, _font(24, answer), INK) for line in wrap(answer or "(no words)", _font(24, answer), width)]
    for note in notes:
        lines += [(line, _font(18, note), WARNING) for line in wrap(note, _font(18, note), width)]
    heights = [round(font.size * 1.35) for _, font, _ in lines]
    caption = Image.new("RGB", (width, sum(heights)), PAPER)
    draw, top = ImageDraw.Draw(caption), 0
    for (line, font, colour), height in zip(lines, heights, strict=True):
        draw.text((0, top), line, font=font, fill=colour)
        top += height
    return caption


def wrap(text: str, font, width: int, most_lines: int = 8) -> list[str]:
    """`text` in lines no wider than `width` pixels. A word that is too long is cut; a long text ends in …."""
    text = "".join(character if character.isprintable() else " " for character in text)
    lines, line = [], ""
    for word in text.split():
        if font.getlength(f"{line} {word}".strip()) <= width:
            line = f"{line} {word}".strip()
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(lines) <= most_lines:
            end = max(1, sum(font.getlength(word[: end + 1]) <= width for end in range(min(len(word), width))))
            lines.append(word[:end])
            word = word[end:]
        line = word
        if len(lines) > most_lines:
            break
    lines.append(line)
    if len(lines) > most_lines:
        lines = lines[:most_lines]
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    return lines


def _difference(larger: Image.Image, smaller: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(larger) * (np.asarray(smaller) == 0))


def _font(size: int, text: str):
    return _load_font(size, wide=not all(ord(character) < 256 or character == "…" for character in text))


@lru_cache(maxsize=32)
def _load_font(size: int, wide: bool):
    if wide:
        for name in WIDE_FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)
