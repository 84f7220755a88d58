"""Closest-point questions whose depth span is given, and is another picture's: the answer is right for that map.

    python -m perceptio.data.sources.counterfactual build/scenes build/given --tokenizer checkpoints/depth-tiny

A model that reads the answer off the picture is wrong on these, one that reads its own depth span is right.  Maps are
chosen so that neither the lowest point nor any other is the nearest more often than the rest: else a guess would do.
Which is the farthest and how all of them follow is asked as well: like the first question these name no point, and
one answer to a span teaches little.  With every second map of a picture it is asked first how near each point is,
before any answer tells of it.  Nothing of the span itself is learned.
"""

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from ...modeling_depth_vqvae import DepthVQVAE
from ...world.marks import FARTHEST, NEAR, ORDER, discs
from ..depths import DepthError, decode_depth, nearness
from ..label import encode_codes, load_vqvae
from ..masks import encode_mask
from ..pick import write_data_set
from ..record import GIVEN, OPENING, assistant, upright_size, user
from ..shards import read_shards
from ..tally import Tally

CLEAR = 0.08  # of relative inverse depth between the point that is asked for and the next; half of it in an order
DECODED = 64  # spans at a time
MAPS = 64  # of the records before, to choose from
UNNAMED = {"farthest": FARTHEST, "order": ORDER}  # kind → question about all points, asked after the first


def read_counterfactual(root, *, tally: Tally, tokenizer: str, split: str = "train", each: int = 1) -> Iterator[dict]:
    """The closest-point records of a folder of the world's shards, each with the map of one before it.

    tokenizer: folder of the depth tokenizer, or of a Perceptio, that makes the codes where a record has none of its.
    each: how often a record comes, every time with another map.
    """
    if not isinstance(each, int) or each < 1:
        raise ValueError(f"`each` is {each!r}, expected at least 1")
    vqvae = load_vqvae(tokenizer)
    codebook = vqvae.codebook_hash()
    asked = filter(marked_points, read_shards(root, split))  # others may be of the very same picture
    maps: deque[tuple[list[int], Tensor]] = deque(maxlen=MAPS)
    number = 0
    while records := list(islice(asked, DECODED)):
        own = [_codes(record, vqvae, codebook) for record in records]
        decoded = iter(vqvae.decode_ids(torch.tensor([codes for codes in own if codes])) if any(own) else ())
        for record, codes in zip(records, own, strict=True):
            others = [(other, depth) for other, depth in maps if other != codes]
            answers = first_answers(record, [depth for _, depth in others])
            number += 1
            for time in range(each):
                chosen = choose_map(record, answers, number + time)  # so that each order of questions has every turn
                if chosen is None:
                    tally.drop("no point is plainly the nearest", record["id"])
                    continue
                answers[chosen] = None  # the next time another map
                changed = give_span(record, *others[chosen], codebook, one_by_one=time % 2 == 1)
                tally.keep()
                yield changed if not time else {**changed, "id": f"{changed['id']}-{time + 1}"}
            if codes:
                maps.appendleft((codes, next(decoded)))


def first_answers(record: dict, maps: list[Tensor]) -> list[str | None]:
    """What each map answers to the question for the closest point; None where it does not tell."""
    places, size = marked_points(record), upright_size(record["image"]["bytes"])
    first = json.loads(record["extra"])["questions"][0]
    return [told(first, nearness_at(places, depth, size)) for depth in maps]


def choose_map(record: dict, answers: list[str | None], rank: int) -> int | None:
    """Which answer names the point whose turn it is, counted from the lowest in the picture; another point where none
    does, None where none tells."""
    places = marked_points(record)
    from_below = sorted(places, key=lambda letter: -places[letter][1])
    for turn in range(len(from_below)):
        wanted = f"({from_below[(rank + turn) % len(from_below)]})"
        if wanted in answers:
            return answers.index(wanted)
    return None


def _codes(record: dict, vqvae: DepthVQVAE, codebook: str) -> list[int] | None:
    if record["depth_codes"] is not None and record["depth_codebook"] == codebook:
        return list(record["depth_codes"])
    try:
        return None if record["depth"] is None else encode_codes(decode_depth(record["depth"]["bytes"]), vqvae)
    except DepthError:
        return None


