"""Where things stand: ten kinds of places, from a table to a street, with their light and a camera in them."""

import math
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from . import shapes
from .render import Camera, Geometry, Light, Piece, Rendering, Setting, render
from .shapes import FACING, FILLERS, NATURAL, NOUNS, VARIANTS, Mesh, box, filler, lathe, mesh, tube
from .surfaces import COLOURS, PATTERNS, Surface, hsv, sample_colour, to_linear


@dataclass
class Thing:
    """Something that questions may be about."""

    noun: str
    colour: str
    pattern: str
    position: np.ndarray  # of its foot, or of its lowest point
    size: float  # of its longest side, metres
    radius: float  # around its axis


@dataclass
class Scene:
    """A place with things in it.  `taken` are nouns that the place itself could be called by: never asked about."""

    place: str
    things: list[Thing]
    pieces: list[Piece]
    camera: Camera
    setting: Setting
    taken: frozenset = frozenset()
    geometry: Geometry | None = field(default=None, repr=False)
    rendering: Rendering | None = field(default=None, repr=False)


PATTERN_SHARES = np.cumsum([0.64, 0.14, 0.12, 0.1])
GLOSS, TURNS = (0.0, 0.15, 0.6, 1.2), (0.0, 0.0, np.pi / 2, 0.6)
LEAST_THINGS, PATIENCE = 4, 12
FINENESS = ((45, 0.5), (110, 0.7))  # the fewer pixels a thing has, the fewer triangles it needs
WARM, COOL = np.float32([1.0, 0.86, 0.68]), np.float32([0.82, 0.92, 1.0])


@cache
def _part(name: str) -> Mesh:
    """Parts of unit size that places are built from: standing on y = 0, the ball about the origin."""
    if name == "block":
        return Mesh(*box())
    if name == "disc":
        return Mesh(*lathe([(0, 0), (0.5, 0), (0.5, 1), (0, 1)], 40))
    if name == "string":
        return Mesh(*tube([(0, 0, 0), (0, 1, 0)], 0.5, 5))
    return Mesh(*shapes.ball(0.5, (0, -0.5, 0)))


