"""Points to be compared by depth, chosen and drawn as HardBLINK does it: a red ring, a white letter on a black box."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LETTERS = "ABCDE"
QUESTION = (
    "Multiple points are circled on the image, labeled by letters beside each circle. Which point is the closest to "
    "the camera?"
)
NEAR = "How near is point {}, from 0 (far) to 9 (near)?"
PAIR = "Which is closer to the camera, point {} or point {}?"
FARTHEST = "Which point is the farthest from the camera?"
ORDER = "Name the points from the closest to the farthest."
SIDE = 336  # the picture that the sizes below are of
RADIUS, LINE, LABEL_ABOVE, LETTER = 4, 2, 17, 12
GAP = 20 / 255  # between any two points, in relative inverse depth
APART = 20 / SIDE  # between any two points, of the width
BAND = (95 / SIDE, 224 / SIDE)  # of the height
EDGE = 10 / SIDE
FLAT = 0.04  # change of depth allowed within the ring
LOWER = 0.05  # of the height, between the nearest point and one that is plainly lower
CANDIDATES, TRIES = 300, 24
LARGEST = 2.0  # how many times as large a picture may have been when it was marked


def drawn_larger(rng) -> float:
    """1 for half of the pictures."""
    return 1.0 if rng.random() < 0.5 else float(rng.uniform(1, LARGEST))


def choose_points(rng, inverse: np.ndarray, depth: np.ndarray, count: int, lure: bool | None = None) -> list | None:
    """`count` places [(x, y), …], the nearest first, or None when the picture has none.

    inverse: relative inverse depth float[H, W]; depth: metres.
    lure: True asks for a nearest point that is plainly not the lowest, False for one that is the lowest.
    """
    height, width = inverse.shape
    x = rng.integers(int(EDGE * width), int((1 - EDGE) * width), CANDIDATES)
    y = rng.integers(int(BAND[0] * height), int(BAND[1] * height), CANDIDATES)
    reach = max(2, round(RADIUS * width / SIDE))
    around = inverse[
        np.clip(y[:, None, None] + np.arange(-reach, reach + 1)[:, None], 0, height - 1),
        np.clip(x[:, None, None] + np.arange(-reach, reach + 1), 0, width - 1),
    ]
    calm = np.ptp(around, axis=(1, 2)) < FLAT
    x, y = x[calm], y[calm]
    value, distance = inverse[y, x], np.log(depth[y, x])
    for _ in range(TRIES if len(x) >= count else 0):
        chosen: list[int] = []
        free = np.ones(len(x), bool)
        while len(chosen) < count and free.any():
            index = int(rng.choice(np.flatnonzero(free)))
            chosen.append(index)
            with np.errstate(invalid="ignore"):  # the sky from the sky
                free &= np.abs(value - value[index]) > GAP
                free &= np.abs(distance - distance[index]) > np.log(1.1)
            free &= np.hypot(x - x[index], y - y[index]) > 2 * APART * width
        if len(chosen) < count:
            continue
        chosen.sort(key=lambda index: -value[index])
        lowest = max(y[index] for index in chosen[1:])
        nearest = y[chosen[0]]
        if lure is None or (lowest > nearest + LOWER * height if lure else nearest >= lowest):
            return [(int(x[index]), int(y[index])) for index in chosen]
    return None


def draw_points(image: np.ndarray, points: list[tuple[int, int]], letters: str, larger: float = 1.0) -> np.ndarray:
    """A copy of uint8[H, W, 3] with each point marked by its letter.

    larger: the marks are drawn in a picture so many times as large, which is then brought to its size again, as
    happens to pictures that were marked by others.
    """
    picture = Image.fromarray(image)
    if larger != 1:
        size = (round(larger * picture.width), round(larger * picture.height))
        moved = [(round(larger * x), round(larger * y)) for x, y in points]
        drawn = draw_points(np.asarray(picture.resize(size, Image.Resampling.BICUBIC)), moved, letters)
        return np.asarray(Image.fromarray(drawn).resize(picture.size, Image.Resampling.BICUBIC))
    draw = ImageDraw.Draw(picture)
    scale = picture.width / SIDE
    font = ImageFont.load_default(LETTER * scale)
    radius, line = RADIUS * scale, max(1, round(LINE * scale))
    for (x, y), letter in zip(points, letters, strict=True):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=(255, 0, 0), width=line)
        at = (x, y - LABEL_ABOVE * scale)
        left, top, right, bottom = draw.textbbox(at, letter, font, anchor="mm")
        margin = 2 * scale
        draw.rectangle((left - margin, top - margin, right + margin, bottom + margin), fill=(0, 0, 0))
        draw.text(at, letter, (255, 255, 255), font, anchor="mm")
    return np.asarray(picture)


def discs(points: list[tuple[int, int]], shape: tuple[int, int]) -> np.ndarray:
    """bool[H, W]: the inside of every ring."""
    height, width = shape
    y, x = np.mgrid[0:height, 0:width]
    radius = max(2.0, RADIUS * width / SIDE)
    mask = np.zeros(shape, bool)
    for px, py in points:
        mask |= (x - px) ** 2 + (y - py) ** 2 <= radius**2
    return mask
