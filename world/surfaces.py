"""What things are made of: colours with names, patterns, and noise that looks like nature."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# Hue, saturation and value ranges, far enough inside each name that light does not move a thing to another.
COLOURS = {
    "red": ((-0.015, 0.015), (0.78, 0.95), (0.65, 0.85)),
    "orange": ((0.065, 0.085), (0.85, 1.0), (0.9, 1.0)),
    "yellow": ((0.14, 0.16), (0.8, 1.0), (0.9, 1.0)),
    "green": ((0.3, 0.37), (0.6, 0.9), (0.4, 0.7)),
    "turquoise": ((0.47, 0.5), (0.6, 0.85), (0.7, 0.9)),
    "blue": ((0.59, 0.63), (0.7, 0.95), (0.6, 0.9)),
    "purple": ((0.75, 0.79), (0.55, 0.8), (0.5, 0.75)),
    "pink": ((0.9, 0.94), (0.35, 0.55), (0.95, 1.0)),
    "brown": ((0.055, 0.075), (0.6, 0.75), (0.3, 0.42)),
    "white": ((0.0, 1.0), (0.0, 0.04), (0.92, 1.0)),
    "grey": ((0.0, 1.0), (0.0, 0.05), (0.42, 0.52)),
    "black": ((0.0, 1.0), (0.0, 0.1), (0.03, 0.08)),
}
# Names that two people may give to one thing under one lamp.
ALIKE = {
    frozenset(pair)
    for pair in (
        ("red", "orange"), ("red", "pink"), ("red", "brown"), ("orange", "yellow"), ("orange", "brown"),
        ("pink", "purple"), ("pink", "white"), ("purple", "blue"), ("blue", "turquoise"), ("turquoise", "green"),
        ("white", "grey"), ("white", "yellow"), ("grey", "black"), ("brown", "black"), ("green", "yellow"),
        ("turquoise", "white"), ("grey", "blue"), ("brown", "grey"), ("brown", "yellow"), ("black", "blue"),
        ("black", "green"), ("black", "purple"), ("orange", "pink"), ("turquoise", "grey"),
    )
}  # fmt: skip
PATTERNS = ("plain", "striped", "checked", "spotted")


def may_be_taken_for(colour: str, other: str) -> bool:
    return colour == other or frozenset((colour, other)) in ALIKE


def sample_colour(rng, name: str) -> np.ndarray:
    """Linear RGB of a colour of that name."""
    hue, saturation, value = (rng.uniform(*bounds) for bounds in COLOURS[name])
    return to_linear(hsv(hue, saturation, value))


def hsv(hue, saturation, value) -> list[float]:
    steps = [(start + hue * 6) % 6 for start in (5.0, 3.0, 1.0)]
    return [value - value * saturation * max(0.0, min(step, 4 - step, 1.0)) for step in steps]


def to_linear(srgb) -> np.ndarray:
    return (np.asarray(srgb, np.float32) ** 2.2).astype(np.float32)


@dataclass
class Surface:
    """kind: a pattern's name or one of the ground's; a, b: linear RGB; scale: lengths of one period."""

    kind: str
    a: np.ndarray
    b: np.ndarray
    scale: float = 0.25
    turn: float = 0.0
    grain: float = 0.1  # how much noise lightens and darkens it
    grain_scale: float = 1.0
    gloss: float = 0.0
    noise: int = 0


TILE = 512  # steps of a tile of noise


@lru_cache(maxsize=1)
def noises() -> np.ndarray:
    """float32[5, 512 * 512] in [0, 1], each a tile that joins itself: clouds, fine clouds, wood, grit, blotches."""
    rng = np.random.default_rng(7)
    fy, fx = np.meshgrid(np.fft.fftfreq(TILE), np.fft.fftfreq(TILE), indexing="ij")
    radius = 2 * np.hypot(fx, fy)
    radius[0, 0] = 1
    filters = [
        radius**-1.6,
        radius**-1.0,
        (2 * np.hypot(fx * 14, fy) + 1e-3) ** -1.3,
        np.where(radius < 0.5, radius**-0.3, 0.3 * radius**-1.5),
        np.exp(-(((radius - 0.03) / 0.012) ** 2)),
    ]
    maps = []
    for shape in filters:
        spectrum = np.fft.fft2(rng.normal(size=(TILE, TILE))) * shape
        spectrum[0, 0] = 0
        values = np.fft.ifft2(spectrum).real
        maps.append(np.clip(0.5 + 0.22 * values / values.std(), 0, 1).ravel())
    return np.ascontiguousarray(maps, dtype=np.float32)


def noise_at(kind: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The noise at places, one tile per unit length."""
    row = np.floor(u * np.float32(TILE)).astype(np.int32)
    column = np.floor(v * np.float32(TILE)).astype(np.int32)
    row &= TILE - 1
    column &= TILE - 1
    row *= TILE
    row += column
    return noises()[kind][row]


