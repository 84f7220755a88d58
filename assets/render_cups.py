"""Renders assets/cups.jpg: three shaded cups on a wooden table. `python assets/render_cups.py` writes the same bytes.

Ray casting with NumPy: the cups are upright cylinders with an opening, the table a plane, and one lamp casts shadows.
"""

from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT, SAMPLES = 640, 448, 2  # pixels, and rays per pixel and axis
CAMERA, PITCH, FOCAL = np.array([0.0, 1.75, -3.4]), 0.42, 1.35
LAMP = np.array([-2.2, 4.2, -1.6])
# centre x, centre z, radius, height, colour
CUPS = (
    (-0.78, 0.95, 0.42, 0.86, (0.16, 0.42, 0.62)),
    (0.62, 0.25, 0.40, 0.80, (0.80, 0.33, 0.22)),
    (0.10, 2.35, 0.44, 0.92, (0.86, 0.72, 0.30)),
)
FAR = 1e9


def rays(width: int, height: int) -> np.ndarray:
    """Unit directions float[height, width, 3]; y is up, the camera looks along z and a little down."""
    x = (np.arange(width) + 0.5 - width / 2) / (height / 2)
    y = (height / 2 - np.arange(height) - 0.5) / (height / 2)
    x, y = np.meshgrid(x, y)
    z = np.full_like(x, FOCAL * 1.6)
    up, along = y * np.cos(PITCH) - z * np.sin(PITCH), y * np.sin(PITCH) + z * np.cos(PITCH)
    direction = np.stack([x, up, along], axis=-1)
    return direction / np.linalg.norm(direction, axis=-1, keepdims=True)


def hit_cup(origin, direction, cup):
    """Nearest hit of the wall (outside or inside) or the bottom: distance, normal, whether it is the inside."""
    x, z, radius, height, _ = cup
    ox, oy, oz = origin[..., 0] - x, origin[..., 1], origin[..., 2] - z
    dx, dy, dz = direction[..., 0], direction[..., 1], direction[..., 2]
    a, b, c = dx**2 + dz**2, ox * dx + oz * dz, ox**2 + oz**2 - radius**2
    root = np.sqrt(np.maximum(b**2 - a * c, 0))
    best = np.full(dx.shape, FAR)
    normal, inside = np.zeros(direction.shape), np.zeros(dx.shape, bool)
    for sign in (-1, 1):
        t = (-b + sign * root) / np.maximum(a, 1e-12)
        level = oy + t * dy
        hit = (b**2 > a * c) & (t > 1e-4) & (level > 0) & (level < height) & (t < best)
        outward = np.stack([ox + t * dx, np.zeros_like(t), oz + t * dz], axis=-1) / radius
        within = (outward * direction).sum(-1) > 0
        best = np.where(hit, t, best)
        normal = np.where(hit[..., None], np.where(within[..., None], -outward, outward), normal)
        inside = np.where(hit, within, inside)
    t = (0.3 * height - oy) / np.where(np.abs(dy) < 1e-9, 1e-9, dy)  # the tea inside
    hit = (t > 1e-4) & ((ox + t * dx) ** 2 + (oz + t * dz) ** 2 < radius**2) & (t < best)
    return np.where(hit, t, best), np.where(hit[..., None], [0.0, 1.0, 0.0], normal), inside | hit


def table_colour(point: np.ndarray) -> np.ndarray:
    """Planks along z with a slow grain; the noise is a sum of sines, so it needs no random numbers."""
    x, z = point[..., 0], point[..., 2]
    plank = np.floor(x / 0.55)
    grain = np.sin(38 * (x + 0.04 * np.sin(2.1 * z + plank * 2.7)) + 9 * np.sin(plank * 1.9)) * 0.5
    grain += np.sin(97 * x + 3 * np.sin(1.3 * z + plank)) * 0.25
    seam = np.abs(x / 0.55 - plank - 0.5) > 0.485
    base = np.array([0.56, 0.39, 0.25]) * (1 + 0.07 * np.sin(plank * 12.9)[..., None] + 0.07 * grain[..., None])
    return np.where(seam[..., None], base * 0.55, base)


def render() -> Image.Image:
    direction = rays(WIDTH * SAMPLES, HEIGHT * SAMPLES)
    origin = np.broadcast_to(CAMERA, direction.shape)
    distance = np.where(direction[..., 1] < -1e-6, -CAMERA[1] / np.minimum(direction[..., 1], -1e-6), FAR)
    point = origin + distance[..., None] * direction
    colour, normal = table_colour(point), np.broadcast_to([0.0, 1.0, 0.0], direction.shape).copy()
    gloss = np.full(distance.shape, 0.10)
    for cup in CUPS:
        t, cup_normal, inside = hit_cup(origin, direction, cup)
        nearer = t < distance
        paint = np.where(inside[..., None], np.array([0.93, 0.91, 0.86]), np.array(cup[4]))
        tea = inside & (cup_normal[..., 1] > 0.5)
        paint = np.where(tea[..., None], np.array([0.34, 0.17, 0.07]), paint)
        colour = np.where(nearer[..., None], paint, colour)
        normal = np.where(nearer[..., None], cup_normal, normal)
        gloss = np.where(nearer, 0.45, gloss)
        distance = np.minimum(t, distance)
    far = distance > 30
    point = origin + np.minimum(distance, 30)[..., None] * direction
    to_lamp = LAMP - point
    reach = np.linalg.norm(to_lamp, axis=-1, keepdims=True)
    to_lamp = to_lamp / reach
    start, lit = point + 2e-3 * normal, np.ones(distance.shape)
    for cup in CUPS:
        t, _, _ = hit_cup(start, to_lamp, cup)
        lit = np.where(t < reach[..., 0], 0.0, lit)
    contact = np.ones(distance.shape)
    for x, z, radius, *_ in CUPS:  # the dim ring where a cup stands
        gap = np.hypot(point[..., 0] - x, point[..., 2] - z) - radius
        contact *= np.where((gap > 0) & (normal[..., 1] > 0.5), 1 - 0.45 * np.exp(-gap / 0.09), 1)
    diffuse = np.maximum((normal * to_lamp).sum(-1), 0) * lit
    half = to_lamp - direction
    half = half / np.linalg.norm(half, axis=-1, keepdims=True)
    shine = gloss * np.maximum((normal * half).sum(-1), 0) ** 60 * lit
    fade = np.clip(14 / reach[..., 0] ** 2, 0, 1.1)
    light = (0.34 + 0.20 * normal[..., 1]) * contact + 0.95 * diffuse * fade
    picture = colour * light[..., None] + shine[..., None]
    wall = np.array([0.72, 0.74, 0.76]) * (0.62 + 0.5 * np.clip(direction[..., 1:2] + 0.25, 0, 1))
    haze = np.clip((distance - 6) / 6, 0, 1)[..., None]
    picture = np.where(far[..., None], wall, picture * (1 - haze) + wall * haze)
    picture = np.clip(picture, 0, 1) ** (1 / 1.5)
    picture = picture.reshape(HEIGHT, SAMPLES, WIDTH, SAMPLES, 3).mean(axis=(1, 3))
    return Image.fromarray((picture * 255).round().astype(np.uint8))


if __name__ == "__main__":
    target = Path(__file__).with_name("cups.jpg")
    render().save(target, quality=90, optimize=True)
    print(f"wrote {target}")