class Stage:
    """A scene while it is being built."""

    def __init__(self, rng, width: int, height: int):
        self.rng, self.width, self.height = rng, width, height
        self.pieces: list[Piece] = []
        self.things: list[Thing] = []
        self.taken: set[str] = set()
        self.spots: list[tuple] = []  # (position, radius, height) that are occupied
        self.eye = self.target = np.zeros(3)
        self.fov = rng.uniform(0.65, 1.1)
        nouns = rng.choice(len(NOUNS), rng.integers(4, 8), replace=False)
        self.nouns = [NOUNS[index] for index in nouns]
        self.colours = [list(COLOURS)[index] for index in rng.choice(len(COLOURS), rng.integers(4, 7), replace=False)]

    # What the place is made of

    def part(self, name, size, at, surface, turn=0.0):
        self.pieces.append(Piece(_part(name), surface, np.array(at, np.float64), np.float32(size), turn))

    def block(self, width, height, depth, at, surface, turn=0.0):
        self.part("block", (width, height, depth), at, surface, turn)

    def surface(self, kinds, tones=None, scale=(0.1, 0.4), gloss=0.1) -> Surface:
        rng = self.rng
        hue, saturation = rng.random(), rng.uniform(0.05, 0.45)
        value = rng.uniform(0.25, 0.9)
        if tones is not None:
            hue, saturation, value = (rng.uniform(*bounds) for bounds in tones)
        a = to_linear(hsv(hue, saturation, value))
        b = to_linear(
            hsv(hue + rng.normal() * 0.03, saturation * rng.uniform(0.6, 1.2), value * rng.uniform(0.45, 1.15))
        )
        kind = kinds[rng.integers(len(kinds))]
        return Surface(
            kind,
            a,
            np.clip(b, 0, 1),
            rng.uniform(*scale),
            turn=TURNS[rng.integers(len(TURNS))] if kind != "bricks" else 0.0,
            grain=rng.uniform(0.05, 0.4),
            grain_scale=rng.uniform(0.3, 3),
            gloss=gloss * rng.random() if rng.random() < 0.3 else 0.0,
            noise=int(rng.integers(5)),
        )

    def ground(self, size, surface, height=0.0, centre=(0, 0)):
        self.block(size, 0.02, size, (centre[0], height - 0.02, centre[1]), surface)

    def filler(self, name, at, size):
        rng = self.rng
        tones = {
            "bush": ((0.2, 0.4), (0.4, 0.8), (0.2, 0.5)),
            "grass": ((0.16, 0.35), (0.4, 0.8), (0.3, 0.6)),
            "rock": ((0.05, 0.1), (0.0, 0.25), (0.3, 0.6)),
            "sticks": ((0.05, 0.1), (0.2, 0.5), (0.2, 0.5)),
        }[name]
        surface = self.surface(["mottled"], tones)
        shape = filler(name, int(rng.integers(VARIANTS)))
        self.pieces.append(Piece(shape, surface, np.array(at, np.float64), size, rng.uniform(0, 2 * np.pi)))

    # Things

    def thing(self, at, size, noun=None, float_=False) -> bool:
        """Put one there unless it would touch another; True when it stands."""
        rng = self.rng
        noun = noun or self.nouns[rng.integers(len(self.nouns))]
        x, y, z = at = tuple(map(float, at))
        ahead = math.dist(at, self.eye)
        pixels = size / max(ahead, 1e-3) * max(self.width, self.height) / self.fov
        fineness = next((level for limit, level in FINENESS if pixels < limit), 1.0)
        shape = mesh(noun, int(rng.integers(VARIANTS)), fineness)
        wide, tall, deep = shape.extent
        radius, height = math.hypot(wide, deep) / 2 * size, tall * size
        if self._touches(at, radius, height, size):
            return False
        colour = self.colours[rng.integers(len(self.colours))]
        pattern = PATTERNS[int(np.searchsorted(PATTERN_SHARES, rng.random()))]
        towards = math.atan2(self.eye[0] - x, self.eye[2] - z)
        turn = towards + rng.uniform(-1, 1) * FACING[noun] if noun in FACING else rng.uniform(0, 2 * np.pi)
        if noun == "mug" and rng.random() < 0.5:
            turn += np.pi
        tilt = rng.uniform(-0.4, 0.4) if float_ else 0.0
        place, surface = np.array(at), self._painted(colour, pattern, size)
        self.pieces.append(Piece(shape, surface, place, size, turn, tilt, len(self.things)))
        self.things.append(Thing(noun, colour, pattern, place, size, radius))
        self.spots.append((at, radius, height))
        return True

    def _touches(self, at, radius, height, size) -> bool:
        """Whether it would stand in another thing, or in the camera."""
        x, y, z = at
        near = math.hypot(self.eye[0] - x, self.eye[2] - z) - radius
        if near < 0.25 * size and y - size < self.eye[1] < y + height + 0.3 * size:
            return True
        return any(
            math.hypot(other[0] - x, other[2] - z) < (radius + other_radius) * 0.95
            and y < other[1] + other_height
            and other[1] < y + height
            for other, other_radius, other_height in self.spots
        )

    def _painted(self, colour, pattern, size) -> Surface:
        """The surface of a thing: its colour, and white or black for the pattern, whichever shows."""
        rng = self.rng
        second = 0.08 if colour in ("white", "yellow", "pink", "grey", "turquoise", "orange") else 0.95
        return Surface(
            pattern,
            sample_colour(rng, colour),
            to_linear([second] * 3),
            scale=rng.uniform(0.14, 0.22) * size,
            grain=rng.uniform(0.03, 0.18),
            grain_scale=rng.uniform(1, 3) / size,
            gloss=GLOSS[rng.integers(len(GLOSS))],
            noise=int(rng.integers(5)),
        )

    def natural(self, distance: float = 0.0) -> tuple[str, float]:
        """A noun and its size; toys grow with the distance, or none could be told from another."""
        noun = self.nouns[self.rng.integers(len(self.nouns))]
        size = NATURAL.get(noun, self.rng.uniform(0.3, 0.55)) * self.rng.uniform(0.8, 1.2)
        return noun, max(size, distance * self.rng.uniform(0.05, 0.14))

    def scatter(self, count, across, along, height=0.0, size=None, tries=14):
        """Things on a rectangle; size None gives each its natural one."""
        for _ in range(count):
            for _ in range(tries):
                noun, natural = self.natural()
                at = (self.rng.uniform(*across), height, self.rng.uniform(*along))
                if self.thing(at, natural if size is None else self.rng.uniform(*size), noun):
                    break

    def on_top(self, at, width, height, depth, size, surface):
        """A plinth with one thing on it."""
        turn = self.rng.uniform(-0.6, 0.6)
        radius = np.hypot(width, depth) / 2
        if any(math.hypot(o[0] - at[0], o[2] - at[2]) < radius + r for o, r, _ in self.spots):
            return
        self.block(width, height, depth, at, surface, turn)
        self.spots.append((tuple(map(float, at)), radius, height))
        self.thing((at[0], at[1] + height, at[2]), size)

    def hang(self, at, size, top):
        """Something on a string from the ceiling.  Little but how large it looks tells how far it is: let its size
        hardly differ."""
        noun = self.rng.choice(["ball", "star", "egg", "ring", "bag", "cube", "cone", "bucket"])
        if self.thing(at, size, str(noun), float_=True):
            y = at[1] + size * 0.9
            if top > y:
                thick = 0.012 + 0.008 * size
                self.part("string", (thick, top - y, thick), (at[0], y, at[2]), self.surface(["plain"]))

    # Light

    def indoors(self, lamps, occlusion=0.5) -> Setting:
        rng = self.rng
        lights = []
        for at in lamps:
            tone = WARM * (1 - (t := rng.random())) + COOL * t
            power = rng.uniform(0.6, 1.4) * max(1.0, np.sum((np.array(at) - self.target) ** 2))
            lights.append(Light(tone * np.float32(power), position=np.array(at), size=rng.uniform(0.03, 0.2)))
        wall = np.float32(rng.uniform(0.35, 0.8, 3))
        return Setting(lights, wall, wall, rng.uniform(0.35, 1.0), wall * 0.7, occlusion=occlusion, **self.lens())

    def outdoors(self, occlusion=2.0) -> Setting:
        rng = self.rng
        kind = rng.choice(["clear", "cloudy", "overcast", "evening"], p=[0.4, 0.25, 0.2, 0.15])
        turn = rng.uniform(0, 2 * np.pi)
        rise = rng.uniform(0.1, 0.35) if kind == "evening" else rng.uniform(0.4, 1.3)
        direction = np.array([np.cos(rise) * np.sin(turn), np.sin(rise), np.cos(rise) * np.cos(turn)])
        sun = {"clear": 2.2, "cloudy": 1.5, "overcast": 0.15, "evening": 1.8}[kind] * rng.uniform(0.8, 1.2)
        colour = (WARM if kind == "evening" else np.float32([1, 0.97, 0.9])) * np.float32(sun)
        high = to_linear(hsv(rng.uniform(0.56, 0.62), rng.uniform(0.3, 0.7), rng.uniform(0.7, 0.95)))
        low = high * 0.5 + 0.5
        if kind == "overcast":
            high = low = np.float32([0.75, 0.78, 0.8]) * np.float32(rng.uniform(0.7, 1.1))
        if kind == "evening":
            low = to_linear(hsv(rng.uniform(0.03, 0.1), rng.uniform(0.3, 0.6), 0.98))
        return Setting(
            [Light(colour, direction=direction, size=rng.choice([0.0, 0.03, 0.08]))],
            np.float32(low),
            np.float32(high),
            rng.uniform(0.5, 0.9),
            np.float32(low * 0.3),
            clouds=rng.uniform(0.3, 0.7) if kind in ("clear", "cloudy", "evening") else 0.0,
            fog=rng.choice([0.0, 0.0, 0.003, 0.01]),
            occlusion=occlusion,
            **self.lens(),
        )

    def lens(self) -> dict:
        rng = self.rng
        tint = np.float32(1 + rng.normal(size=3) * 0.03)
        return {
            "exposure": rng.uniform(0.75, 1.3),
            "tint": tint / tint.mean(),
            "noise": rng.uniform(0.0, 0.02),
            "vignette": rng.uniform(0, 0.35),
            "blur": rng.uniform(0, 0.6) if rng.random() < 0.5 else 0.0,
        }

    def finish(self, place, setting) -> Scene:
        camera = Camera(
            np.asarray(self.eye, np.float64),
            np.asarray(self.target, np.float64),
            self.width,
            self.height,
            self.fov,
            self.rng.normal() * 0.03,
        )
        return Scene(place, self.things, self.pieces, camera, setting, frozenset(self.taken))


