"""Closest-point questions whose depth span is given, and is another picture's: the answer is right for that map.

A model that reads the answer off the picture is wrong on these, one that reads its own depth span is right.  Nothing
of the span is learned from them.
"""

import json
from collections.abc import Iterator

import torch

from ...modeling_depth_vqvae import DepthVQVAE
from ..depths import DepthError, decode_depth, nearness
from ..label import encode_codes, load_vqvae
from ..record import GIVEN, upright_size
from ..shards import read_shards
from ..tally import Tally

CLEAR = 0.08  # of relative inverse depth between the nearest point and the next


def read_counterfactual(root, *, tally: Tally, tokenizer: str, split: str = "train") -> Iterator[dict]:
    """The closest-point records of a folder of the world's shards, each with the map of the record before it.

    tokenizer: folder of the depth tokenizer, or of a Perceptio, that makes the codes.
    """
    vqvae, codes = load_vqvae(tokenizer), None
    codebook = vqvae.codebook_hash()
    for record in read_shards(root, split):
        points = marked_points(record)
        if points and codes is not None:
            changed = give_span(record, points, codes, vqvae, codebook)
            if changed is None:
                tally.drop("no point is plainly the nearest", record["id"])
            else:
                tally.keep()
                yield changed
        try:
            codes = None if record["depth"] is None else encode_codes(decode_depth(record["depth"]["bytes"]), vqvae)
        except DepthError:
            codes = None


def marked_points(record: dict) -> dict[str, list[int]] | None:
    """Letter → (x, y) in pixels, of a record that asks for the closest of them."""
    asked = json.loads(record["extra"]).get("questions", [])
    return next((question["points"] for question in asked if question.get("kind") == "points"), None)


@torch.no_grad()
def give_span(record: dict, points: dict, codes: list[int], vqvae: DepthVQVAE, codebook: str) -> dict | None:
    """The record with these codes in its span and the answers that follow from them; None where they do not tell the
    first.  Later questions that they do not tell are left out."""
    depth = vqvae.decode_ids(torch.tensor([codes]))[0]
    width, height = upright_size(record["image"]["bytes"])
    near = {
        letter: depth[int(y * depth.shape[0] / height), int(x * depth.shape[1] / width)].item()
        for letter, (x, y) in points.items()
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
