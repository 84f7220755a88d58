"""Depth of pictures that have a true map: the map that the written codes decode to, beside the true one.

Any data set of records with depth (`data.load`): shards, or a folder of one's own.  The question is the record's
first.  Both maps are relative inverse depth; what AbsRel and delta1 mean for it: `metrics.depth_errors`.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..data.depths import decode_depth
from ..data.load import open_data
from ..data.tally import Tally
from .benchmark import Benchmark, Figure, Item, Judgement, Prediction, mean
from .metrics import align_scale_shift, depth_errors

ALL = "all"


class Depth(Benchmark):
    """Figures: delta1 and AbsRel after the best scale and shift of each picture in inverse depth, and without.

    A picture without a whole span has a delta1 of 0, and no AbsRel: there is no worst one.
    """

    name = "depth"
    splits = (ALL, "test", "validation", "train")
    needs = ("depth",)
    answer_tokens = 1

    def check_split(self, split: str) -> None:
        """Any: shards may have splits of their own."""

    def items(self, data: Path, split: str, tally: Tally) -> Iterator[Item]:
        read = Tally("read")
        for record in open_data(data, split=None if split == ALL else split, on_problem="skip", tally=read):
            questions = [message["content"] for message in record["messages"] if message["role"] == "user"]
            if record["depth"] is None or record["image"] is None or not questions:
                tally.drop("no depth" if record["image"] is not None else "no picture", record["id"])
                continue
            if np.isnan(decode_depth(record["depth"]["bytes"])).all():
                tally.drop("depth without a value", record["id"])
                continue
            tally.keep()
            pictures, depth = (record["image"]["bytes"],), record["depth"]["bytes"]
            yield Item(record["id"], questions[0], pictures, "depth", {}, depth)
        for reason, count in read.dropped.items():
            tally.drop(reason, *read.examples[reason][:1], count=count)

    def judge(self, item: Item, prediction: Prediction) -> Judgement:
        values, invalid = judge_depth(item, prediction)
        return Judgement(item.id, values, invalid, values["delta1"])

    def figures(self, judgements: list[Judgement]) -> list[Figure]:
        return depth_figures(judgements)


def judge_depth(item: Item, prediction: Prediction) -> tuple[dict, str | None]:
    """(values, what could not be read)."""
    found = prediction.depth
    invalid = prediction.error or (None if found is not None else "no depth span")
    if invalid:
        return {"delta1": 0.0, "raw_delta1": 0.0, "abs_rel": None, "raw_abs_rel": None}, invalid
    true = decode_depth(item.depth)
    found = resize(found, true.shape)
    scale, shift = align_scale_shift(found, true)
    error, near = depth_errors(scale * found + shift, true)
    raw_error, raw_near = depth_errors(found, true)
    return {"delta1": near, "raw_delta1": raw_near, "abs_rel": error, "raw_abs_rel": raw_error}, None


def resize(depth: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """float32[h, w] → float32[H, W], as `post_process_depth` does it."""
    values = torch.from_numpy(np.ascontiguousarray(depth, np.float32))[None, None]
    return F.interpolate(values, tuple(shape), mode="bilinear", align_corners=False)[0, 0].numpy()


def depth_figures(judgements: list[Judgement]) -> list[Figure]:
    return [
        mean("delta1, aligned", judgements, "delta1"),
        mean("AbsRel, aligned", judgements, "abs_rel", unit=""),
        mean("delta1 as it is", judgements, "raw_delta1"),
        mean("AbsRel as it is", judgements, "raw_abs_rel", unit=""),
    ]