WOOD = ((0.05, 0.1), (0.3, 0.7), (0.25, 0.75))
EARTH = ((0.06, 0.12), (0.2, 0.6), (0.3, 0.6))
GREEN = ((0.2, 0.34), (0.3, 0.7), (0.25, 0.55))
STONE = ((0.0, 1.0), (0.0, 0.12), (0.3, 0.7))
PALE = ((0.0, 1.0), (0.0, 0.25), (0.65, 0.95))
FLOORS = ["planks", "tiles", "mottled", "checked", "plain"]
WALLS = ["plain", "paper", "bricks", "mottled", "plain", "tiles"]


def table(stage: Stage) -> Scene:
    rng = stage.rng
    stage.taken |= {"table", "bench", "cylinder"}
    w, d = rng.uniform(1.2, 2.0), rng.uniform(0.8, 1.3)
    stage.eye = np.array([rng.uniform(-0.6, 0.6), rng.uniform(0.15, 1.0), -d / 2 - rng.uniform(0.25, 0.8)])
    stage.target = np.array([rng.uniform(-0.2, 0.2), rng.uniform(-0.05, 0.2), rng.uniform(-0.1, 0.25)])
    top = stage.surface(["planks", "plain", "mottled", "checked"], WOOD if rng.random() < 0.5 else None, (0.08, 0.2))
    if rng.random() < 0.3:
        stage.part("disc", (w, 0.04, w), (0, -0.04, 0), top)
        d = w * 0.7
        w *= 0.7
    else:
        stage.block(w, 0.05, d, (0, -0.05, 0), top)
    stage.ground(9, stage.surface(FLOORS, scale=(0.2, 0.6)), -0.75)
    back = d / 2 + rng.uniform(0.1, 3)
    stage.block(12, 4, 0.1, (0, -0.75, back), stage.surface(WALLS, scale=(0.1, 0.4)))
    if back > d + 0.5:  # something to see behind
        for _ in range(rng.integers(1, 4)):
            stage.filler(
                FILLERS[rng.integers(4)],
                (rng.uniform(-2, 2), -0.75, rng.uniform(d, back - 0.3)),
                rng.uniform(0.5, 1.4),
            )
    near = -d / 2 + 0.08
    stage.scatter(int(rng.integers(5, 13)), (-w / 2 + 0.1, w / 2 - 0.1), (near, d / 2 - 0.1), size=(0.1, 0.32))
    if rng.random() < 0.3:
        stage.hang(
            (rng.uniform(-0.4, 0.4), rng.uniform(0.25, 0.5), rng.uniform(-0.5, 0.2)), rng.uniform(0.12, 0.16), 2.5
        )
    lamps = [(rng.uniform(-1.5, 1.5), rng.uniform(0.8, 2), rng.uniform(-1.5, 0.8)) for _ in range(rng.integers(1, 3))]
    return stage.finish("table", stage.indoors(lamps, 0.15))


