"""Meshes of things that have a name.

Every mesh stands on y = 0, is centred on the y axis, and is about one unit large; +z is its front.  A shape has
`VARIANTS` variants, so that no two mugs need be alike; each is built once per process and depends on nothing else.
"""

from functools import cache

import numpy as np

VARIANTS = 12
SMOOTH_BELOW = np.cos(np.radians(42))  # edges flatter than this are rounded by the light


class Mesh:
    """vertices float32[V, 3]; faces int32[F, 3]; normals float32[F, 3, 3], one per corner."""

    def __init__(self, vertices, faces):
        self.vertices = np.asarray(vertices, np.float32)
        self.faces = _with_area(self.vertices, np.asarray(faces, np.int32))
        self.normals = _corner_normals(self.vertices, self.faces)
        self.extent = tuple(np.ptp(self.vertices, axis=0).tolist())
        self.middle = (self.vertices.min(0) + self.vertices.max(0)) / 2
        self.radius = float(np.linalg.norm(self.vertices - self.middle, axis=1).max())  # of a ball about the middle


def _with_area(vertices, faces) -> np.ndarray:
    """Without the triangles that a profile on the axis shrinks to nothing."""
    corners = vertices[faces]
    double = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    return faces[double > 1e-9]


def _corner_normals(vertices, faces) -> np.ndarray:
    corners = vertices[faces]
    flat = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    unit = flat / np.maximum(length, 1e-12)
    # Corners at one place, whatever vertex they name: neighbours in a pair contribute when their edge is flat enough.
    _, place = np.unique(np.round(corners.reshape(-1, 3), 5), axis=0, return_inverse=True)
    place = place.ravel()
    order = np.argsort(place, kind="stable")
    face_of = order // 3
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    counts = np.diff(np.append(starts, len(order)))
    normals = np.empty((len(order), 3), np.float32)
    for count in np.unique(counts):  # groups of one size at a time
        rows = starts[counts == count][:, None] + np.arange(count)
        own = unit[face_of[rows]]  # [G, count, 3]
        weight = (np.einsum("gid,gjd->gij", own, own) > SMOOTH_BELOW) * length[face_of[rows]].transpose(0, 2, 1)
        normals[order[rows]] = np.einsum("gij,gjd->gid", weight, own)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    return normals.reshape(-1, 3, 3)


# Parts


def join(*parts):
    """[(vertices, faces), …] → one."""
    vertices, faces, start = [], [], 0
    for v, f in parts:
        vertices.append(np.asarray(v, np.float32))
        faces.append(np.asarray(f, np.int32) + start)
        start += len(v)
    return np.concatenate(vertices), np.concatenate(faces)


def move(part, by=(0, 0, 0), scale=(1, 1, 1), turn=0.0, tilt=0.0):
    """Scale, then tilt about x, then turn about y (radians), then move."""
    v = np.asarray(part[0], np.float64) * scale
    c, s = np.cos(tilt), np.sin(tilt)
    v = v @ np.array([[1, 0, 0], [0, c, s], [0, -s, c]])
    c, s = np.cos(turn), np.sin(turn)
    v = v @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    return v + by, part[1]


def box(width=1.0, height=1.0, depth=1.0, at=(0, 0, 0)):
    """Stands on y = 0 at `at`."""
    x, y, z = width / 2, height, depth / 2
    v = np.array([[i, j, k] for i in (-x, x) for j in (0, y) for k in (-z, z)]) + at
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    return v, [t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))]


# Below 1 while a coarse mesh is built, for things that are small in the picture.
_fineness = 1.0


def _fine(count: int) -> int:
    return max(min(count, 7), round(count * _fineness))


def lathe(profile, segments=24):
    """Turn (radius, height) points about the y axis; ends on the axis are closed."""
    segments = _fine(segments)
    profile = np.asarray(profile, np.float64)
    angle = np.linspace(0, 2 * np.pi, segments, endpoint=False)
    rings = np.stack(
        [
            profile[:, :1] * np.sin(angle),
            np.repeat(profile[:, 1:], segments, 1),
            profile[:, :1] * np.cos(angle),
        ],
        -1,
    )  # [P, S, 3]
    i, j = np.meshgrid(np.arange(len(profile) - 1), np.arange(segments), indexing="ij")
    a, b = i * segments + j, i * segments + (j + 1) % segments
    c, d = a + segments, b + segments
    faces = np.concatenate([np.stack([a, b, d], -1).reshape(-1, 3), np.stack([a, d, c], -1).reshape(-1, 3)])
    return rings.reshape(-1, 3), faces


