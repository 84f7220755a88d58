"""Closest-point questions whose depth span is given, and is another picture's: the answer is right for that map.

    python -m perceptio.data.sources.counterfactual build/scenes build/given --tokenizer checkpoints/depth-tiny

A model that reads the answer off the picture is wrong on these, one that reads its own depth span is right.  Nothing
of the span is learned from them.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ...modeling_depth_vqvae import DepthVQVAE
from ..depths import DepthError, decode_depth, nearness
from ..label import encode_codes, load_vqvae
from ..pick import write_data_set
from ..record import GIVEN, upright_size
from ..shards import read_shards
from ..tally import Tally

CLEAR = 0.08  # of relative inverse depth between the nearest point and the next
DECODED = 64  # spans at a time


def read_counterfactual(root, *, tally: Tally, tokenizer: str, split: str = "train") -> Iterator[dict]:
    """The closest-point records of a folder of the world's shards, each with the map of the one before it.

    tokenizer: folder of the depth tokenizer, or of a Perceptio, that makes the codes where a record has none of its.
    """
    vqvae = load_vqvae(tokenizer)
    codebook = vqvae.codebook_hash()
    asked = _with_codes(read_shards(root, split), vqvae, codebook)
    while pairs := list(islice(asked, DECODED)):
        maps = vqvae.decode_ids(torch.tensor([codes for _, codes in pairs]))
        for (record, codes), depth in zip(pairs, maps, strict=True):
            changed = give_span(record, codes, depth, codebook)
            if changed is None:
                tally.drop("no point is plainly the nearest", record["id"])
            else:
                tally.keep()
                yield changed


def _with_codes(records, vqvae: DepthVQVAE, codebook: str) -> Iterator[tuple[dict, list[int]]]:
    """Each record with marked points, and the codes of the one before it.  Other records are passed over: they may be
    of the very same picture."""
    before = None
    for record in filter(marked_points, records):
        try:
            codes = _codes(record, vqvae, codebook)
        except DepthError:
            codes = None
        if before is not None and before != codes:
            yield record, before
        before = codes


def _codes(record: dict, vqvae: DepthVQVAE, codebook: str) -> list[int] | None:
    if record["depth_codes"] is not None and record["depth_codebook"] == codebook:
        return list(record["depth_codes"])
    return None if record["depth"] is None else encode_codes(decode_depth(record["depth"]["bytes"]), vqvae)


def marked_points(record: dict) -> dict[str, list[int]] | None:
    """Letter → (x, y) in pixels, of a record that asks for the closest of them."""
    asked = json.loads(record["extra"]).get("questions", [])
    return next((question["points"] for question in asked if question.get("kind") == "points"), None)


def give_span(record: dict, codes: list[int], depth: Tensor, codebook: str) -> dict | None:
    """The record with these codes, which decode to `depth`, in its span, and the answers that follow from them; None
    where they do not tell the first.  Later questions that they do not tell are left out."""
    width, height = upright_size(record["image"]["bytes"])
    near = {
        letter: depth[int(y * depth.shape[0] / height), int(x * depth.shape[1] / width)].item()
        for letter, (x, y) in marked_points(record).items()
    }
    extra = json.loads(record["extra"])
    answers = [told(question, near) for question in extra["questions"]]
    if answers[0] is None:
        return None
    kept = [place for place, answer in enumerate(answers) if answer is not None]
    messages, masks = [], []
    for turn, place in enumerate(kept):
        question, reply = record["messages"][2 * place : 2 * place + 2]
        messages += [question, {**reply, "content": answers[place]}]
        masks += [{**mask, "turn": 2 * turn + 1} for mask in record["masks"] if mask["turn"] == 2 * place + 1]
    extra |= {GIVEN: True, "questions": [extra["questions"][place] for place in kept]}
    return {**record, "id": f"{record['id']}-given", "messages": messages, "masks": masks, "depth": None,
            "depth_codes": codes, "depth_codebook": codebook,
            "extra": json.dumps(extra, ensure_ascii=False, sort_keys=True)}  # fmt: skip


def told(question: dict, near: dict[str, float]) -> str | None:
    """What points this near answer; None where two are almost alike."""
    letters = question.get("letters") or list(near)
    if len(letters) == 1:
        return f"{nearness(near[letters[0]])}."
    first, second, *_ = sorted((near[letter] for letter in letters), reverse=True)
    return f"({max(letters, key=near.get)})" if first - second >= CLEAR else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", type=Path, help="folder of the world's shards")
    parser.add_argument("out", type=Path, help="folder to write, as shards")
    parser.add_argument("--tokenizer", required=True, help="folder of the depth tokenizer")
    parser.add_argument("--split", default="train")
    options = parser.parse_args(arguments)
    tally = Tally("counterfactual")
    found = read_counterfactual(options.scenes, tally=tally, tokenizer=options.tokenizer, split=options.split)
    return write_data_set(found, options.out, options.split, tally)


if __name__ == "__main__":
    sys.exit(main())
