"""Rays against triangles (embree), light, and a camera that behaves like one.

Lengths are metres, y is up.  `depth` is the distance along the camera's axis, infinite where there is sky.
"""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from ..extras import extra

with extra("world", "the world needs"):
    from embreex.mesh_construction import TriangleMesh
    from embreex.rtcore_scene import EmbreeScene

from .shapes import Mesh
from .surfaces import Surface, albedo, noise_at


@dataclass
class Piece:
    """A mesh with its surface and its place.  `thing` is the index of the thing it belongs to, -1 for the rest."""

    mesh: Mesh
    surface: Surface
    position: np.ndarray
    scale: np.ndarray | float = 1.0
    turn: float = 0.0
    tilt: float = 0.0
    thing: int = -1

    @cached_property
    def rotation(self) -> np.ndarray:
        c, s = np.cos(self.tilt), np.sin(self.tilt)
        tilt = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
        c, s = np.cos(self.turn), np.sin(self.turn)
        return (np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]) @ tilt).astype(np.float32)

    def vertices(self) -> np.ndarray:
        """float32[V, 3] in the world."""
        scaled = self.mesh.vertices * np.float32(self.scale)
        return scaled @ self.rotation.T + np.float32(self.position)


@dataclass
class Camera:
    position: np.ndarray
    target: np.ndarray
    width: int
    height: int
    fov: float = 1.0  # of the longer side, radians
    roll: float = 0.0

    @cached_property
    def axes(self) -> np.ndarray:
        """Rows right, up, forward: float64[3, 3]."""
        forward = self.target - self.position
        forward = forward / np.linalg.norm(forward)
        right = np.cross(forward, [0.0, 1.0, 0.0])
        right /= np.linalg.norm(right)
        up = np.cross(right, forward)
        c, s = np.cos(self.roll), np.sin(self.roll)
        return np.stack([c * right + s * up, c * up - s * right, forward])

    def focal(self) -> float:
        """In pixels."""
        return max(self.width, self.height) / 2 / np.tan(self.fov / 2)

    def rays(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Directions float32[3, n] through points of the picture (pixels, centres at .5), with forward length 1."""
        right, up, forward = np.float32(self.axes)[..., None]
        f = np.float32(self.focal())
        across, down = (x - np.float32(self.width / 2)) / f, (y - np.float32(self.height / 2)) / f
        return across * right - down * up + forward

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, y (pixels) and depth of points of the world."""
        local = (points - self.position) @ self.axes.T
        z = np.maximum(local[:, 2], 1e-6)
        f = self.focal()
        return self.width / 2 + f * local[:, 0] / z, self.height / 2 - f * local[:, 1] / z, local[:, 2]


@dataclass
class Light:
    """A sun (`direction` towards it) or a lamp (`position`, colour at one metre); `size` softens its shadows."""

    colour: np.ndarray
    direction: np.ndarray | None = None
    position: np.ndarray | None = None
    size: float = 0.0


@dataclass
class Setting:
    """Everything about the light and the lens."""

    lights: list[Light]
    sky_low: np.ndarray
    sky_high: np.ndarray
    ambient: float
    ground_bounce: np.ndarray
    clouds: float = 0.0
    fog: float = 0.0
    exposure: float = 1.0
    tint: np.ndarray = field(default_factory=lambda: np.ones(3, np.float32))
    noise: float = 0.01
    vignette: float = 0.2
    blur: float = 0.0
    occlusion: float = 0.5  # metres around a point that keep the ambient light off


class Geometry:
    """All triangles of a scene, ready for rays.  With a camera, only of pieces that may be in its picture."""

    def __init__(self, pieces: list[Piece], camera: Camera | None = None):
        pieces = pieces if camera is None else _in_view(pieces, camera)
        self.pieces = pieces
        counts = [len(piece.mesh.faces) for piece in pieces]
        self.piece_of = np.repeat(np.arange(len(pieces), dtype=np.int16), counts)
        self.thing_of = np.array([piece.thing for piece in pieces], np.int32)
        self.triangles = np.concatenate([piece.vertices()[piece.mesh.faces] for piece in pieces])
        self.normals = np.concatenate([_turned_normals(piece) for piece in pieces], axis=1)
        self.scene = EmbreeScene()
        TriangleMesh(self.scene, self.triangles)


def _in_view(pieces: list[Piece], camera: Camera) -> list[Piece]:
    """Those whose bounding sphere reaches into a cone about the picture, a little wider than it."""
    turns = np.stack([piece.rotation for piece in pieces])
    scaled = np.stack([piece.mesh.middle * piece.scale for piece in pieces])
    centres = np.stack([piece.position for piece in pieces]) - camera.position
    centres += np.einsum("pij,pj->pi", turns, scaled)
    radii = np.array([piece.mesh.radius * np.max(piece.scale) for piece in pieces])
    ahead = centres @ camera.axes[2]
    aside = np.sqrt(np.maximum((centres**2).sum(1) - ahead**2, 0))
    half = np.arctan(np.hypot(camera.width, camera.height) / 2 / camera.focal()) + 0.05
    inside = aside * np.cos(half) - ahead * np.sin(half) < radii
    return [piece for piece, seen in zip(pieces, inside & (ahead > -radii), strict=True) if seen]


def _turned_normals(piece: Piece) -> np.ndarray:
    """float32[9, F]: the normal at the first corner, and its change towards the second and the third."""
    turn = piece.rotation / np.float32(piece.scale)
    first, second, third = (turn @ piece.mesh.normals[:, corner].T for corner in range(3))
    return np.concatenate([first, second - first, third - first])


@dataclass
class Rendering:
    """image uint8[H, W, 3]; depth float32[H, W], metres along the axis; piece int16[H, W], -1 for sky."""

    image: np.ndarray
    depth: np.ndarray
    piece: np.ndarray


def render(geometry: Geometry, camera: Camera, setting: Setting, rng) -> Rendering:
    height, width = shape = (camera.height, camera.width)
    first = _Hits(geometry, camera, *_centres(height, width))
    light = _Lighting(geometry, setting, rng)
    openness = light.openness(first, shape)
    colour = light.colour(first, openness, shape)
    piece_map = first.piece.reshape(shape)
    rows = np.flatnonzero(_edges(piece_map))
    if len(rows):  # where something ends its colour runs into the next, as through a lens
        row, column = np.divmod(rows, width)
        beside = np.take(colour, rows - np.sign(column), 1) + np.take(colour, rows + (column < width - 1), 1)
        beside += np.take(colour, rows - width * np.sign(row), 1)
        beside += np.take(colour, rows + width * (row < height - 1), 1)
        colour[:, rows] = np.take(colour, rows, 1) * np.float32(0.6) + beside * np.float32(0.1)
    return Rendering(_develop(colour.reshape(3, *shape), setting, rng), first.depth.reshape(shape), piece_map)


def distances(geometry: Geometry, camera: Camera) -> np.ndarray:
    """The depth of a rendering alone, float32[H, W] in metres, infinite where there is sky: a fifth of the time."""
    directions = camera.rays(*_centres(camera.height, camera.width))
    origins = np.repeat(np.float32(camera.position)[None], directions.shape[1], 0)
    found = geometry.scene.run(origins, _rows(directions), query="DISTANCE").reshape(camera.height, camera.width)
    return np.where(found < 1e20, found, np.float32(np.inf))


@lru_cache(maxsize=4)
def _centres(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """x, y of every pixel's centre, row by row."""
    y, x = np.mgrid[0:height, 0:width].reshape(2, -1).astype(np.float32) + np.float32(0.5)
    return x, y


def _edges(piece: np.ndarray) -> np.ndarray:
    edge = np.zeros(piece.shape, bool)
    across, down = piece[:, 1:] != piece[:, :-1], piece[1:] != piece[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge


# Vectors are float32[3, n]: numpy is several times faster along a long last axis.


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    result = a[0] * b[0]
    result += a[1] * b[1]
    result += a[2] * b[2]
    return result


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / (np.sqrt(_dot(vectors, vectors)) + np.float32(1e-9))


def _rows(vectors: np.ndarray) -> np.ndarray:
    """As embree takes them."""
    return np.ascontiguousarray(vectors.T)


class _Hits:
    """What rays from the camera meet.

    directions, depth, piece: of all rays.  rows: those that meet something, sorted by the piece that they meet; ahead,
    distance, normal, points, lifted: of these.  runs: (piece, start, stop) in that order.
    """

    def __init__(self, geometry, camera, x, y):
        self.directions = camera.rays(x, y)
        origins = np.repeat(np.float32(camera.position)[None], len(x), 0)
        hit = geometry.scene.run(origins, _rows(self.directions), output=1)
        face = hit["primID"]
        seen = face >= 0
        self.depth = np.where(seen, hit["tfar"], np.float32(np.inf))
        self.piece = np.where(seen, geometry.piece_of[face], np.int16(-1))
        order = np.argsort(self.piece, kind="stable")
        self.rows = rows = order[np.count_nonzero(~seen) :].astype(np.int32)
        own = self.piece[rows]
        starts = np.flatnonzero(np.diff(own, prepend=-2))
        self.runs = list(zip(own[starts].tolist(), starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True))
        self.distance = hit["tfar"][rows]
        self.ahead = np.take(self.directions, rows, 1)
        corner = np.take(geometry.normals, face[rows], 1)
        corner[3:6] *= hit["u"][rows]
        corner[6:] *= hit["v"][rows]
        self.normal = _towards(_unit(corner[:3] + corner[3:6] + corner[6:]), self.ahead)
        self.points = self.ahead * self.distance
        self.points += np.float32(camera.position)[:, None]
        self.lifted = self.points + self.normal * (np.float32(1e-3) + np.float32(4e-4) * self.distance)


def _towards(normal, directions):
    """Normals on the side of the one who looks."""
    return normal * np.where(_dot(normal, directions) > 0, np.float32(-1), np.float32(1))


class _Lighting:
    def __init__(self, geometry, setting, rng):
        self.geometry, self.setting, self.rng = geometry, setting, rng
        self.gloss = np.array([piece.surface.gloss for piece in geometry.pieces], np.float32)

    def openness(self, hits: _Hits, shape) -> np.ndarray:
        """How much of the sky each pixel sees, float32[H * W]: rays on one pixel of nine, smoothed."""
        height, width = shape
        index = np.full(height * width, -1, np.int32)
        index[hits.rows] = np.arange(len(hits.rows), dtype=np.int32)
        sparse = index.reshape(shape)[1 : height - height % 3 : 3, 1 : width - width % 3 : 3]
        rows = sparse[sparse >= 0]
        values = np.ones(sparse.shape, np.float32)
        if len(rows):
            lifted = _rows(np.take(hits.lifted, rows, 1))
            normal = np.take(hits.normal, rows, 1) * np.float32(1.05)
            distance = self.geometry.scene.run(lifted, _rows(self._scattered(len(rows)) + normal), query="DISTANCE")
            found = np.minimum(distance / np.float32(self.setting.occlusion), 1)
            values[sparse >= 0] = np.float32(0.25) + np.float32(0.75) * found
        values = np.repeat(np.repeat(_smooth(values), 3, 0), 3, 1)
        values = np.pad(values, ((0, height - len(values)), (0, width - values.shape[1])), mode="edge")
        return _smooth(values).ravel()

    def _scattered(self, count: int) -> np.ndarray:
        """Unit vectors in all directions, float32[3, count]: a stretch of a long table."""
        table = _table_of_directions()
        start = int(self.rng.integers(table.shape[1]))
        return np.take(table, np.arange(start, start + count), 1, mode="wrap")

    def colour(self, hits: _Hits, openness, shape=None) -> np.ndarray:
        """Linear RGB float32[3, n] of all rays; `shape` when they are a picture, whose soft shadows are smoothed."""
        setting, rows = self.setting, hits.rows
        if not len(rows):
            return _sky(setting, hits.directions)
        base = self._albedo(hits)
        up = np.float32(0.5) + np.float32(0.5) * hits.normal[1]
        low, high = (np.float32(tone)[:, None] for tone in (setting.ground_bounce, setting.sky_high))
        lit = (low + (high - low) * up) * (openness[rows] * np.float32(setting.ambient)) * base
        for light in setting.lights:
            self._add(lit, light, hits, base, shape)
        if setting.fog:
            share = np.exp(hits.distance * np.float32(-setting.fog))
            lit = lit * share + np.float32(setting.sky_low)[:, None] * (1 - share)
        whole = len(rows) == hits.directions.shape[1]
        result = np.empty_like(lit) if whole else _sky(setting, hits.directions)
        for channel in range(3):
            result[channel][rows] = lit[channel]
        return result

    def _albedo(self, hits: _Hits) -> np.ndarray:
        base = np.empty_like(hits.points)
        for index, start, stop in hits.runs:
            piece = self.geometry.pieces[index]
            turn = piece.rotation.T
            local = turn @ (hits.points[:, start:stop] - np.float32(piece.position)[:, None])
            base[:, start:stop] = albedo(piece.surface, local, turn @ hits.normal[:, start:stop])
        return base

    def _add(self, lit, light: Light, hits: _Hits, base, shape) -> None:
        """Add one light to the colours of the rows."""
        if light.direction is not None:
            aim = np.float32(light.direction)[:, None]
            strength = facing = _dot(hits.normal, aim)
        else:
            aim = np.float32(light.position)[:, None] - hits.lifted
            squared = np.maximum(_dot(aim, aim), np.float32(0.05))
            facing = _dot(hits.normal, aim)
            strength = facing / (squared * np.sqrt(squared))
        lit_side = np.flatnonzero(facing > 0)
        if not len(lit_side):
            return
        strength = strength * self._visible(light, hits, aim, lit_side, shape)
        tone = np.float32(light.colour)[:, None]
        lit += base * strength * tone
        for index, start, stop in hits.runs:
            gloss = self.gloss[index]
            if gloss > 0:
                towards = _unit(aim if aim.shape[1] == 1 else aim[:, start:stop])
                half = _unit(towards - _unit(hits.ahead[:, start:stop]))
                spot = np.maximum(_dot(half, hits.normal[:, start:stop]), 0) ** 2
                spot = ((spot * spot * spot) ** 2) ** 2  # to the 24th
                lit[:, start:stop] += spot * spot * (strength[start:stop] * gloss) * tone

    def _visible(self, light: Light, hits: _Hits, aim, lit_side, shape) -> np.ndarray:
        """Share of the light that reaches each point, 0 for those that face away."""
        soft = light.size and shape is not None
        if soft:  # half the pixels of a sun's shadow, a quarter of a lamp's; the rest from their neighbours
            pixels = hits.rows[lit_side]
            row, column = np.divmod(pixels, np.int32(shape[1]))
            traced = ((row + column) & 1 == 0) if light.direction is not None else ((row | column) & 1 == 0)
            lit_side, everyone = lit_side[traced], lit_side
        count = len(lit_side)
        aim = np.repeat(aim, count, 1) if aim.shape[1] == 1 else np.take(aim, lit_side, 1)
        if soft:
            aim += self._scattered(count) * np.float32(1.5 * light.size)
        reach = np.full(count, 1e9 if light.direction is not None else 1, np.float32)
        start = _rows(np.take(hits.lifted, lit_side, 1))
        found = (self.geometry.scene.run(start, _rows(aim), reach, query="OCCLUDED") < 0).astype(np.float32)
        visible = np.zeros(len(hits.rows), np.float32)
        if soft:
            light_map, weight = np.zeros(shape, np.float32), np.full(shape, np.float32(1e-6))
            light_map.ravel()[pixels[traced]], weight.ravel()[pixels[traced]] = found, 1
            if light.direction is None:
                light_map, weight = _smooth(light_map), _smooth(weight)
            visible[everyone] = (_smooth(light_map) / _smooth(weight)).ravel()[pixels]
        else:
            visible[lit_side] = found
        return visible


@lru_cache(maxsize=1)
def _table_of_directions() -> np.ndarray:
    return _unit(np.random.default_rng(11).standard_normal((3, 1 << 17), np.float32))


@lru_cache(maxsize=1)
def _grains() -> np.ndarray:
    """Noise of a sensor; pictures take pieces of it."""
    return np.random.default_rng(12).standard_normal((3, 2048, 2048), np.float32)


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean over 3 × 3."""
    padded = np.pad(values, 1, mode="edge")
    rows = padded[:-2] + padded[1:-1]
    rows += padded[2:]
    result = rows[:, :-2] + rows[:, 1:-1]
    result += rows[:, 2:]
    result /= np.float32(9)
    return result


def _sky(setting, directions):
    unit = _unit(directions)
    share = np.clip(unit[1] * np.float32(2.2), 0, 1)
    low, high = (np.float32(tone)[:, None] for tone in (setting.sky_low, setting.sky_high))
    colour = low + (high - low) * share
    if setting.clouds:
        flat = np.float32(0.24) / (np.abs(unit[1]) + np.float32(0.12))
        puff = noise_at(0, unit[0] * flat, unit[2] * flat)
        cover = np.clip((puff - np.float32(1 - setting.clouds)) * 3, 0, 1) * np.clip(unit[1] * 8, 0, 1)
        colour += (np.float32(0.95) - colour) * cover
    return colour


def _develop(colour, setting, rng):
    """Linear light float32[3, H, W] → uint8[H, W, 3], with the faults of a small camera."""
    _, height, width = colour.shape
    y, x = np.linspace(-1, 1, height, dtype=np.float32), np.linspace(-1, 1, width, dtype=np.float32)
    grey = np.minimum(colour.mean(0), 2).mean()
    gain = setting.exposure * (0.34 / max(grey, 1e-3)) ** 0.8  # not quite to the same brightness
    fall = np.float32(gain) * (1 - np.float32(setting.vignette / 2) * (y[:, None] ** 2 + x[None] ** 2))
    colour = colour * fall * np.float32(setting.tint)[:, None, None]
    colour *= (1 + colour * np.float32(0.12)) / (1 + colour * np.float32(0.6))  # the shoulder of film
    if setting.blur:
        colour = _blurred(colour, setting.blur)
    colour = np.sqrt(np.maximum(colour, 0))
    top, left = rng.integers(2048 - height), rng.integers(2048 - width)
    colour += _grains()[:, top : top + height, left : left + width] * np.float32(setting.noise)
    values = (np.clip(colour, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    return np.ascontiguousarray(values.transpose(1, 2, 0))


def _blurred(colour, amount):
    """A three-tap blur in both directions."""
    side = np.float32(amount / 3)
    middle = 1 - 2 * side
    padded = np.pad(colour, ((0, 0), (1, 1), (0, 0)), mode="edge")
    colour = padded[:, 1:-1] * middle + (padded[:, :-2] + padded[:, 2:]) * side
    padded = np.pad(colour, ((0, 0), (0, 0), (1, 1)), mode="edge")
    return padded[:, :, 1:-1] * middle + (padded[:, :, :-2] + padded[:, :, 2:]) * side