def ball(radius=0.5, at=(0, 0, 0), rows=13):
    t = np.linspace(0, np.pi, _fine(rows))
    v, f = lathe(np.stack([radius * np.sin(t), radius - radius * np.cos(t)], -1), 2 * rows)
    return v + at, f


def tube(points, radius, segments=8):
    """A round bar along a line of points."""
    segments = max(5, _fine(segments))
    points = np.asarray(points, np.float64)
    along = np.gradient(points, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    side = np.cross(along, np.where(np.abs(along[:, 1:2]) < 0.9, [[0, 1, 0]], [[1, 0, 0]]))
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    up = np.cross(side, along)
    angle = np.linspace(0, 2 * np.pi, segments, endpoint=False)
    ring = points[:, None] + radius * (
        np.cos(angle)[None, :, None] * side[:, None] + np.sin(angle)[None, :, None] * up[:, None]
    )
    i, j = np.meshgrid(np.arange(len(points) - 1), np.arange(segments), indexing="ij")
    a, b = i * segments + j, i * segments + (j + 1) % segments
    c, d = a + segments, b + segments
    faces = np.concatenate([np.stack([a, b, d], -1).reshape(-1, 3), np.stack([a, d, c], -1).reshape(-1, 3)])
    return ring.reshape(-1, 3), faces


def prism(outline, depth, bevel=0.0):
    """A flat outline [(x, y), …], convex or star-shaped about its mean, made `depth` thick along z."""
    outline = np.asarray(outline, np.float64)
    n, middle = len(outline), outline.mean(0)
    front, back = (np.column_stack([outline, np.full(n, z)]) for z in (depth / 2, -depth / 2))
    v = np.concatenate([front, back, [[*middle, depth / 2 + bevel], [*middle, -depth / 2 - bevel]]])
    k = np.arange(n)
    nxt = (k + 1) % n
    faces = np.concatenate(
        [
            np.stack([k, nxt, np.full(n, 2 * n)], -1),
            np.stack([n + nxt, n + k, np.full(n, 2 * n + 1)], -1),
            np.stack([k, n + k, n + nxt], -1),
            np.stack([k, n + nxt, nxt], -1),
        ]
    )
    return v, faces


def leaves(rng, count, radius, centre, size):
    """A cloud of small triangles: foliage."""
    middle = rng.normal(size=(count, 3))
    middle *= (radius * rng.random((count, 1)) ** 0.4) / np.linalg.norm(middle, axis=1, keepdims=True)
    corners = middle[:, None] + rng.normal(size=(count, 3, 3)) * size + centre
    return corners.reshape(-1, 3), np.arange(3 * count).reshape(-1, 3)


# Things.  Each takes a generator and returns a part; `_upright` puts it on the ground at unit size.


def _ball(rng):
    return ball(0.5)


def _cube(rng):
    return box()


def _cylinder(rng):
    h = rng.uniform(0.7, 1.6)
    return lathe([(0, 0), (0.5, 0), (0.5, h), (0, h)])


def _cone(rng):
    h = rng.uniform(0.8, 1.5)
    return lathe([(0, 0), (0.5, 0), (0.04, h), (0, h)])


def _pyramid(rng):
    h = rng.uniform(0.7, 1.2)
    v = [[-0.5, 0, -0.5], [0.5, 0, -0.5], [0.5, 0, 0.5], [-0.5, 0, 0.5], [0, h, 0]]
    return v, [(0, 1, 2), (0, 2, 3), (0, 4, 1), (1, 4, 2), (2, 4, 3), (3, 4, 0)]


def _ring(rng):
    """Standing, its hole to the front."""
    thick = rng.uniform(0.1, 0.17)
    t = np.linspace(0, 2 * np.pi, 33)
    return tube(np.column_stack([(0.5 - thick) * np.sin(t), (0.5 - thick) * np.cos(t), 0 * t]), thick, 12)


def _mug(rng):
    r, h = rng.uniform(0.36, 0.46), rng.uniform(0.8, 1.0)
    body = lathe([(0, 0), (r, 0), (r, h), (r - 0.05, h), (r - 0.05, 0.08), (0, 0.08)])
    t = np.linspace(-1.25, 1.25, 12)
    handle = np.column_stack([r - 0.04 + 0.3 * np.cos(t), h / 2 + 0.33 * np.sin(t), 0 * t])
    return join(body, tube(handle, 0.055))


def _profile(rng, heights, radii):
    """A smooth profile through the given radii."""
    h = np.linspace(heights[0], heights[-1], 22)
    return np.column_stack([np.interp(h, heights, radii), h])


def _vase(rng):
    belly, neck, lip = rng.uniform(0.3, 0.5), rng.uniform(0.1, 0.18), rng.uniform(0.16, 0.28)
    t = np.linspace(0, 1, 17)
    base = rng.uniform(0.14, 0.26)
    at = rng.uniform(0.25, 0.5)
    bump = np.exp(-(((t - at) / rng.uniform(0.16, 0.28)) ** 2))
    r = base * (1 - t) + neck * t + (belly - base) * bump
    r += (lip - neck) * np.clip((t - 0.86) / 0.14, 0, 1) ** 2
    outer = np.column_stack([r, 1.2 * t])
    return lathe(np.concatenate([[(0, 0)], outer, [(r[-1] - 0.03, 1.2), (r[-1] - 0.05, 1.1), (0, 1.0)]]))


def _bottle(rng):
    r, shoulder, neck = rng.uniform(0.2, 0.28), rng.uniform(0.6, 0.85), rng.uniform(0.06, 0.09)
    top = rng.uniform(1.2, 1.4)
    t = np.linspace(0, np.pi / 2, 7)
    curve = np.column_stack([neck + (r - neck) * np.cos(t), shoulder + 0.22 * np.sin(t)])
    cap = [(neck, top - 0.1), (neck + 0.025, top - 0.1), (neck + 0.025, top), (0, top)]
    return lathe(np.concatenate([[(0, 0), (r, 0)], curve, cap]))


def _bowl(rng):
    t = np.linspace(0, np.pi / 2 * rng.uniform(0.85, 1.0), 9)
    outer = np.column_stack([0.5 * np.sin(t), 0.42 * (1 - np.cos(t)) + 0.06])
    inner = outer[::-1] * (0.9, 1) + (0, 0.03)
    return lathe(np.concatenate([[(0, 0), (0.2, 0), (0.18, 0.06)], outer[2:], inner[:-1], [(0, 0.09)]]))


def _table(rng):
    h, w, d, leg = rng.uniform(0.55, 0.8), 1.0, rng.uniform(0.55, 0.9), rng.uniform(0.05, 0.09)
    if rng.random() < 0.35:  # round, on one foot
        return join(
            move(lathe([(0, 0), (0.5, 0), (0.5, 0.06), (0, 0.06)]), (0, h, 0)),
            lathe([(0, 0), (0.26, 0), (0.26, 0.04), (leg, 0.08), (leg, h), (0, h)]),
        )
    legs = [box(leg, h, leg, (x, 0, z)) for x in (-w / 2 + leg, w / 2 - leg) for z in (-d / 2 + leg, d / 2 - leg)]
    return join(box(w, 0.06, d, (0, h, 0)), *legs)


def _chair(rng):
    seat, back, leg, w = rng.uniform(0.42, 0.5), rng.uniform(0.45, 0.6), rng.uniform(0.045, 0.07), 0.5
    legs = [box(leg, seat, leg, (x, 0, z)) for x in (-0.22, 0.22) for z in (-0.22, 0.22)]
    parts = [box(w, 0.06, w, (0, seat, 0)), *legs]
    if rng.random() < 0.5:
        parts.append(box(w, back, 0.05, (0, seat, -0.23)))
    else:
        parts += [box(0.06, back, 0.05, (x, seat, -0.23)) for x in (-0.21, 0, 0.21)]
        parts.append(box(w, 0.1, 0.055, (0, seat + back - 0.05, -0.23)))
    return join(*parts)


def _tree(rng):
    trunk = lathe([(0, 0), (0.09, 0), (0.06, 0.6), (0, 0.6)], 10)
    kind = rng.integers(3)
    if kind == 0:  # a fir
        levels = rng.integers(3, 5)
        cones = [
            move(lathe([(0, 0), (0.42 * (1 - 0.2 * k), 0), (0, 0.5)], 20), (0, 0.28 + 0.27 * k, 0))
            for k in range(levels)
        ]
        return join(trunk, *cones)
    if kind == 1:  # a round crown of balls
        crown = [
            ball(
                rng.uniform(0.18, 0.3),
                (*rng.uniform(-0.18, 0.18, 1), rng.uniform(0.45, 0.8), rng.uniform(-0.18, 0.18)),
                10,
            )
            for _ in range(7)
        ]
        return join(trunk, *crown)
    return join(trunk, leaves(rng, 380, 0.42, (0, 0.85, 0), 0.07))


def _house(rng):
    w, d, h = 1.0, rng.uniform(0.7, 1.1), rng.uniform(0.5, 0.75)
    roof = prism([(-w / 2 - 0.08, h), (w / 2 + 0.08, h), (0, h + rng.uniform(0.35, 0.55))], d + 0.14)
    door = box(0.2, 0.36, 0.04, (rng.uniform(-0.25, 0.25), 0, d / 2))
    return join(box(w, h, d), roof, door, box(0.12, 0.35, 0.12, (0.25, h + 0.15, -d / 4)))


def _lamp(rng):
    foot = lathe([(0, 0), (0.2, 0), (0.2, 0.04), (0.03, 0.07), (0.03, 0.8), (0, 0.8)], 24)
    top, low = rng.uniform(0.14, 0.22), rng.uniform(0.28, 0.36)
    shade = lathe([(low - 0.02, 0.7), (low, 0.68), (top, 1.1), (top - 0.02, 1.1), (low - 0.03, 0.7)], 30)
    return join(foot, shade)


def _star(rng):
    t = np.arange(10) * np.pi / 5
    r = np.where(np.arange(10) % 2 == 0, 0.5, 0.21)
    return prism(np.column_stack([r * np.sin(t), r * np.cos(t)]), 0.16, 0.06)


def _arch(rng):
    t = np.linspace(0, np.pi, 15)
    outer, inner, foot = 0.5, rng.uniform(0.24, 0.32), rng.uniform(0.2, 0.4)
    parts = [box(outer - inner, foot, 0.3, (x * (outer + inner) / 2, 0, 0)) for x in (-1, 1)]
    for a, b in zip(t, t[1:], strict=False):
        quad = [(r * np.cos(s), foot + r * np.sin(s)) for r, s in ((inner, a), (outer, a), (outer, b), (inner, b))]
        parts.append(prism(quad, 0.3))
    return join(*parts)


def _egg(rng):
    t = np.linspace(0, np.pi, 20)
    r = 0.36 * np.sin(t) * (1 + 0.18 * np.cos(t))
    return lathe(np.column_stack([r, 0.5 - 0.5 * np.cos(t)]))


def _mushroom(rng):
    cap = rng.uniform(0.4, 0.52)
    t = np.linspace(np.pi / 2, np.pi, 9)
    dome = np.column_stack([cap * np.sin(t), 0.5 - 0.38 * np.cos(t)])
    return lathe(np.concatenate([[(0, 0), (0.15, 0), (0.11, 0.25), (0.12, 0.5), (cap, 0.48)], dome[:-1], [(0, 0.88)]]))


def _bench(rng):
    parts = [box(1.2, 0.05, 0.11, (0, 0.4, z)) for z in (-0.13, 0.0, 0.13)]
    parts += [box(0.07, 0.4, 0.36, (x, 0, 0)) for x in (-0.48, 0.48)]
    if rng.random() < 0.6:
        parts += [box(1.2, 0.1, 0.04, (0, y, -0.2)) for y in (0.55, 0.7)]
        parts += [box(0.06, 0.4, 0.05, (x, 0.4, -0.2)) for x in (-0.48, 0.48)]
    return join(*parts)


def _stairs(rng):
    n = int(rng.integers(4, 6))
    return join(*[box(0.9, (k + 1) / n * 0.9, 1 / n, (0, 0, 0.5 - (k + 0.5) / n)) for k in range(n)])


def _barrel(rng):
    t = np.linspace(-1, 1, 15)
    r = 0.42 - 0.1 * t**2
    side = np.column_stack([r, 0.5 + 0.5 * t])
    return lathe(np.concatenate([[(0, 0)], side, [(0.28, 1.0), (0.28, 0.94), (0, 0.94)]]))


def _bookcase(rng):
    n, w, h, d = int(rng.integers(3, 5)), 0.8, 1.3, 0.32
    boards = [box(w, 0.04, d, (0, k * (h - 0.04) / n, 0)) for k in range(n + 1)]
    books = []
    for k in range(n):
        x = -w / 2 + 0.06
        while x < w / 2 - 0.1:
            thick = rng.uniform(0.03, 0.07)
            if rng.random() < 0.75:
                books.append(
                    box(thick, rng.uniform(0.5, 0.85) * h / n, d * 0.7, (x + thick / 2, k * (h - 0.04) / n, 0))
                )
            x += thick + 0.008
    return join(
        *boards, *[box(0.04, h, d, (x, 0, 0)) for x in (-w / 2, w / 2)], box(w, h, 0.02, (0, 0, -d / 2)), *books
    )


def _car(rng):
    length, cabin = 1.0, rng.uniform(0.28, 0.36)
    body = box(length, 0.2, 0.44, (0, 0.1, 0))
    outline = [(-0.36, 0.3), (0.3, 0.3), (0.18, 0.3 + cabin * 0.6), (-0.26, 0.3 + cabin * 0.6)]
    wheel = move(lathe([(0, 0), (0.11, 0), (0.11, 0.08), (0, 0.08)], 18), (0, 0, 0), tilt=np.pi / 2)
    wheels = [move(wheel, (x, 0.11, z)) for x in (-0.3, 0.3) for z in (-0.24, 0.16)]
    return join(body, prism(outline, 0.4), *wheels)


def _doll(rng):
    """A standing figure."""
    arm = rng.uniform(0.1, 0.9)
    skirt = rng.random() < 0.5
    low = (
        lathe([(0, 0), (0.24, 0), (0.1, 0.5), (0, 0.5)], 20)
        if skirt
        else join(*[lathe([(0, 0), (0.075, 0), (0.085, 0.48), (0, 0.48)], 12) for _ in (0,)])
    )
    legs = low if skirt else join(move(low, (-0.09, 0, 0)), move(low, (0.09, 0, 0)))
    body = move(lathe([(0, 0), (0.16, 0), (0.19, 0.34), (0.08, 0.42), (0, 0.42)], 18), (0, 0.45, 0), (1, 1, 0.7))
    arms = [
        tube(
            [(x * 0.17, 0.82, 0), (x * (0.2 + 0.1 * arm), 0.66, 0.02), (x * (0.2 + 0.2 * arm), 0.5 + 0.3 * arm, 0.05)],
            0.045,
        )
        for x in (-1, 1)
    ]
    return join(legs, body, ball(0.13, (0, 0.86, 0), 12), *arms)


def _bag(rng):
    w, h, d = 0.8, rng.uniform(0.6, 0.9), rng.uniform(0.25, 0.4)
    v, f = box(w, h, d)
    v = np.where(v[:, 1:2] > 0, v * (0.86, 1, 0.7), v)
    t = np.linspace(0, np.pi, 12)
    handle = np.column_stack([0.2 * np.cos(t), h + 0.22 * np.sin(t), 0 * t])
    return join((v, f), tube(handle, 0.03))


def _sofa(rng):
    seat = rng.uniform(0.25, 0.32)
    parts = [box(1.3, seat, 0.55), box(1.3, 0.62, 0.16, (0, 0, -0.3))]
    parts += [box(0.16, 0.45, 0.6, (x, 0, 0)) for x in (-0.64, 0.64)]
    parts += [box(0.54, 0.1, 0.48, (x, seat, 0.04)) for x in (-0.28, 0.28)]
    return join(*parts)


def _cactus(rng):
    def bar(points):
        return join(tube(points, 0.11, 12), ball(0.11, np.array(points[-1]) - (0, 0.11, 0), 8))

    h = rng.uniform(0.8, 1.1)
    parts = [bar([(0, 0, 0), (0, h / 2, 0), (0, h, 0)])]
    for side in (-1, 1)[: int(rng.integers(1, 3))]:
        y = rng.uniform(0.3, 0.5)
        parts.append(bar([(0, y, 0), (side * 0.22, y, 0), (side * 0.3, y + 0.12, 0), (side * 0.3, y + 0.35, 0)]))
    pot = lathe([(0, 0), (0.2, 0), (0.28, 0.26), (0.24, 0.26), (0.22, 0.22), (0, 0.22)], 24)
    return join(pot, *[move(part, (0, 0.2, 0)) for part in parts])


def _hat(rng):
    h = rng.uniform(0.35, 0.6)
    return lathe([(0, 0), (0.5, 0), (0.5, 0.04), (0.3, 0.05), (0.27, h), (0, h + 0.03)])


def _bucket(rng):
    body = lathe([(0, 0), (0.3, 0), (0.42, 0.75), (0.45, 0.75), (0.45, 0.79), (0.39, 0.79), (0.28, 0.06), (0, 0.06)])
    t = np.linspace(0, np.pi, 14)
    return join(body, tube(np.column_stack([0.42 * np.cos(t), 0.76 + 0.34 * np.sin(t), 0 * t]), 0.02, 6))


BUILDERS = {
    "ball": _ball, "cube": _cube, "cylinder": _cylinder, "cone": _cone, "pyramid": _pyramid, "ring": _ring,
    "mug": _mug, "vase": _vase, "bottle": _bottle, "bowl": _bowl, "table": _table, "chair": _chair, "tree": _tree,
    "house": _house, "lamp": _lamp, "star": _star, "arch": _arch, "egg": _egg, "mushroom": _mushroom,
    "bench": _bench, "staircase": _stairs, "barrel": _barrel, "bookcase": _bookcase, "car": _car, "doll": _doll,
    "bag": _bag, "sofa": _sofa, "cactus": _cactus, "hat": _hat, "bucket": _bucket,
}  # fmt: skip
NOUNS = tuple(BUILDERS)
# Known only by what is on one side (a handle, a hole, a face): turned to the camera, at most so far off (radians).
FACING = {
    "mug": 0.9, "ring": 0.6, "star": 0.6, "arch": 0.6, "bag": 0.7, "staircase": 0.8, "house": 0.6, "bookcase": 0.7,
    "car": 0.9, "chair": 0.9, "sofa": 0.8, "bench": 0.7, "cactus": 0.6, "bucket": 0.9, "doll": 0.9,
}  # fmt: skip
# The longest side of each in metres, when things have their natural sizes; the rest are toys.
NATURAL = {
    "table": 1.1, "chair": 0.9, "tree": 4.0, "house": 6.0, "lamp": 0.7, "bench": 1.5, "staircase": 1.4, "barrel": 0.9,
    "bookcase": 1.8, "car": 3.6, "doll": 1.2, "sofa": 1.7, "arch": 2.0, "cactus": 0.8, "bag": 0.45, "hat": 0.35,
    "bucket": 0.4,
}  # fmt: skip


@cache
def mesh(noun: str, variant: int, fineness: float = 1.0) -> Mesh:
    """The mesh of a thing: unit size, standing on the ground."""
    global _fineness
    rng = np.random.default_rng([NOUNS.index(noun), variant])
    _fineness = fineness
    try:
        vertices, faces = BUILDERS[noun](rng)
    finally:
        _fineness = 1.0
    vertices = np.asarray(vertices, np.float64)
    low, high = vertices.min(0), vertices.max(0)
    middle = (low + high) / 2
    vertices = (vertices - (middle[0], low[1], middle[2])) / (high - low).max()
    return Mesh(vertices, faces)


@cache
def filler(name: str, variant: int) -> Mesh:
    """Things without a name in any question: bushes, rocks, heaps of sticks."""
    rng = np.random.default_rng([900 + len(name), variant])
    if name == "bush":
        part = leaves(rng, 420, 0.5, (0, 0.5, 0), 0.09)
    elif name == "grass":
        foot = rng.uniform(-0.5, 0.5, (260, 3)) * (1, 0, 1)
        lean = rng.normal(size=(260, 3)) * (0.12, 0, 0.12)
        tips = foot + lean + rng.uniform(0.3, 1, (260, 1)) * (0, 1, 0)
        side = rng.normal(size=(260, 3)) * (0.03, 0, 0.03)
        part = np.stack([foot - side, foot + side, tips], 1).reshape(-1, 3), np.arange(780).reshape(-1, 3)
    elif name == "rock":
        v, f = ball(0.5, rows=12)
        bumps = sum(np.sin(v @ rng.normal(size=3) * rng.uniform(3, 9) + rng.uniform(0, 6)) for _ in range(5))
        part = v * (1 + 0.07 * bumps[:, None]) * rng.uniform(0.6, 1.2, 3), f
    else:
        ends = rng.uniform(-0.5, 0.5, (14, 2, 3)) + (0, 0.5, 0)
        part = join(*[tube(np.linspace(a, b, 2), rng.uniform(0.01, 0.03), 6) for a, b in ends])
    vertices = np.asarray(part[0], np.float64)
    vertices -= (vertices.mean(0)[0], vertices.min(0)[1], vertices.mean(0)[2])
    return Mesh(vertices / np.ptp(vertices, axis=0).max(), part[1])


FILLERS = ("bush", "grass", "rock", "sticks")
