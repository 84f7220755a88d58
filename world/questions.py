"""Questions about a scene, each with its answer and the mask of what it is about.

Every question can be answered from the picture alone: it is left out when what it depends on is small, hidden, of a
neighbouring colour, or almost as far away.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..data.depths import encode_depth, nearness
from ..data.record import as_sentence
from . import phrases
from .marks import LETTERS, NEAR, PAIR, QUESTION, choose_points, discs, draw_points, drawn_larger
from .phrases import APART, by_attributes, by_neighbour, by_place, in_front, may_fit, plural, same_kind, with_article
from .scene import Scene
from .shapes import NOUNS
from .views import View, inverse_depth, views

PLACE_NAMES = {
    "table": "on a table",
    "room": "in a room",
    "corridor": "in a corridor",
    "park": "outside",
    "street": "in a street",
    "shelves": "on shelves",
    "terraces": "on steps outside",
    "studio": "before a wall",
    "thicket": "among plants",
    "overhead": "seen from above",
}
REFER = ("Please segment {} in this image.", "Where is {}?", "Segment {}.", "Show me {}.", "Find {}.", "Point out {}.")
COUNT = ("How many {} are there?", "How many {} can you see?", "Count the {}.")
EXISTS = ("Is there {} in the picture?", "Can you see {}?", "Does the picture show {}?")
CLOSER = ("Which is closer to the camera, {} or {}?", "What is nearer, {} or {}?")
DESCRIBE = ("Describe the picture.", "What is in this picture?", "What do you see?")
# The kinds whose answers depth alone tells.
OF_DEPTH = ("closer", "nearest", "points", "near", "pair")


@dataclass
class Question:
    """kind names what is asked; mask bool[H, W] what it is about: all False if that is absent, None for no mask."""

    kind: str
    text: str
    answer: str
    mask: np.ndarray | None
    extra: dict = field(default_factory=dict)
    image: np.ndarray | None = None  # the picture with marks, where the question needs them


class Asker:
    """All kinds of questions on one scene."""

    def __init__(self, scene: Scene, rng):
        self.scene, self.rng = scene, rng
        self.found = views(scene)
        self.clear = [view for view in self.found if view.clear]
        self.shape = scene.rendering.depth.shape
        self.inverse = inverse_depth(scene.rendering.depth)

    @cached_property
    def depth_png(self) -> bytes:
        return encode_depth(self.inverse)

    def ask(self, kind: str) -> Question | None:
        """A question of that kind, or None when the scene has none."""
        return getattr(self, f"_{kind}")()

    def points(self, count: int, lure: bool | None = None) -> Question | None:
        places = choose_points(self.rng, self.inverse, self.scene.rendering.depth, count, lure)
        if places is None:
            return None
        letters = "".join(self.rng.permutation(list(LETTERS[:count])))
        image = draw_points(self.scene.rendering.image, places, letters, drawn_larger(self.rng))
        extra = {
            "points": {
                letter: place for place, letter in sorted(zip(places, letters, strict=True), key=lambda p: p[1])
            },
            "nearest_is_lowest": places[0][1] >= max(y for _, y in places),
        }
        return Question("points", QUESTION, f"({letters[0]})", discs(places, self.shape), extra, image)

    def about_points(self, asked: Question, count: int) -> list[Question]:
        """Up to `count` further questions about the points of such a question: how near one is, or which of two.
        They have no mask of their own: rings teach nothing of masks."""
        places, letters = asked.extra["points"], list(asked.extra["points"])
        value = {letter: self.inverse[y, x] for letter, (x, y) in places.items()}
        found: dict[str, Question] = {}
        for turn in range(count):
            if turn % 2 == 0:
                letter = str(self.rng.choice(letters))
                text, answer, shown = NEAR.format(letter), f"{nearness(value[letter])}.", [letter]
            else:
                shown = [str(letter) for letter in self.rng.permutation(letters)[:2]]
                text, answer = PAIR.format(*shown), f"({max(shown, key=value.get)})"
            found[text] = Question("near" if len(shown) == 1 else "pair", text, answer, None, {"letters": shown})
        return list(found.values())

    # Parts

    def _one(self, options):
        return options[self.rng.integers(len(options))]

    def _union(self, found: list[View]) -> np.ndarray:
        mask = np.zeros(self.shape, bool)
        for view in found:
            mask |= view.mask
        return mask

    def _shuffled(self, found: list[View]) -> list[View]:
        return [found[index] for index in self.rng.permutation(len(found))]

    def _named(self, count: int, *tests) -> list[tuple[View, str]] | None:
        """`count` things with a phrase each, of which every two pass all tests one way or the other."""
        chosen: list[tuple[View, str]] = []
        for view in self._shuffled(self.clear):
            named = by_attributes(view, self.found)
            if named and all(test(view, other) or test(other, view) for test in tests for other, _ in chosen):
                chosen.append((view, named[0]))
            if len(chosen) == count:
                return chosen
        return None

    @staticmethod
    def _compared(named: list[tuple[View, str]]) -> dict:
        """What of a question which thing is closer, with a place (x, y) on each of the things."""
        return {
            "things": [view.index for view, _ in named],
            "names": [words for _, words in named],
            "places": [_inside(view.mask) for view, _ in named],
        }

    @staticmethod
    def _where(view: View) -> str:
        across = (
            "on the left"
            if view.x < 0.3
            else "on the right"
            if view.x > 0.7
            else "in the middle"
            if 0.4 < view.x < 0.6
            else ""
        )
        return across

    def _sentence(self, view: View) -> str:
        """What it looks like and where it is."""
        words = with_article(phrases.name(view, True, view.patterned and view.pattern != "plain"))
        where = self._where(view)
        return words + (f" {where}" if where else "")

    # Kinds

    def _refer(self) -> Question | None:
        for view in self._shuffled(self.clear):
            options = by_attributes(view, self.found) * 2 + by_place(view, self.found) + by_neighbour(view, self.found)
            if options:
                words = self._one(options)
                answer = self._sentence(view)
                return Question(
                    "refer",
                    self._one(REFER).format(words),
                    f"It is {answer}.",
                    view.mask,
                    {"phrase": words, "thing": view.index},
                )
        return None

    def _absent(self) -> Question | None:
        missing = phrases.absent(self.rng, self.found, list(NOUNS), self.scene.taken)
        if missing is None:
            return None
        words = missing[0]
        return Question(
            "absent",
            self._one(REFER).format(f"the {words}"),
            f"There is no {words} in the picture.",
            np.zeros(self.shape, bool),
            {"phrase": f"the {words}"},
        )

    def _exists(self) -> Question | None:
        if self.rng.random() < 0.5:
            missing = phrases.absent(self.rng, self.found, list(NOUNS), self.scene.taken)
            if missing is None:
                return None
            text = self._one(EXISTS).format(with_article(missing[0]))
            return Question("exists", text, "No.", np.zeros(self.shape, bool), {"phrase": missing[0]})
        for view in self._shuffled(self.clear):
            alike = [other for other in self.found if may_fit(other, view.noun, view.colour)]
            if all(other.clear and (other.noun, other.colour) == (view.noun, view.colour) for other in alike):
                words = phrases.name(view)
                text = self._one(EXISTS).format(with_article(words))
                return Question("exists", text, "Yes.", self._union(alike), {"phrase": words})
        return None

    def _count(self) -> Question | None:
        nouns = sorted({view.noun for view in self.clear})
        if self.rng.random() < 0.12:
            nouns = [noun for noun in NOUNS if noun not in self.scene.taken]
        for noun in self.rng.permutation(nouns) if nouns else ():
            kind = same_kind(str(noun), self.found)
            if kind is not None:
                text = self._one(COUNT).format(plural(str(noun)))
                return Question("count", text, f"{len(kind)}.", self._union(kind), {"noun": str(noun)})
        return None

    def _side(self) -> Question | None:
        pair = self._named(2, lambda a, b: a.x < b.x - 1.3 * APART)
        if pair is None:
            return None
        (view, words), (other, others) = pair
        return Question(
            "side",
            f"Is {words} to the left or to the right of {others}?",
            "Left." if view.x < other.x else "Right.",
            self._union([view, other]),
            {"things": [view.index, other.index]},
        )

    def _closer(self) -> Question | None:
        pair = self._named(2, in_front)
        if pair is None:
            return None
        (view, words), (other, others) = pair
        nearer = words if in_front(view, other) else others
        return Question(
            "closer",
            self._one(CLOSER).format(words, others),
            as_sentence(nearer),
            self._union([view, other]),
            self._compared(pair),
        )

    def _nearest(self) -> Question | None:
        named = self._named(3, in_front)
        if named is None:
            return None
        nearest = next(words for view, words in named if all(view is o or in_front(view, o) for o, _ in named))
        (_, first), (_, second), (_, third) = named
        return Question(
            "nearest",
            f"Which of these is closest to the camera: {first}, {second} or {third}?",
            as_sentence(nearest),
            self._union([view for view, _ in named]),
            self._compared(named),
        )

    def _colour(self) -> Question | None:
        for view in self._shuffled(self.clear):
            options = [p for p in by_attributes(view, self.found) if view.colour not in p] + by_place(view, self.found)
            if options and view.pattern == "plain":
                words = self._one(options)
                text = f"What colour is {words}?"
                return Question("colour", text, f"{view.colour.capitalize()}.", view.mask, {"thing": view.index})
        return None

    def _pattern(self) -> Question | None:
        for view in self._shuffled(self.clear):
            options = [p for p in by_attributes(view, self.found) if view.pattern not in p]
            if options and view.patterned:
                text = f"Is {self._one(options)} plain, striped, checked or spotted?"
                return Question("pattern", text, f"{view.pattern.capitalize()}.", view.mask, {"thing": view.index})
        return None

    def _describe(self) -> Question | None:
        shown = self.clear[:4]
        if not shown:
            return None
        parts = [self._sentence(view) for view in sorted(shown, key=lambda view: view.x)]
        listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
        answer = f"{listed[0].upper()}{listed[1:]}, {PLACE_NAMES[self.scene.place]}."
        extra = {"things": [view.index for view in shown]}
        return Question("describe", self._one(DESCRIBE), answer, self._union(shown), extra)


def _inside(mask: np.ndarray) -> list[int]:
    """(x, y) of the pixel of it that is closest to its middle."""
    y, x = np.nonzero(mask)
    middle = np.argmin(np.abs(y - np.median(y)) + np.abs(x - np.median(x)))
    return [int(x[middle]), int(y[middle])]


KINDS = {
    "refer": 0.34, "absent": 0.08, "exists": 0.07, "count": 0.1, "side": 0.09, "closer": 0.12, "nearest": 0.06,
    "colour": 0.06, "pattern": 0.04, "describe": 0.04,
}  # fmt: skip