def room(stage: Stage) -> Scene:
    rng = stage.rng
    w, d, h = rng.uniform(3.5, 7), rng.uniform(4, 8), rng.uniform(2.3, 3.2)
    stage.eye = np.array([rng.uniform(-w / 3, w / 3), rng.uniform(0.4, h - 0.4), -d / 2 + rng.uniform(0.1, 0.6)])
    stage.target = np.array([rng.uniform(-0.8, 0.8), rng.uniform(0.3, 1.3), rng.uniform(-0.5, d / 3)])
    _shell(stage, w, d, h)
    for _ in range(rng.integers(0, 4)):  # pictures and boards on the walls
        pw, ph = rng.uniform(0.4, 1.2), rng.uniform(0.4, 1)
        surface = stage.surface(["mottled", "paper", "plain", "checked"])
        if rng.random() < 0.6:
            stage.block(
                pw, ph, 0.04, (rng.uniform(-w / 2.5, w / 2.5), rng.uniform(1, h - ph - 0.1), d / 2 - 0.03), surface
            )
        else:
            side = rng.choice([-1, 1])
            stage.block(
                0.04,
                ph,
                pw,
                (side * (w / 2 - 0.03), rng.uniform(1, h - ph - 0.1), rng.uniform(-d / 4, d / 3)),
                surface,
            )
    if rng.random() < 0.5:
        rug = stage.surface(["striped", "checked", "mottled", "paper"], None, (0.2, 0.5))
        stage.block(
            rng.uniform(1, 2.5), 0.012, rng.uniform(1, 2.5), (rng.uniform(-0.6, 0.6), 0, rng.uniform(-0.5, 1)), rug
        )
    if rng.random() < 0.5:
        stage.taken |= {"cube", "table", "barrel"}
        for _ in range(rng.integers(1, 4)):
            at = (rng.uniform(-w / 2.6, w / 2.6), 0, rng.uniform(-d / 4, d / 2.4))
            stage.on_top(
                at,
                rng.uniform(0.4, 0.7),
                rng.uniform(0.4, 1.1),
                rng.uniform(0.4, 0.7),
                rng.uniform(0.25, 0.5),
                stage.surface(["plain", "planks"], WOOD),
            )
    stage.scatter(int(rng.integers(4, 10)), (-w / 2 + 0.4, w / 2 - 0.4), (stage.eye[2] + 0.8, d / 2 - 0.3))
    for _ in range(rng.integers(0, 4)):
        size = rng.uniform(0.28, 0.38)
        stage.hang(
            (rng.uniform(-w / 3, w / 3), h - rng.uniform(0.5, 1.2) - size, rng.uniform(stage.eye[2] + 0.7, d / 3)),
            size,
            h,
        )
    lamps = [(rng.uniform(-w / 3, w / 3), h - 0.25, rng.uniform(-d / 3, d / 3)) for _ in range(rng.integers(1, 3))]
    return stage.finish("room", stage.indoors(lamps))


