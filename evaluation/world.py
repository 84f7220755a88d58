"""Our own rendered scenes, whose truth is exact: shards that `perceptio world build` wrote.

Every question is asked on its own, with mask and depth first.  The split "all" is every one that the folder holds but
train and validation, "points3,lure" is these two; each has figures of its own.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..data.manifest import read_manifest
from ..data.record import DataError
from ..data.shards import read_shards
from ..data.tally import Tally
from ..world.command import SPLITS
from .benchmark import Benchmark, Figure, Item, Judgement, Prediction, share
from .depth import ALL, depth_figures, judge_depth
from .metrics import exact_answer, parse_letter
from .referring import judge_mask, mask_figures

SEEN = ("train", "validation")  # while training
FREE = ("refer", "absent", "describe")  # kinds that have no one right wording
PARTS = ("answer", "mask", "depth")


class World(Benchmark):
    """Figures of each split, as far as it has such questions: the answers, by kind, compared as `exact_answer` has it,
    those about points by their letter; masks of what is referred to; how often what is absent was left without one;
    depth, and how many depth spans are whole.

    `invalid` beside a figure counts the part it is about: an answer without a letter is a valid mask all the same.
    """

    name = "world"
    splits = (ALL, *SPLITS)

    def check_split(self, split: str) -> None:
        named = split.split(",")
        for name in named:
            super().check_split(name)
        if len(named) > 1 and (ALL in named or len(set(named)) < len(named)):
            raise ValueError(f"`--split` is {split!r}, expected {ALL!r} alone, or others once each")

    def items(self, data: Path, split: str, tally: Tally) -> Iterator[Item]:
        for name in self._splits(data, split):
            for record in read_shards(data, split=name):
                yield from self._questions(record, tally)

    @staticmethod
    def _splits(data: Path, split: str) -> list[str]:
        if split != ALL:
            return split.split(",")
        names = [name for name in SPLITS if name in read_manifest(data)["splits"] and name not in SEEN]
        if not names:
            raise DataError(
                f"{data} holds no split to evaluate on, expected some of {', '.join(SPLITS[2:])}: write them with "
                "`perceptio world build --split`"
            )
        return names

    @staticmethod
    def _questions(record: dict, tally: Tally) -> Iterator[Item]:
        asked = json.loads(record["extra"]).get("questions", [])
        masks = {mask["turn"]: mask for mask in record["masks"]}
        if record["source"] != "world" or len(asked) != len(record["messages"]) / 2 or not asked:
            tally.drop("not of the world", record["id"])
            return
        for number, question in enumerate(asked):
            text, answer = (message["content"] for message in record["messages"][2 * number : 2 * number + 2])
            if 2 * number + 1 not in masks:
                tally.drop("a further question without a mask of its own", f"{record['id']}/{number}")
                continue
            mask = {key: masks[2 * number + 1][key] for key in ("size", "counts")}
            truth = {"split": record["split"], "kind": question["kind"], "answer": answer, "mask": mask}
            if question["kind"] == "points":
                truth["options"] = "".join(sorted(question["points"]))
            tally.keep()
            yield Item(
                id=f"{record['id']}/{number}",
                question=text,
                pictures=(record["image"]["bytes"],),
                perception="seg+depth",
                truth=truth,
                depth=record["depth"]["bytes"],
                group=record["id"].removesuffix("-points"),
            )

    def judge(self, item: Item, prediction: Prediction) -> Judgement:
        kind, asked = item.truth["kind"], prediction.perception
        values: dict = {"split": item.truth["split"], "kind": kind}
        unread: dict[str, str | None] = {}
        parts = []
        if kind not in FREE:
            values["right"], unread["answer"] = self._judge_answer(item, prediction)
            parts.append(float(values["right"]))
        if "seg" in asked:
            masked = judge_mask(item, prediction)
            unread["mask"] = masked.invalid
            values |= masked.values
            parts.append(masked.values["iou"])
        if "depth" in asked:
            found, unread["depth"] = judge_depth(item, prediction)
            values |= found
            values["whole"] = unread["depth"] is None and not prediction.problems
            parts.append(found["delta1"])
        values["unread"] = {part: unread.get(part) for part in PARTS}
        invalid = prediction.error or next(filter(None, unread.values()), None)
        return Judgement(item.id, values, invalid, sum(parts) / len(parts) if parts else None)

    @staticmethod
    def _judge_answer(item: Item, prediction: Prediction) -> tuple[bool, str | None]:
        """(right, what could not be read)."""
        true = item.truth["answer"]
        if item.truth["kind"] == "points":
            found, expected = (parse_letter(text, item.truth["options"]) for text in (prediction.answer, true))
        else:
            found, expected = exact_answer(prediction.answer), exact_answer(true)
        unread = prediction.error or (None if found else "no answer that can be read")
        return unread is None and found == expected, unread

    def figures(self, judgements: list[Judgement]) -> list[Figure]:
        present = {row.values["split"] for row in judgements}
        return [
            replace(figure, name=f"{split}: {figure.name}")
            for split in SPLITS
            if split in present
            for figure in _figures([row for row in judgements if row.values["split"] == split])
            if figure.n or figure.invalid
        ]


def _figures(rows: list[Judgement]) -> list[Figure]:
    answers, masks, depths = (_about(part, rows) for part in PARTS)
    kinds = sorted({row.values["kind"] for row in answers if "right" in row.values})
    found = [share("answers", answers, "right")] if len(kinds) > 1 else []
    for kind in kinds:
        name = "closest point" if kind == "points" else f"answers, {kind}"
        found.append(share(name, [row for row in answers if row.values["kind"] == kind], "right"))
    found += mask_figures([row for row in masks if row.values["kind"] == "refer"])
    found.append(share("absent, and left without a mask", masks, "left_out"))
    return [*found, *depth_figures(depths), share("whole depth spans", depths, "whole")]


def _about(part: str, rows: list[Judgement]) -> list[Judgement]:
    return [replace(row, invalid=row.values["unread"][part]) for row in rows]
