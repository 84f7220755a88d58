"""A second opinion on a scene: from its triangles and its camera alone, with nothing of the renderer or the questions.

Own transformations, own rays, own intersections (all rays start at one point, so that determinants are matrix
products), and a small reader of the questions' language.
"""

import re

import numpy as np

GRID = 72
PATTERNS = "plain|striped|checked|spotted"
COLOURS = "red|orange|yellow|green|turquoise|blue|purple|pink|brown|white|grey|black"
PLURALS = {"benches": "bench", "arches": "arch", "cactuses": "cactus"}


def about_y(angle):
    return np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])


def about_x(angle):
    return np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])


class Truth:
    """What rays from the camera meet, on a grid over the picture."""

    def __init__(self, scene):
        self.things, camera = scene.things, scene.camera
        corners, owner = [], []
        for piece in scene.pieces:
            points = np.asarray(piece.mesh.vertices, np.float64) * np.asarray(piece.scale, np.float64)
            points = points @ (about_y(piece.turn) @ about_x(piece.tilt)).T + np.asarray(piece.position, np.float64)
            corners.append(points[piece.mesh.faces])
            owner.append(np.full(len(piece.mesh.faces), piece.thing))
        a, b, c = np.concatenate(corners).transpose(1, 0, 2)
        self.owner = np.concatenate(owner)
        e1, e2, s = b - a, c - a, camera.position - a
        self.det, self.u = np.cross(e2, e1), np.cross(e2, s)
        self.v = np.cross(s, e1)
        self.t = np.einsum("ij,ij->i", e2, self.v)
        gaze = np.asarray(camera.target, np.float64) - camera.position
        self.gaze = gaze / np.linalg.norm(gaze)
        across = np.cross(self.gaze, (0, 1, 0))
        across /= np.linalg.norm(across)
        above = np.cross(across, self.gaze)
        roll = camera.roll
        self.across = np.cos(roll) * across + np.sin(roll) * above
        self.above = np.cos(roll) * above - np.sin(roll) * across
        self.width, self.height = camera.width, camera.height
        self.tangent = np.tan(camera.fov / 2) / (max(self.width, self.height) / 2)
        x = (np.arange(GRID) + 0.5) / GRID * self.width
        y = (np.arange(GRID) + 0.5) / GRID * self.height
        self.x, self.y = (places.ravel() for places in np.meshgrid(np.floor(x) + 0.5, np.floor(y) + 0.5))
        self.thing, self.depth = self.look(self.x, self.y)

    def look(self, x, y):
        """(thing, -1 for none; distance along the gaze, infinite for none) at places of the picture."""
        right, down = (np.asarray(x) - self.width / 2) * self.tangent, (np.asarray(y) - self.height / 2) * self.tangent
        rays = self.gaze + right[:, None] * self.across - down[:, None] * self.above
        thing, depth = np.full(len(rays), -1), np.full(len(rays), np.inf)
        for start in range(0, len(rays), 512):
            some = rays[start : start + 512]
            det = some @ self.det.T
            with np.errstate(divide="ignore", invalid="ignore"):
                u, v, t = some @ self.u.T / det, some @ self.v.T / det, self.t / det
                meets = (np.abs(det) > 1e-14) & (u >= -1e-9) & (v >= -1e-9) & (u + v <= 1 + 1e-9) & (t > 1e-6)
            t = np.where(meets, t, np.inf)
            first = t.argmin(1)
            depth[start : start + 512] = t[np.arange(len(some)), first]
            found = np.isfinite(depth[start : start + 512])
            thing[start : start + 512] = np.where(found, self.owner[first], -1)
        return thing, depth

    # What shows

    def shows(self):
        return [int(index) for index in np.unique(self.thing) if index >= 0]

    def middle(self, index):
        return float(self.x[self.thing == index].mean() / self.width)

    def distance(self, index):
        return float(np.median(self.depth[self.thing == index]))

    def on_grid(self, mask):
        """bool per place of the grid, from a mask of the whole picture."""
        return mask[self.y.astype(int), self.x.astype(int)]

    # What words mean

    def fits(self, noun, colour=None, pattern=None):
        return [
            index
            for index in self.shows()
            if self.things[index].noun == noun
            and colour in (None, self.things[index].colour)
            and pattern in (None, self.things[index].pattern)
        ]

    def meant(self, phrase):
        """The things that a phrase like "the striped red ball to the left of the cube" can mean."""
        phrase = phrase.strip()
        relation = re.fullmatch(r"(the .+?) (to the left of|to the right of|in front of|behind) (the .+)", phrase)
        if relation:
            (anchor,) = self.meant(relation[3])
            compare = {
                "to the left of": lambda i: self.middle(i) < self.middle(anchor),
                "to the right of": lambda i: self.middle(i) > self.middle(anchor),
                "in front of": lambda i: self.distance(i) < self.distance(anchor),
                "behind": lambda i: self.distance(i) > self.distance(anchor),
            }[relation[2]]
            return [index for index in self.meant(relation[1]) if compare(index)]
        place = re.fullmatch(
            r"the (.+?) (farthest to the left|farthest to the right|closest to the camera|farthest from the camera)",
            phrase,
        )
        if place:
            key = self.middle if "to the" in place[2] and "camera" not in place[2] else self.distance
            choose = min if place[2] in ("farthest to the left", "closest to the camera") else max
            return [choose(self.meant("the " + place[1]), key=key)]
        order = re.fullmatch(r"the (second|third) (.+) from the left", phrase)
        if order:
            ranked = sorted(self.meant("the " + order[2]), key=self.middle)
            return [ranked[("second", "third").index(order[1]) + 1]]
        words = re.fullmatch(rf"(?:the |an? )?(?:({PATTERNS}) )?(?:({COLOURS}) )?(\w+)", phrase)
        assert words, phrase
        return self.fits(words[3], words[2], words[1])