def _shell(stage: Stage, w, d, h):
    rng = stage.rng
    floor, wall = (
        stage.surface(FLOORS, scale=(0.15, 0.6), gloss=0.3),
        stage.surface(WALLS, PALE if rng.random() < 0.5 else None),
    )
    stage.block(w, 0.02, d, (0, -0.02, 0), floor)
    stage.block(w + 0.2, h, 0.1, (0, 0, d / 2 + 0.05), wall)
    stage.block(w + 0.2, h, 0.1, (0, 0, -d / 2 - 0.5), wall)
    stage.block(w, 0.02, 0.5, (0, -0.02, -d / 2 - 0.25), floor)
    other = stage.surface(WALLS) if rng.random() < 0.3 else wall
    for side in (-1, 1):
        stage.block(0.1, h, d + 1.2, (side * (w / 2 + 0.05), 0, 0), other)
    stage.block(w, 0.05, d + 1.2, (0, h, 0), stage.surface(["plain", "tiles", "planks"], PALE, (0.4, 0.8)))
    if rng.random() < 0.4:  # beams
        wood = stage.surface(["planks"], WOOD)
        for z in np.arange(-d / 2 + 0.4, d / 2, rng.uniform(0.9, 1.6)):
            stage.block(w, 0.16, 0.16, (0, h - 0.16, z), wood)
    if rng.random() < 0.5:
        stage.block(w, 0.1, 0.03, (0, 0, d / 2 - 0.015), stage.surface(["plain"], PALE))


def corridor(stage: Stage) -> Scene:
    rng = stage.rng
    w, d, h = rng.uniform(2, 3.4), rng.uniform(10, 20), rng.uniform(2.3, 3.4)
    stage.eye = np.array([rng.uniform(-0.6, 0.6), rng.uniform(0.5, 2.0), -d / 2 + 0.3])
    stage.target = stage.eye + np.array([rng.normal() * 0.6, rng.uniform(-0.9, 0.5), 4.0])
    _shell(stage, w, d, h)
    pillar = stage.surface(["plain", "bricks", "mottled"])
    for z in np.arange(-d / 2 + 1.5, d / 2, rng.uniform(1.8, 3.5)):
        side = rng.choice([-1, 1])
        stage.block(0.16, h, 0.3, (side * (w / 2 - 0.05), 0, z), pillar)
    for _ in range(rng.integers(6, 13)):
        ahead = 1.0 + (d - 2.0) * rng.random() ** 1.7
        noun, size = stage.natural(ahead)
        if size < 1.9:
            side = rng.choice([-1, 1])
            stage.thing((side * rng.uniform(0.3, w / 2 - 0.3), 0, stage.eye[2] + ahead), size, noun)
    for _ in range(rng.integers(0, 5)):
        size = rng.uniform(0.28, 0.38)
        stage.hang(
            (rng.uniform(-w / 3, w / 3), h - rng.uniform(0.35, 0.9) - size, rng.uniform(-d / 2 + 1.2, d / 4)), size, h
        )
    lamps = [(0, h - 0.3, z) for z in (-d / 2 + 2.5, rng.uniform(-d / 4, d / 3))]
    return stage.finish("corridor", stage.indoors(lamps))


def _leave_out(stage: Stage, *nouns):
    """Nouns that the place's own fillers could be taken for."""
    stage.taken |= set(nouns)
    stage.nouns = [noun for noun in stage.nouns if noun not in nouns] or ["ball", "doll", "bucket"]