def marked_points(record: dict) -> dict[str, list[int]] | None:
    """Letter → (x, y) in pixels, of a record that asks for the closest of them."""
    asked = json.loads(record["extra"]).get("questions", [])
    return next((question["points"] for question in asked if question.get("kind") == "points"), None)


def give_span(record: dict, codes: list[int], depth: Tensor, codebook: str, one_by_one: bool = False) -> dict | None:
    """The record with these codes, which decode to `depth`, in its span, and the answers that follow from them; None
    where they do not tell which point is the closest.  Other questions that they do not tell are left out.

    one_by_one: how near each point is comes first, when no answer before tells of it.
    """
    places, size = marked_points(record), upright_size(record["image"]["bytes"])
    near = nearness_at(places, depth, size)
    extra = json.loads(record["extra"])
    texts = [message["content"] for message in record["messages"][::2]]
    first, *later = zip(extra["questions"], texts, strict=True)
    if told(first[0], near) is None:
        return None
    letters = Random(record["id"]).sample(sorted(places), len(places)) if one_by_one else []
    singly = [({"kind": "near", "letters": [letter]}, NEAR.format(letter)) for letter in letters]
    unnamed = [({"kind": kind}, text) for kind, text in UNNAMED.items()]
    asked = [*singly, first, *unnamed, *(turn for turn in later if turn not in singly)]
    masks = [mask for mask in record["masks"] if mask["turn"] == 1]
    if one_by_one:
        masks = [{"turn": 1, "offset": OPENING, **encode_mask(discs([places[letters[0]]], size[::-1]))}]
    answered = [(question, text, told(question, near)) for question, text in asked]
    kept = [turn for turn in answered if turn[2] is not None]
    messages = []
    for number, (_, text, answer) in enumerate(kept):
        messages += [user(text), assistant(answer, "none" if number else "seg+depth")]
    extra |= {GIVEN: True, "questions": [question for question, _, _ in kept]}
    return {**record, "id": f"{record['id']}-given", "messages": messages, "masks": masks, "depth": None,
            "depth_codes": codes, "depth_codebook": codebook,
            "extra": json.dumps(extra, ensure_ascii=False, sort_keys=True)}  # fmt: skip


def nearness_at(places: dict[str, list[int]], depth: Tensor, size: tuple[int, int]) -> dict[str, float]:
    """What a map says at each point (x, y) of a picture of that width and height."""
    (width, height), (rows, columns) = size, depth.shape
    return {
        letter: depth[int(y * rows / height), int(x * columns / width)].item() for letter, (x, y) in places.items()
    }


def told(question: dict, near: dict[str, float]) -> str | None:
    """What points this near answer; None where two that it depends on are almost alike."""
    letters = question.get("letters") or list(near)
    if question["kind"] == "near":
        return f"{nearness(near[letters[0]])}."
    ranked = sorted(letters, key=near.get, reverse=True)
    steps = [near[one] - near[other] for one, other in pairwise(ranked)]
    if question["kind"] == "order":
        return ", ".join(f"({letter})" for letter in ranked) + "." if min(steps) >= CLEAR / 2 else None
    chosen = -1 if question["kind"] == "farthest" else 0
    return f"({ranked[chosen]})" if steps[chosen] >= CLEAR else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", type=Path, help="folder of the world's shards")
    parser.add_argument("out", type=Path, help="folder to write, as shards")
    parser.add_argument("--tokenizer", required=True, help="folder of the depth tokenizer")
    parser.add_argument("--split", default="train")
    parser.add_argument(
        "--each", type=int, default=1, metavar="N", help="maps for each picture (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    tally = Tally("counterfactual")
    found = read_counterfactual(
        options.scenes, tally=tally, tokenizer=options.tokenizer, split=options.split, each=options.each
    )
    return write_data_set(found, options.out, options.split, tally)


if __name__ == "__main__":
    sys.exit(main())
