"""What a benchmark is.  It knows its data and what is right; it never sees a model.

    class Colours(Benchmark):
        name, splits = "colours", ("val", "test")            # the first split is the default

        def items(self, data, split, tally):                 # a folder → items, lazily, in a fixed order
            for row in read_rows(data, split):
                tally.keep()                                 # what cannot be used: tally.drop(reason, where)
                yield Item(row["id"], row["question"], (row["picture"],), "none", {"colour": row["colour"]})

        def judge(self, item, prediction):                   # one item → what it counts for
            answer = exact_answer(prediction.answer)
            invalid = None if answer else "no answer"
            return Judgement(item.id, {"right": answer == item.truth["colour"]}, invalid)

        def figures(self, judgements):                       # all of them → figures
            return [share("accuracy", judgements, "right")]

`judge` is called for every item, also where the model gave nothing (`prediction.error`; the answer is then empty and
there are no masks and no codes): such an item is wrong, and the run marks it invalid with the reason.  What cannot be
read is wrong as well and has a reason in `invalid`.  `share`, `mean` and `ratio` count these beside every figure.
Items must come in the same order each time, with ids of their own; `group` joins those that are not independent of
one another, as several questions on one picture: the intervals then count groups.

A benchmark is found by its name in BENCHMARKS of `perceptio.evaluation` ("module:Class", relative to the package);
those of multiple choice in BENCHMARKS of `perceptio.evaluation.choice`, relative to that.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np

from ..data.masks import decode_mask
from ..data.tally import Tally
from .metrics import bootstrap_ratio, wilson

OBJECT_THRESHOLD = 0.5  # as in `post_process_masks`: below it the thing counts as absent


@dataclass(frozen=True)
class Item:
    """One question.

    id: unique in the split.
    pictures: encoded bytes as published; most questions have one, and perception needs exactly one.
    perception: what the answer opens with: "seg+depth", "seg", "depth" or "none".
    truth: what `judge` wants to know.
    depth: the true depth map as a 16-bit picture (`data.depths`), where there is one.
    group: items with one group are not independent; None is a group of its own.
    """

    id: str
    question: str
    pictures: tuple[bytes, ...] = ()
    perception: str = "none"
    truth: dict = field(default_factory=dict)
    depth: bytes | None = field(default=None, repr=False)
    group: str | None = None

    def fingerprint(self) -> str:
        """Follows from all that the model is shown, and from nothing else."""
        digest = hashlib.sha256(json.dumps([self.id, self.question, self.perception]).encode())
        for picture in self.pictures:
            digest.update(hashlib.sha256(picture).digest())
        return digest.hexdigest()[:16]


@dataclass
class Prediction:
    """What the model gave for one item, and one line of `predictions.jsonl`.

    perception: what was asked for; the item's own unless the run replaced it.
    masks: for each [SEG] a dict of size and counts (COCO's run lengths, at the size of the picture as it is shown),
        score (the IoU that SAM2 predicts) and object_score.  The mask stands here even where the object score is low.
    depth_codes: the codes of the span.  problems: what is wrong with the sequence.
    error: why there is no prediction, as a picture that cannot be read.
    decode: codes → float32[h, w], relative inverse depth in [0, 1]; not part of the line.
    """

    id: str
    perception: str
    answer: str = ""
    masks: list[dict] = field(default_factory=list)
    depth_codes: list[int] | None = None
    problems: list[str] = field(default_factory=list)
    error: str | None = None
    decode: Callable[[list[int]], np.ndarray] | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "decode"}

    def mask(self, size: tuple[int, int], object_threshold: float = OBJECT_THRESHOLD) -> np.ndarray:
        """bool[H, W]: the union of all masks whose object score reaches the threshold; empty where there is none."""
        union = np.zeros(size, bool)
        for mask in self.masks:
            if mask["object_score"] >= object_threshold:
                found = decode_mask(mask)
                if found.shape != union.shape:
                    raise ValueError(f"a mask of {self.id!r} is {found.shape} (H, W), expected the picture's {size}")
                union |= found
        return union

    @property
    def depth(self) -> np.ndarray | None:
        """float32[h, w], relative inverse depth at the resolution of the depth tokenizer; None without a span."""
        return None if self.depth_codes is None or self.decode is None else self.decode(self.depth_codes)


@dataclass
class Judgement:
    """What one item counts for.

    values: names → bool, number or text, for the figures.  What the item is not about is left out; None says that it
        has no value.
    invalid: why the prediction could not be read, or None.
    quality: from 0 to 1, by which the page chooses the best and the worst; None keeps it off the page.
    group: that of the item; the run fills it in.
    """

    id: str
    values: dict
    invalid: str | None = None
    quality: float | None = None
    group: str | None = None


@dataclass(frozen=True)
class Figure:
    """One number with its 95% confidence interval.

    n: items that it is over.  invalid: how many of those that it is about could not be read; they are wrong, and left
    out only where there is no wrong value.  unit: "%", or empty for a plain number.
    low, high: None where there is too little for an interval.
    """

    name: str
    value: float | None
    n: int
    low: float | None
    high: float | None
    invalid: int
    unit: str = "%"

    HEAD = ("figure", "value", "95% interval", "n", "invalid")

    def to_dict(self) -> dict:
        return asdict(self)

    def cells(self) -> tuple[str, ...]:
        """As it is printed, under HEAD."""
        value, low, high = (self._text(number) for number in (self.value, self.low, self.high))
        interval = "–" if self.low is None else f"{low} – {high}"
        return self.name, value + self.unit, interval, str(self.n), str(self.invalid)

    def _text(self, number: float | None) -> str:
        return "–" if number is None else f"{number:.1f}" if self.unit == "%" else f"{number:.4g}"


class Benchmark:
    """See above.

    splits: as they are published, the default first.
    needs: "seg" or "depth", without which the benchmark says nothing.
    answer_tokens: room for an answer, after the depth span.
    """

    name: str = ""
    splits: tuple[str, ...] = ("test",)
    needs: tuple[str, ...] = ()
    answer_tokens: int = 64

    def check_split(self, split: str) -> None:
        if split not in self.splits:
            raise ValueError(f"{self.name} has no split {split!r}, expected one of {', '.join(self.splits)}")

    def items(self, data: Path, split: str, tally: Tally) -> Iterator[Item]:
        raise NotImplementedError

    def judge(self, item: Item, prediction: Prediction) -> Judgement:
        raise NotImplementedError

    def figures(self, judgements: list[Judgement]) -> list[Figure]:
        raise NotImplementedError

    def true_mask(self, item: Item) -> dict | None:
        """The run lengths that the page shows beside the prediction."""
        return item.truth.get("mask")

    def true_answer(self, item: Item) -> str | None:
        """The answer that the page shows beside the prediction."""
        return item.truth.get("answer")


def open_benchmark(name: str) -> Benchmark:
    from . import BENCHMARKS

    if name not in BENCHMARKS:
        raise ValueError(f"the benchmark is called {name!r}, expected one of {', '.join(BENCHMARKS)}")
    module, _, entry = BENCHMARKS[name].partition(":")
    return getattr(import_module(module, __package__), entry)()


# Figures over those judgements that have the value


def share(name: str, judgements: list[Judgement], key: str) -> Figure:
    """Share of the judgements for which `key` is true, with Wilson's interval."""
    rows, groups = _rows(judgements, key)
    hits = [bool(row.values[key]) for row in rows]
    return _figure(name, judgements, key, rows, wilson(hits, groups), "%")


def mean(name: str, judgements: list[Judgement], key: str, unit: str = "%") -> Figure:
    """Mean of the values, with the bootstrap's interval.  In percent unless `unit` is empty."""
    rows, groups = _rows(judgements, key)
    numbers = bootstrap_ratio([row.values[key] for row in rows], [1] * len(rows), groups)
    return _figure(name, judgements, key, rows, numbers, unit)


def ratio(name: str, judgements: list[Judgement], top: str, bottom: str) -> Figure:
    """Sum of one value over the sum of another, in percent, with the bootstrap's interval; 0 / 0 is 100%."""
    rows, groups = _rows(judgements, top)
    tops, bottoms = [row.values[top] for row in rows], [row.values[bottom] for row in rows]
    return _figure(name, judgements, top, rows, bootstrap_ratio(tops, bottoms, groups), "%")


def _rows(judgements: list[Judgement], key: str) -> tuple[list[Judgement], list[str]]:
    rows = [row for row in judgements if row.values.get(key) is not None]
    return rows, [f"item {row.id}" if row.group is None else f"group {row.group}" for row in rows]


def _figure(name, judgements, key, rows, numbers, unit: str) -> Figure:
    scale = 100 if unit == "%" else 1
    value, low, high = (None if number is None else number * scale for number in numbers)
    invalid = sum(row.invalid is not None for row in judgements if key in row.values)
    return Figure(name, value, len(rows), low, high, invalid, unit)