def park(stage: Stage) -> Scene:
    rng = stage.rng
    bushes = rng.random() < 0.6
    _leave_out(stage, *(("tree",) if bushes else ()))
    stage.eye = np.array([0, rng.uniform(0.4, 2.6), -2.5])
    stage.target = np.array([rng.normal() * 1.5, rng.uniform(-0.2, 1.8), 5.0])
    tones = [GREEN, EARTH, STONE, ((0.1, 0.13), (0.2, 0.5), (0.6, 0.85))][rng.integers(4)]
    stage.ground(300, stage.surface(["mottled"], tones, (0.6, 3)))
    for _ in range(rng.integers(2, 6)):  # hills
        size = rng.uniform(20, 60)
        at = (rng.uniform(-90, 90), -size * rng.uniform(0.2, 0.42), rng.uniform(60, 120))
        stage.part("ball", (size * 2, size, size), at, stage.surface(["mottled"], GREEN, (5, 20)))
    for _ in range(rng.integers(4, 12)):
        name = FILLERS[rng.integers(0 if bushes else 1, 4)]
        z = rng.uniform(-1, 22)
        stage.filler(name, (rng.uniform(-0.9, 0.9) * (z + 4), 0, z), rng.uniform(0.4, 1.6))
    if rng.random() < 0.4:
        _fence(stage, rng.uniform(6, 14))
    _in_sight(stage, int(rng.integers(6, 13)), 0.2, 12)
    if rng.random() < 0.3:  # balloons
        for _ in range(rng.integers(1, 4)):
            z = rng.uniform(1, 8)
            stage.thing(
                (rng.uniform(-0.4, 0.4) * (z + 2), rng.uniform(1.5, 3), z), rng.uniform(0.4, 0.8), "ball", True
            )
    return stage.finish("park", stage.outdoors())


def _in_sight(stage: Stage, count, near, far):
    """Things over the ground within the camera's angle, as many near as far."""
    rng = stage.rng
    for _ in range(count):
        for _ in range(8):
            z = near + (far - near) * rng.random() ** 1.7
            noun, size = stage.natural(z - stage.eye[2])
            if stage.thing((stage.eye[0] + rng.uniform(-0.45, 0.45) * (z - stage.eye[2]), 0, z), size, noun):
                break


def _fence(stage: Stage, z):
    wood = stage.surface(["planks", "plain"], WOOD)
    for x in np.arange(-16, 16, 1.6):
        stage.block(0.12, 1.1, 0.12, (x, 0, z), wood)
    for y in (0.45, 0.9):
        stage.block(32, 0.1, 0.05, (0, y, z), wood)


def street(stage: Stage) -> Scene:
    rng = stage.rng
    _leave_out(stage, "house", "cube", "arch", "bookcase", "sofa", "staircase")
    w = rng.uniform(3, 6)
    stage.eye = np.array([rng.uniform(-w / 3, w / 3), rng.uniform(0.8, 3.2), -3.0])
    stage.target = stage.eye + np.array([rng.normal() * 1.0, rng.uniform(-1.8, 0.6), 6.0])
    stage.ground(200, stage.surface(["mottled", "plain", "tiles"], STONE, (0.3, 1.5)))
    for side in (-1, 1):
        z = -6.0
        while z < 40:
            length, tall = rng.uniform(4, 9), rng.uniform(4, 12)
            x = side * (w + 2)
            wall = stage.surface(["bricks", "plain", "mottled", "planks"], None, (0.15, 0.5))
            stage.block(4, tall, length, (x, 0, z + length / 2), wall)
            pane = stage.surface(["plain", "tiles"], ((0.5, 0.7), (0.05, 0.3), (0.1, 0.6)), (0.3, 0.6), 1.0)
            for y in np.arange(1.0, tall - 1.2, 2.0):
                for at in np.arange(z + 1, z + length - 1, 1.7):
                    stage.block(0.12, 1.1, 0.8, (x - side * 1.98, y, at), pane)
            if rng.random() < 0.4:
                stage.block(
                    1.4,
                    0.08,
                    length * 0.5,
                    (x - side * 2.5, 2.5, z + length / 2),
                    stage.surface(["striped", "plain"], None, (0.3, 0.5)),
                )
            z += length + rng.choice([0.0, 0.0, 1.5])
    if rng.random() < 0.35:  # something over the street
        stage.block(
            2 * w + 1,
            0.5,
            0.4,
            (0, rng.uniform(3.2, 4.5), rng.uniform(1, 8)),
            stage.surface(["plain", "planks", "bricks"]),
        )
    for z in np.arange(0, 30, rng.uniform(5, 9)):
        pole = stage.surface(["plain"], STONE)
        stage.block(0.12, 4.5, 0.12, (rng.choice([-1, 1]) * (w - 0.4), 0, z), pole)
    for _ in range(rng.integers(6, 13)):
        z = -0.5 + 13 * rng.random() ** 1.6
        noun, size = stage.natural(z - stage.eye[2])
        stage.thing((rng.uniform(-w + 0.6, w - 0.6), 0, z), size, noun)
    return stage.finish("street", stage.outdoors())


