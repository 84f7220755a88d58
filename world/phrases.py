"""Words for things: phrases that fit exactly one thing in the picture, and phrases that fit none."""

import numpy as np

from .surfaces import COLOURS, may_be_taken_for
from .views import View

# Nouns that two people may give to one thing seen from one side.
_ALIKE = {
    "ball": "egg mushroom",
    "cylinder": "barrel bucket bottle hat",
    "cone": "pyramid tree hat",
    "vase": "bottle bowl barrel bucket mug",
    "bucket": "mug barrel",
    "bench": "sofa table",
    "bowl": "hat bucket mug mushroom",
    "bag": "bucket",
    "hat": "mushroom lamp",
    "mug": "cylinder barrel",
    "chair": "bench sofa table",
    "lamp": "mushroom table",
    "table": "mushroom",
    "doll": "bottle",
    "tree": "mushroom lamp",
    "cube": "bag",
    "cactus": "tree doll",
    "egg": "vase",
}
ALIKE = {frozenset((noun, other)) for noun, others in _ALIKE.items() for other in others.split()}

IRREGULAR = {"bench": "benches", "arch": "arches", "cactus": "cactuses"}
APART = 0.08  # of the width, between things that are told apart by left and right
DEEPER = 1.18  # ratio of distances from which one thing is plainly behind another
NUMBERS = ("second", "third")


def plural(noun: str) -> str:
    return IRREGULAR.get(noun, noun + "s")


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def name(view: View, colour: bool = True, pattern: bool = False) -> str:
    """ "striped red ball"."""
    words = [view.pattern] if pattern else []
    return " ".join([*words, *([view.colour] if colour else []), view.noun])


def may_fit(other: View, noun: str, colour: str | None = None, pattern: str | None = None) -> bool:
    """Whether a person could mean `other` by these words."""
    if other.noun != noun and frozenset((other.noun, noun)) not in ALIKE:
        return False
    if colour and not may_be_taken_for(other.colour, colour):
        return False
    return not pattern or other.pattern == pattern or not other.patterned


def same_kind(noun: str, found: list[View]) -> list[View] | None:
    """All things of that noun; None when one of them is not plain to see, or another could be taken for one."""
    kind = [view for view in found if may_fit(view, noun)]
    return kind if all(view.clear and view.noun == noun for view in kind) else None


def by_attributes(view: View, found: list[View]) -> list[str]:
    """Phrases by noun, colour and pattern that fit this thing alone."""
    phrases = []
    for colour, pattern in ((False, False), (True, False), (False, True), (True, True)):
        if pattern and not view.patterned:
            continue
        words = (view.noun, view.colour if colour else None, view.pattern if pattern else None)
        if sum(may_fit(other, *words) for other in found) == 1:
            phrases.append("the " + name(view, colour, pattern))
    return phrases


def by_place(view: View, found: list[View]) -> list[str]:
    """Phrases by order among its own kind.  All of the kind must be plain to see."""
    kind = same_kind(view.noun, found)
    if kind is None or len(kind) < 2:
        return []
    phrases = []
    across = sorted(kind, key=lambda other: other.x)
    gaps = np.diff([other.x for other in across])
    rank = next(index for index, other in enumerate(across) if other is view)
    if (rank == 0 or gaps[rank - 1] > APART) and (rank == len(kind) - 1 or gaps[rank] > APART):
        if rank == 0:
            phrases.append(f"the {view.noun} farthest to the left")
        elif rank == len(kind) - 1:
            phrases.append(f"the {view.noun} farthest to the right")
        if 0 < rank <= len(NUMBERS) and len(kind) > 2 and gaps.min() > APART:
            phrases.append(f"the {NUMBERS[rank - 1]} {view.noun} from the left")
    others = [other for other in kind if other is not view]
    if all(in_front(view, other) for other in others):
        phrases.append(f"the {view.noun} closest to the camera")
    elif all(in_front(other, view) for other in others):
        phrases.append(f"the {view.noun} farthest from the camera")
    return phrases


def by_neighbour(view: View, found: list[View]) -> list[str]:
    """Phrases like "the ball to the left of the red cube"."""
    kind = same_kind(view.noun, found)
    if kind is None:
        return []
    phrases = []
    for anchor in found:
        if anchor.noun == view.noun or not anchor.clear:
            continue
        named = by_attributes(anchor, found)
        if not named:
            continue
        for words, fits, cannot in (
            ("to the left of", lambda o, a: o.x < a.x - APART, lambda o, a: o.x > a.x + APART),
            ("to the right of", lambda o, a: o.x > a.x + APART, lambda o, a: o.x < a.x - APART),
            ("in front of", in_front, lambda o, a: in_front(a, o)),
            ("behind", lambda o, a: in_front(a, o), in_front),
        ):
            others = [other for other in kind if other is not view]
            if others and fits(view, anchor) and all(cannot(other, anchor) for other in others):
                phrases.append(f"the {view.noun} {words} {named[0]}")
    return phrases


def in_front(first: View, second: View) -> bool:
    """Plainly nearer, however one measures."""
    return first.middle * DEEPER < second.middle and first.near * 1.08 < second.near and first.far * 1.08 < second.far


def absent(rng, found: list[View], nouns: list[str], taken) -> tuple[str, str, str | None] | None:
    """(words, noun, colour) of something that is not there, as like as possible to what is; None if none was found."""
    for _ in range(12):
        noun = nouns[rng.integers(len(nouns))]
        colour = list(COLOURS)[rng.integers(len(COLOURS))] if rng.random() < 0.8 else None
        if found and rng.random() < 0.6:
            seen = found[rng.integers(len(found))]
            noun, colour = (seen.noun, colour) if rng.random() < 0.6 else (noun, seen.colour)
        if noun not in taken and not any(may_fit(view, noun, colour) for view in found):
            return " ".join(filter(None, [colour, noun])), noun, colour
    return None