def verdict(truth, question) -> str:
    """What is wrong with a question's answer or mask, or nothing."""
    text, answer, mask = question.text, question.answer, truth.on_grid(question.mask)
    about = JUDGES[question.kind](truth, text, answer, question)
    if isinstance(about, str):
        return about
    expected = np.isin(truth.thing, about)
    union = (mask | expected).sum()
    overlap = (mask & expected).sum() / union if union else 1.0
    return "" if overlap > 0.8 or union < 12 and overlap > 0.5 else f"the mask overlaps by {overlap:.2f}"


def _one(truth, phrase):
    found = truth.meant(phrase)
    return found[0] if len(found) == 1 else f"{phrase!r} fits {[truth.things[i].noun for i in found]}"


def _asked(text):
    forms = (
        r"Please segment (.+) in this image\.|Where is (.+)\?|Segment (.+)\.|Show me (.+)\.|Find (.+)\.|"
        r"Point out (.+)\."
    )
    return next(filter(None, re.fullmatch(forms, text).groups()))


def _refer(truth, text, answer, question):
    index = _one(truth, _asked(text))
    if isinstance(index, str):
        return index
    thing = truth.things[index]
    good = thing.noun in answer and thing.colour in answer
    return [index] if good else f"it is a {thing.colour} {thing.noun}"


def _absent(truth, text, answer, question):
    found = truth.meant(_asked(text))
    return f"it is there: {found}" if found or "no" not in answer.split() else []


def _exists(truth, text, answer, question):
    words = re.fullmatch(r"Is there (.+) in the picture\?|Can you see (.+)\?|Does the picture show (.+)\?", text)
    found = truth.meant(next(filter(None, words.groups())))
    return found if answer == ("Yes." if found else "No.") else f"there are {len(found)}"


def _count(truth, text, answer, question):
    words = re.search(r"How many (\w+)|Count the (\w+)", text)
    noun = words[1] or words[2]
    found = truth.fits(PLURALS.get(noun, noun.removesuffix("s")))
    return found if answer == f"{len(found)}." else f"there are {len(found)}"


def _two(truth, first, second):
    pair = [_one(truth, first), _one(truth, second)]
    return next((entry for entry in pair if isinstance(entry, str)), pair)


def _side(truth, text, answer, question):
    words = re.fullmatch(r"Is (the .+?) to the left or to the right of (the .+)\?", text)
    pair = _two(truth, words[1], words[2])
    if isinstance(pair, str):
        return pair
    left = truth.middle(pair[0]) < truth.middle(pair[1])
    return pair if answer == ("Left." if left else "Right.") else "the other side"


def _closest(truth, phrases, answer):
    found = [_one(truth, phrase) for phrase in phrases]
    wrong = next((entry for entry in found if isinstance(entry, str)), None)
    if wrong:
        return wrong
    nearest = min(found, key=truth.distance)
    said = answer[0].lower() + answer[1:-1]
    return found if said == phrases[found.index(nearest)] else f"nearest is {truth.things[nearest].noun}"


def _closer(truth, text, answer, question):
    words = re.fullmatch(r"(?:Which is closer to the camera|What is nearer), (the .+?) or (the .+)\?", text)
    return _closest(truth, [words[1], words[2]], answer)


def _nearest(truth, text, answer, question):
    words = re.fullmatch(r"Which of these is closest to the camera: (the .+?), (the .+) or (the .+)\?", text)
    return _closest(truth, list(words.groups()), answer)


def _colour(truth, text, answer, question):
    index = _one(truth, re.fullmatch(r"What colour is (the .+)\?", text)[1])
    if isinstance(index, str):
        return index
    return [index] if answer == f"{truth.things[index].colour.capitalize()}." else "another colour"


def _pattern(truth, text, answer, question):
    index = _one(truth, re.fullmatch(r"Is (the .+) plain, striped, checked or spotted\?", text)[1])
    if isinstance(index, str):
        return index
    return [index] if answer == f"{truth.things[index].pattern.capitalize()}." else "another pattern"


def _describe(truth, text, answer, question):
    listed = re.sub(r", (?:on|in|outside|before|among|seen)[^,]*\.$", "", answer)
    parts = re.split(r", | and ", listed)
    found = []
    for part in parts:
        words = re.fullmatch(r"(?i)(an? .+?)(?: (on the left|on the right|in the middle))?", part)
        place = {"on the left": (0, 0.33), "on the right": (0.67, 1), "in the middle": (0.37, 0.63), None: (0, 1)}[
            words[2]
        ]
        meant = truth.meant(words[1].lower())
        fitting = [i for i in meant if place[0] <= truth.middle(i) <= place[1] and i in question.extra["things"]]
        if not fitting:
            return f"{part!r} is not there"
        found += fitting
    return sorted(set(found)) if len(set(found)) == len(question.extra["things"]) else question.extra["things"]


JUDGES = {
    "refer": _refer, "absent": _absent, "exists": _exists, "count": _count, "side": _side, "closer": _closer,
    "nearest": _nearest, "colour": _colour, "pattern": _pattern, "describe": _describe,
}  # fmt: skip