def shelves(stage: Stage) -> Scene:
    rng = stage.rng
    stage.taken |= {"bookcase", "bench", "table"}
    levels, gap, w = int(rng.integers(2, 5)), rng.uniform(0.35, 0.5), rng.uniform(1.4, 2.4)
    depth = rng.uniform(0.3, 0.5)
    stage.eye = np.array([rng.uniform(-1, 1), rng.uniform(0.3, levels * gap + 0.4), -rng.uniform(1.2, 2.4)])
    stage.target = np.array([rng.uniform(-0.3, 0.3), levels * gap / 2 + rng.normal() * 0.15, 0.2])
    stage.ground(10, stage.surface(FLOORS, scale=(0.2, 0.5)), -0.5)
    stage.block(9, 4, 0.1, (0, -0.5, depth / 2 + rng.uniform(0.06, 0.4)), stage.surface(WALLS))
    board = stage.surface(["planks", "plain"], WOOD if rng.random() < 0.6 else PALE)
    for level in range(levels):
        stage.block(w, 0.04, depth, (0, level * gap - 0.04, 0), board)
        x = -w / 2 + 0.12
        while x < w / 2 - 0.1:
            size = rng.uniform(0.14, min(gap * 0.8, 0.32))
            if rng.random() < 0.62:
                stage.thing((x + size / 2, level * gap, rng.uniform(-0.3, 0.15) * depth), size)
            x += size + rng.uniform(0.03, 0.25)
    for side in (-1, 1):
        if rng.random() < 0.6:
            stage.block(0.04, levels * gap + 0.1, depth, (side * w / 2, -0.05, 0), board)
    for _ in range(rng.integers(0, 3)):
        stage.hang(
            (rng.uniform(-0.7, 0.7), rng.uniform(0.3, levels * gap), -rng.uniform(0.5, 0.9)),
            rng.uniform(0.13, 0.17),
            3,
        )
    lamps = [(rng.uniform(-1.5, 1.5), rng.uniform(1, 2.5), -rng.uniform(1, 2)) for _ in range(rng.integers(1, 3))]
    return stage.finish("shelves", stage.indoors(lamps, 0.2))


def terraces(stage: Stage) -> Scene:
    rng = stage.rng
    stage.taken |= {"staircase", "cube", "bench"}
    steps, run, rise = int(rng.integers(4, 8)), rng.uniform(0.7, 1.4), rng.uniform(0.2, 0.7) * rng.choice([1, 1, -1])
    top = steps * abs(rise) if rise < 0 else 0.0
    stage.eye = np.array([rng.uniform(-1.2, 1.2), top + rng.uniform(0.5, 2.2), -rng.uniform(1.2, 2.2)])
    stage.target = np.array([rng.normal() * 0.4, top + (steps / 2) * rise, steps * run / 2])
    stage.ground(120, stage.surface(["mottled", "tiles", "plain"], [GREEN, EARTH, STONE][rng.integers(3)], (0.4, 2)))
    stone = stage.surface(["plain", "bricks", "mottled", "tiles"], [EARTH, STONE, PALE][rng.integers(3)], (0.15, 0.5))
    for step in range(steps):
        y = top + (step + 1) * rise if rise > 0 else top - step * abs(rise)
        stage.block(8, max(y, 0.05), run, (0, 0, step * run + run / 2), stone)
        for _ in range(rng.integers(1, 4)):
            stage.thing((rng.uniform(-2.2, 2.2), y, step * run + rng.uniform(0.3, 0.7) * run), rng.uniform(0.3, 0.8))
    for _ in range(rng.integers(0, 4)):
        stage.filler(FILLERS[rng.integers(4)], (rng.uniform(-4, 4), 0, rng.uniform(-0.8, -0.2)), rng.uniform(0.3, 0.8))
    return stage.finish("terraces", stage.outdoors(1.0))


def studio(stage: Stage) -> Scene:
    """Things in the air before a backdrop: where one is in the picture says nothing about its distance.  How large it
    looks does, since all are about as large."""
    rng = stage.rng
    stage.eye, stage.target = np.array([0, 0, -3.0]), np.array([rng.normal() * 0.2, rng.normal() * 0.2, 0.0])
    far, size = rng.uniform(2.5, 4.5), rng.uniform(0.45, 0.7)
    stage.block(
        40,
        40,
        0.1,
        (0, -20, far),
        stage.surface(["plain", "mottled", "checked", "paper", "striped"], None, (0.3, 1.5)),
    )
    for _ in range(rng.integers(6, 15)):
        for _ in range(8):
            z = rng.uniform(-1.6, far - 1)
            reach = (z + 3.0) * np.tan(stage.fov / 2) * 0.85
            at = (rng.uniform(-reach, reach), rng.uniform(-reach, reach) - 0.2, z)
            if stage.thing(at, size * rng.uniform(0.93, 1.07), float_=True):
                break
    lamps = [(rng.uniform(-4, 4), rng.uniform(0, 4), rng.uniform(-4, -1)) for _ in range(rng.integers(1, 3))]
    return stage.finish("studio", stage.indoors(lamps, 0.3))


