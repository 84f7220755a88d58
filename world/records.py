"""Scenes as records: deterministic in (seed, split, index), and in nothing else."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from multiprocessing import get_context

import numpy as np
from PIL import Image

from ..data.masks import encode_mask
from ..data.record import READ, assistant, make_record, user
from .questions import KINDS, OF_DEPTH, Asker, Question
from .scene import sample_scene

# Each split draws from numbers of its own, so that none shares a scene with another.
SPLITS = ("train", "validation", "test", "points3", "points4", "points5", "lure", "refer", "absent")
POINTS = {"points3": 3, "points4": 4, "points5": 5}
LICENCE = "CC0-1.0"
WORTH_WORKERS = 32  # scenes; below, starting processes takes longer than rendering
LONGEST_SEARCH = 60  # scenes that are tried for one question before giving up


@dataclass(frozen=True)
class WorldOptions:
    """width, height: pixels.  turns: questions on one picture.  points: share of the training scenes that also give a
    picture with marked points.  point_turns: questions on one of those, the first asks for the closest.  kinds: weight
    of each kind of question.  repeated: kinds that one picture may have several questions of.  second_depth: later
    answers repeat the depth span as well as the mask."""

    width: int = 224
    height: int = 224
    turns: int = 3
    points: float = 0.5
    point_turns: int = 1
    kinds: dict = field(default_factory=lambda: dict(KINDS))
    repeated: tuple[str, ...] = ("refer",)
    second_depth: bool = False

    def __post_init__(self):
        for name in ("width", "height"):
            if not isinstance(getattr(self, name), int) or not 64 <= getattr(self, name) <= 2000:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, expected 64 to 2000 pixels")
        for name in ("turns", "point_turns"):
            if not isinstance(getattr(self, name), int) or not 1 <= getattr(self, name) <= 20:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, expected 1 to 20 questions on one picture")
        if not 0 <= self.points <= 1:
            raise ValueError(f"`points` is {self.points!r}, expected a share from 0 to 1")
        unknown = set(self.kinds) - set(KINDS)
        if unknown or not self.kinds or not all(w >= 0 for w in self.kinds.values()) or not sum(self.kinds.values()):
            raise ValueError(f"`kinds` is {self.kinds!r}, expected a weight for some of {', '.join(KINDS)}")
        if not any(weight for kind, weight in self.kinds.items() if kind != "absent"):
            raise ValueError(f"`kinds` is {self.kinds!r}, expected one besides absent: a scene needs something to see")
        if set(self.repeated) - set(KINDS):
            raise ValueError(f"`repeated` is {self.repeated!r}, expected some of {', '.join(KINDS)}")


def scene_records(index: int, seed: int = 0, split: str = "train", options: WorldOptions | None = None) -> list[dict]:
    """The records of one scene: in "train", "validation" and "test" one with several turns and perhaps one with marked
    points; in the other splits exactly one with the question that the split is named for."""
    options = options or WorldOptions()
    if split not in SPLITS:
        raise ValueError(f"`split` is {split!r}, expected one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    name = f"{split}-{seed}-{index:07d}"
    if split in SPLITS[3:]:
        return [_single(rng, name, split, options)]
    while True:
        asker = Asker(sample_scene(rng, options.width, options.height), rng)
        questions = _several(asker, rng, options)
        if any(question.mask.any() for question in questions):
            break
    found = [_record(asker, rng, name, split, questions, options)]
    if rng.random() < options.points:
        points = asker.points(int(rng.integers(2, 6)), None if rng.random() < 0.5 else bool(rng.random() < 0.6))
        if points is not None:
            asked = [points, *asker.about_points(points, options.point_turns - 1)]
            found.append(_record(asker, rng, name + "-points", split, asked, options))
    return found


def _several(asker: Asker, rng, options: WorldOptions) -> list[Question]:
    kinds = [kind for kind, weight in options.kinds.items() if weight]
    weights = np.array([options.kinds[kind] for kind in kinds])
    questions: list[Question] = []
    for kind in rng.choice(kinds, 4 * options.turns, p=weights / weights.sum()):
        if kind not in options.repeated and any(kind == other.kind for other in questions):
            continue
        question = asker.ask(str(kind))
        if question is not None and not any(_same(question, other) for other in questions):
            questions.append(question)
        if len(questions) == options.turns:
            break
    return questions


def _same(question: Question, other: Question) -> bool:
    """Whether one gives the other's answer away: it asks the same of the same thing, or of the same two things.
    A thing may be referred to in several ways."""
    if question.text == other.text:
        return True
    if question.kind != other.kind or question.kind == "refer":
        return False
    thing = question.extra.get("thing")
    shared = set(question.extra.get("things", ())) & set(other.extra.get("things", ()))
    return len(shared) > 1 or (thing is not None and thing == other.extra.get("thing"))


def _single(rng, name: str, split: str, options: WorldOptions) -> dict:
    for _ in range(LONGEST_SEARCH):
        asker = Asker(sample_scene(rng, options.width, options.height), rng)
        if split in POINTS:
            question = asker.points(POINTS[split])
        elif split == "lure":
            question = asker.points(int(rng.integers(3, 6)), lure=True)
        else:
            question = asker.ask(split)
        if question is not None:
            return _record(asker, rng, name, split, [question], options)
    raise RuntimeError(f"no question of {split} was found in {LONGEST_SEARCH} scenes: this must not happen")


def _record(asker: Asker, rng, name: str, split: str, questions: list[Question], options: WorldOptions) -> dict:
    scene = asker.scene
    image = questions[0].image if questions[0].image is not None else scene.rendering.image
    messages, masks = [], []
    for turn, question in enumerate(questions):
        parts = ["seg"] if question.mask is not None else []
        parts += ["depth"] if turn == 0 or options.second_depth else []
        messages += [user(question.text), assistant(question.answer, "+".join(parts) or "none")]
        if question.mask is not None:
            masks.append({"turn": 2 * turn + 1, **encode_mask(question.mask)})
    extra = {"place": scene.place, "questions": [{"kind": q.kind, **q.extra} for q in questions]}
    if any(question.kind in OF_DEPTH for question in questions):
        extra[READ] = True
    return make_record(
        id=name,
        image={"bytes": _as_jpeg(image, rng), "path": f"{name}.jpg"},
        messages=messages,
        masks=masks,
        depth={"bytes": asker.depth_png, "path": f"{name}.png"},
        source="world",
        licence=LICENCE,
        split=split,
        extra=extra,
    )


def _as_jpeg(image: np.ndarray, rng) -> bytes:
    file = BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=int(rng.integers(82, 97)))
    return file.getvalue()


def world_records(
    count: int,
    seed: int = 0,
    split: str = "train",
    options: WorldOptions | None = None,
    *,
    first: int = 0,
    workers: int | None = None,
) -> Iterator[dict]:
    """The records of `count` scenes, in order.  The same whatever the number of workers; 0 renders in this process."""
    options = options or WorldOptions()
    tasks = [(index, seed, split, options) for index in range(first, first + count)]
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers == 0 or count < WORTH_WORKERS:
        for task in tasks:
            yield from scene_records(*task)
        return
    with get_context("spawn").Pool(min(workers, count)) as pool:
        chunk = max(1, min(16, math.ceil(count / workers / 4)))
        for found in pool.imap(_scene_records, tasks, chunk):
            yield from found


def _scene_records(task) -> list[dict]:
    return scene_records(*task)


def world_dataset(count: int, seed: int = 0, split: str = "train", options: WorldOptions | None = None):
    """A `datasets.IterableDataset` that renders while it is read; its parts go to the workers of a DataLoader."""
    from datasets import IterableDataset

    from ..data.record import FEATURES

    ranges = [(start, min(start + 64, count)) for start in range(0, count, 64)]
    return IterableDataset.from_generator(
        _ranges, features=FEATURES, gen_kwargs={"ranges": ranges, "seed": seed, "split": split, "options": options}
    )


def _ranges(ranges, seed, split, options):
    for start, stop in ranges:
        for index in range(start, stop):
            yield from scene_records(index, seed, split, options)
