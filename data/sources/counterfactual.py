"""Closest-point questions whose depth span is given, and is another picture's: the answer is right for that map.

A model that reads the answer off the picture is wrong on these, one that reads its own depth span is right.  Nothing
of the span is learned from them.
"""

import json
from collections.abc import Iterator

import torch

from ...modeling_depth_vqvae import DepthVQVAE
from ..depths import DepthError, decode_depth
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
    """The record with these codes in its span and the answer that follows from them; None where they do not tell."""
    depth = vqvae.decode_ids(torch.tensor([codes]))[0]
    width, height = upright_size(record["image"]["bytes"])
    near = {
        letter: depth[int(y * depth.shape[0] / height), int(x * depth.shape[1] / width)].item()
        for letter, (x, y) in points.items()
    }
    first, second, *_ = sorted(near.values(), reverse=True)
    if first - second < CLEAR:
        return None
    letter = max(near, key=near.get)
    messages = [
        {**message, "content": f"({letter})"} if message["role"] == "assistant" else message
        for message in record["messages"]
    ]
    extra = json.dumps({**json.loads(record["extra"]), GIVEN: True}, ensure_ascii=False, sort_keys=True)
    return {**record, "id": f"{record['id']}-given", "messages": messages, "depth": None, "depth_codes": codes,
            "depth_codebook": codebook, "extra": extra}  # fmt: skip
