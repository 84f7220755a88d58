"""RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO: the mask of what an expression means.

As the published numbers are made: every sentence is a query of its own, in the words "Please segment … in this
image."; the prediction is the union of all returned masks, at the picture's own size; a thing that the model takes
for absent has an empty one.  The data lies in the layout of refer (`data.sources.refer`, `.grefcoco`), or as Parquet
files of one data set (`.refcoco_parquet`).
"""

from collections.abc import Iterator
from pathlib import Path

from ..data.masks import decode_mask
from ..data.sources.grefcoco import grefcoco_items
from ..data.sources.refcoco_parquet import refcoco_parquet_items
from ..data.sources.refer import refer_items
from ..data.sources.referring import ReferringItem
from ..data.tally import Tally
from ..data.templates import REFERRING_QUESTIONS, fill
from .benchmark import Benchmark, Figure, Item, Judgement, Prediction, mean, ratio, share
from .metrics import THRESHOLDS, iou, overlap

QUESTION = REFERRING_QUESTIONS[0]


class RefCOCO(Benchmark):
    """Figures: cIoU (sum of intersections over sum of unions), gIoU (mean IoU), the share of masks from an IoU on; the
    cIoU if no object score held a mask back; how many things were seen to be there."""

    name = "refcoco"
    splits: tuple[str, ...] = ("val", "testA", "testB")
    needs = ("seg",)
    answer_tokens = 32

    def items(self, data: Path, split: str, tally: Tally) -> Iterator[Item]:
        for found in self._pictures(data, split, tally):
            for thing in found.things:
                for number, phrase in enumerate(thing.phrases):
                    tally.keep()
                    yield Item(
                        id=f"{found.id}/{thing.key}/{number}",
                        question=fill(QUESTION, phrase),
                        pictures=(found.image["bytes"],),
                        perception="seg",
                        truth={"mask": thing.mask},
                        group=found.id,
                    )

    def _pictures(self, data: Path, split: str, tally: Tally) -> Iterator[ReferringItem]:
        if (data / self.name).is_dir() or not any(data.rglob("*.parquet")):
            return refer_items(data, dataset=self.name, split=split, tally=tally)
        return refcoco_parquet_items(data, split=split, source=self.name, tally=tally)

    def judge(self, item: Item, prediction: Prediction) -> Judgement:
        return judge_mask(item, prediction)

    def figures(self, judgements: list[Judgement]) -> list[Figure]:
        return [
            *mask_figures(judgements),
            ratio("cIoU whatever the object score", judgements, "any_intersection", "any_union"),
            share("seen to be there", judgements, "marked"),
        ]


class RefCOCOPlus(RefCOCO):
    name = "refcoco+"


class RefCOCOg(RefCOCO):
    """The split by umd."""

    name = "refcocog"
    splits = ("val", "test")


class GRefCOCO(RefCOCO):
    """Expressions that mean several things, or nothing: an empty mask is then right (IoU 1) and any other wrong.

    Figures: gIoU over all, cIoU, and of what is absent (N-acc) and what is there (T-acc) how much was seen to be so.
    """

    name = "grefcoco"

    def _pictures(self, data: Path, split: str, tally: Tally) -> Iterator[ReferringItem]:
        return grefcoco_items(data, split=split, tally=tally)

    def figures(self, judgements: list[Judgement]) -> list[Figure]:
        found = mask_figures(judgements)
        return [
            found[1],
            found[0],
            share("N-acc, absent and left out", judgements, "left_out"),
            share("T-acc, there and marked", judgements, "marked"),
            *found[2:],
        ]


def judge_mask(item: Item, prediction: Prediction) -> Judgement:
    """`left_out` has a value where the thing is absent, and `marked` where it is there."""
    true = decode_mask(item.truth["mask"])
    found, whatever = prediction.mask(true.shape), prediction.mask(true.shape, object_threshold=0)
    intersection, union = overlap(found, true)
    any_intersection, any_union = overlap(whatever, true)
    invalid = prediction.error or (None if prediction.masks else "no [SEG]")
    # Where nothing was said, it was not said that nothing is there.
    value = 0.0 if invalid else iou(intersection, union)
    values = {
        "iou": value,
        "intersection": intersection,
        "union": union,
        "any_intersection": any_intersection,
        "any_union": any_union,
        **{f"iou_{threshold}": value >= threshold for threshold in THRESHOLDS},
    }
    if true.any():
        values["marked"] = bool(found.any())
    else:
        values["left_out"] = not found.any() and not invalid
    return Judgement(item.id, values, invalid, value)


def mask_figures(judgements: list[Judgement]) -> list[Figure]:
    """cIoU, gIoU, and the share of masks from each IoU on."""
    return [
        ratio("cIoU", judgements, "intersection", "union"),
        mean("gIoU", judgements, "iou"),
        *(share(f"precision at {threshold}", judgements, f"iou_{threshold}") for threshold in THRESHOLDS),
    ]
