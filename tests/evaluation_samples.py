"""A small data set of our own scenes, and predictors that need no model."""

from dataclasses import dataclass, field

import numpy as np

from perceptio.data.depths import decode_depth
from perceptio.data.masks import decode_mask
from perceptio.data.shards import write_shards
from perceptio.evaluation.benchmark import Benchmark, Item, Judgement, Prediction, share
from perceptio.evaluation.predict import Task

WORLD_SPLITS = ("test", "points3", "points4", "lure", "refer", "absent")


def write_world(folder, scenes: int = 2, splits=WORLD_SPLITS) -> None:
    from perceptio.world.records import WorldOptions, scene_records

    options = WorldOptions(64, 64)
    for split in splits:
        records = (record for index in range(scenes) for record in scene_records(index, 0, split, options))
        write_shards(records, folder, split=split)


@dataclass
class Oracle:
    """The truth as a prediction."""

    maps: list[np.ndarray] = field(default_factory=list)

    def __call__(self, tasks: list[Task]) -> list[Prediction]:
        return [self._one(task.item, task.perception) for task in tasks]

    def _one(self, item: Item, mode: str) -> Prediction:
        found = Prediction(item.id, mode, item.truth.get("answer", ""), decode=self.decode)
        if "seg" in mode:
            there = decode_mask(item.truth["mask"]).any()
            found.masks = [{**item.truth["mask"], "score": 1.0, "object_score": float(there)}]
        if "depth" in mode:
            self.maps.append(decode_depth(item.depth))
            found.depth_codes = [len(self.maps) - 1]
        return found

    def decode(self, codes: list[int]) -> np.ndarray:
        return self.maps[codes[0]]


class Silent:
    """Gives nothing at all."""

    decode = None

    def __call__(self, tasks: list[Task]) -> list[Prediction]:
        return [Prediction(task.item.id, task.perception) for task in tasks]


class Words(Benchmark):
    """Questions without pictures, in two perceptions that alternate."""

    name, splits = "words", ("test",)

    def __init__(self, count: int = 7):
        self.count = count

    def items(self, data, split, tally):
        for index in range(self.count):
            tally.keep()
            perception = "none" if index % 3 else "seg"
            yield Item(f"w{index}", f"How many? {index}", (), perception, {"answer": str(index)})

    def judge(self, item: Item, prediction: Prediction) -> Judgement:
        right = prediction.answer == item.truth["answer"]
        return Judgement(item.id, {"right": right}, None if prediction.answer else "no answer", float(right))

    def figures(self, judgements):
        return [share("accuracy", judgements, "right")]