def albedo(surface: Surface, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Linear RGB float32[3, n] of a surface at points float32[3, n] of its own coordinates."""
    u, v = _plane(points, normals, surface.turn)
    period = np.float32(1 / surface.scale)
    colour = np.float32(surface.a)[:, None]
    if surface.kind != "plain":
        colour = colour + np.float32(surface.b - surface.a)[:, None] * MIXES[surface.kind](
            u * period, v * period, surface.noise
        )
    if surface.grain:
        rate = np.float32(surface.grain_scale)
        grain = noise_at(surface.noise, u * rate + np.float32(0.37), v * rate + np.float32(0.11))
        grain *= np.float32(2 * surface.grain)
        grain += np.float32(1 - surface.grain)
        return colour * grain
    return colour if colour.shape[1] > 1 else np.repeat(colour, len(u), 1)


def _plane(points, normals, turn: float):
    """Each point's place in the plane that its surface is nearest to."""
    x, y, z = np.abs(normals)
    sideways, flat = (x > y) & (x > z), (y >= x) & (y > z)
    u = np.where(sideways, points[2], points[0])
    v = np.where(flat, points[2], points[1])
    if turn:
        c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        u, v = c * u - s * v, s * u + c * v
    return u, v


def _line(x, width):
    """1 within `width` of a whole number."""
    return (np.abs(x - np.rint(x)) < width).astype(np.float32)


def _planks(u, v, noise):
    row = np.floor(v)
    shade = noise_at(3, row * 0.173, row * 0.071)
    gap = np.maximum(_line(v, 0.03), _line(u * 0.2 + row * 0.37, 0.004))
    return np.clip(0.75 * noise_at(2, u * 0.12 + row * 0.31, v * 0.6) + 0.35 * shade + 0.6 * gap, 0, 1)


def _bricks(u, v, noise):
    row = np.floor(v)
    shifted = u * 0.45 + 0.5 * (row % 2)
    mortar = np.maximum(_line(v, 0.06), _line(shifted, 0.03))
    shade = 0.45 * noise_at(3, np.floor(shifted) * 0.137 + 0.01, row * 0.091)
    return np.where(mortar > 0, 1.0, shade).astype(np.float32)


MIXES = {
    "plain": lambda u, v, noise: np.zeros(len(u), np.float32),
    "striped": lambda u, v, noise: ((v % 1) < 0.5).astype(np.float32),
    "checked": lambda u, v, noise: ((np.floor(u) + np.floor(v)) % 2).astype(np.float32),
    "spotted": lambda u, v, noise: ((u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.075).astype(np.float32),
    "mottled": lambda u, v, noise: noise_at(noise, u * 0.35, v * 0.35),
    "tiles": lambda u, v, noise: (
        np.maximum(_line(u, 0.025), _line(v, 0.025))
        + 0.25 * noise_at(3, np.floor(u + 0.5) * 0.17, np.floor(v + 0.5) * 0.13)
    ),
    "planks": _planks,
    "bricks": _bricks,
    "paper": lambda u, v, noise: 0.6 * ((u % 1) < 0.5) + 0.4 * _line(u * 2, 0.06),
}