def thicket(stage: Stage) -> Scene:
    """Leaves, sticks and stones close to the lens."""
    rng = stage.rng
    _leave_out(stage, "tree", "cactus", "house", "car", "sofa", "bookcase")
    stage.eye = np.array([0, rng.uniform(0.3, 1.2), -1.4])
    stage.target = np.array([rng.normal() * 0.3, rng.uniform(0.1, 0.6), 1.0])
    stage.ground(60, stage.surface(["mottled"], [GREEN, EARTH][rng.integers(2)], (0.3, 1)))
    for _ in range(rng.integers(6, 14)):
        z = rng.uniform(-0.6, 5)
        name = FILLERS[rng.integers(4)]
        up = rng.uniform(0.4, 1.2) if name in ("bush", "sticks") and rng.random() < 0.4 else 0.0  # as on a branch
        stage.filler(name, (rng.uniform(-0.7, 0.7) * (z + 2), up, z), rng.uniform(0.3, 1.1))
    for _ in range(rng.integers(5, 11)):
        z = rng.uniform(-0.5, 4)
        stage.thing((rng.uniform(-0.5, 0.5) * (z + 1.6), 0, z), rng.uniform(0.2, 0.6))
    if rng.random() < 0.5:
        stage.block(
            14, 6, 0.1, (0, 0, rng.uniform(5, 8)), stage.surface(["bricks", "planks", "mottled"], None, (0.2, 0.5))
        )
    return stage.finish("thicket", stage.outdoors(0.6))


def overhead(stage: Stage) -> Scene:
    """Looking down: tall things are near, wherever they stand."""
    rng = stage.rng
    stage.taken |= {"cube", "cylinder"}
    stage.eye = np.array([0, rng.uniform(3.0, 5.5), -rng.uniform(0.3, 2.5)])
    stage.target = np.array([rng.normal() * 0.2, 0, 0.4])
    stage.ground(30, stage.surface(FLOORS + ["striped"], None, (0.2, 0.8)))
    for _ in range(rng.integers(2, 6)):
        at = (rng.uniform(-1.6, 1.6), 0, rng.uniform(-1.2, 2))
        side = rng.uniform(0.35, 0.8)
        stage.on_top(
            at, side, rng.uniform(0.3, 2.0), side, rng.uniform(0.3, 0.6), stage.surface(["plain", "planks", "bricks"])
        )
    stage.scatter(int(rng.integers(5, 11)), (-2, 2), (-1.4, 2.4), size=(0.35, 1.0))
    return stage.finish(
        "overhead", stage.outdoors(0.8) if rng.random() < 0.5 else stage.indoors([(1.5, 4, -1.5), (-2, 4.5, 1)])
    )


PLACES = {
    table: 0.16, room: 0.17, corridor: 0.09, park: 0.12, street: 0.1, shelves: 0.08, terraces: 0.08, studio: 0.08,
    thicket: 0.06, overhead: 0.06,
}  # fmt: skip


def sample_scene(rng, width: int = 224, height: int = 224, place: str | None = None) -> Scene:
    """A scene with its rendering.  All that it draws comes from `rng`."""
    scene = lay_out(rng, width, height, place)
    scene.rendering = render(scene.geometry, scene.camera, scene.setting, rng)
    return scene


def lay_out(rng, width: int, height: int, place: str | None = None) -> Scene:
    """The same scene, not rendered yet."""
    builders = {builder.__name__: builder for builder in PLACES}
    if place is None:
        builder = list(PLACES)[rng.choice(len(PLACES), p=list(PLACES.values()))]
    else:
        builder = builders[place]
    for _ in range(PATIENCE):
        scene = builder(Stage(rng, width, height))
        if _promising(scene):
            break
    scene.geometry = Geometry(scene.pieces, scene.camera)
    return scene


def _promising(scene: Scene) -> bool:
    """Whether several things stand before the camera, whatever may hide them: known before anything is rendered."""
    camera = scene.camera
    middles = np.array([thing.position + (0, thing.size * 0.4, 0) for thing in scene.things] or np.empty((0, 3)))
    x, y, z = camera.project(middles)
    side = np.array([thing.size for thing in scene.things]) * camera.focal() / np.maximum(z, 0.1)
    inside = (z > 0.1) & (x > 0) & (x < camera.width) & (y > 0) & (y < camera.height)
    return np.count_nonzero(inside & (side > 0.09 * max(camera.width, camera.height))) >= LEAST_THINGS
