"""Closest-point questions whose depth span is given, and is another picture's: the answer is right for that map.

    python -m perceptio.data.sources.counterfactual build/scenes build/given --tokenizer checkpoints/depth-tiny
    python -m perceptio.data.sources.counterfactual build/scenes build/given-things --about things --tokenizer …

A model that reads the answer off the picture is wrong on these, one that reads its own depth span is right.  Maps are
chosen so that neither the lowest point nor any other is the nearest more often than the rest: else a guess would do.
Which is the farthest and how all of them follow is asked as well: like the first question these name no point, and
one answer to a span teaches little.  With every second map of a picture it is asked first how near each point is,
before any answer tells of it.  Nothing of the span itself is learned.  The same is done with the questions which of
some things is closer; with the second map another of them comes first.
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
from ..record import GIVEN, OPENING, as_sentence, assistant, upright_size, user
from ..shards import read_shards
from ..tally import Tally

CLEAR = 0.08  # of relative inverse depth between the point that is asked for and the next; half of it in an order
DECODED = 64  # spans at a time
MAPS = 64  # of the records before, to choose from
UNNAMED = {"farthest": FARTHEST, "order": ORDER}  # kind → question about all points, asked after the first


def read_counterfactual(
    root, *, tally: Tally, tokenizer: str, split: str = "train", each: int = 1, about: str = "points"
) -> Iterator[dict]:
    """The records of a folder of the world's shards that ask what is closer, each with the map of one before it.

    tokenizer: folder of the depth tokenizer, or of a Perceptio, that makes the codes where a record has none of its.
    each: how often a record comes, every time with another map.
    about: "points" that are marked, or "things".
    """
    if not isinstance(each, int) or each < 1:
        raise ValueError(f"`each` is {each!r}, expected at least 1")
    if about not in ABOUT:
        raise ValueError(f"`about` is {about!r}, expected one of {', '.join(ABOUT)}")
    vqvae = load_vqvae(tokenizer)
    codebook = vqvae.codebook_hash()
    asked = filter(ABOUT[about], read_shards(root, split))  # others may be of the very same picture
    maps: deque[tuple[list[int], Tensor]] = deque(maxlen=MAPS)
    number = 0
    while records := list(islice(asked, DECODED)):
        own = [_codes(record, vqvae, codebook) for record in records]
        decoded = iter(vqvae.decode_ids(torch.tensor([codes for codes in own if codes])) if any(own) else ())
        for record, codes in zip(records, own, strict=True):
            others = [(other, depth) for other, depth in maps if other != codes]
            number += 1
            for time in range(each):
                answers = first_answers(record, [depth for _, depth in others], time)
                chosen = choose_map(record, answers, number + time, time)  # so that each order has every turn
                if chosen is None:
                    tally.drop("nothing is plainly the nearest", record["id"])
                    continue
                changed = give_span(record, *others.pop(chosen), codebook, time)  # the next time another map
                tally.keep()
                yield changed if not time else {**changed, "id": f"{changed['id']}-{time + 1}"}
            if codes:
                maps.appendleft((codes, next(decoded)))


def _codes(record: dict, vqvae: DepthVQVAE, codebook: str) -> list[int] | None:
    if record["depth_codes"] is not None and record["depth_codebook"] == codebook:
        return list(record["depth_codes"])
    try:
        return None if record["depth"] is None else encode_codes(decode_depth(record["depth"]["bytes"]), vqvae)
    except DepthError:
        return None


def marked_points(record: dict) -> dict[str, list[int]] | None:
    """Letter → (x, y) in pixels, of a record that asks for the closest of them."""
    return next((question["points"] for question in _asked(record) if question.get("kind") == "points"), None)


def compared_things(record: dict) -> bool:
    """Whether a record asks which of some things is closer."""
    return any("places" in question for question in _asked(record))


def _asked(record: dict) -> list[dict]:
    return json.loads(record["extra"]).get("questions", [])


ABOUT = {"points": marked_points, "things": compared_things}


def turns(record: dict, time: int = 0) -> list[tuple[dict, str, dict | None]]:
    """(question, text, mask) of each that a map answers, in the order of that time."""
    texts = [message["content"] for message in record["messages"][::2]]
    masks = {mask["turn"]: {**mask, "turn": 1} for mask in record["masks"]}
    asked = [
        (question, text, masks.get(2 * number + 1))
        for number, (question, text) in enumerate(zip(_asked(record), texts, strict=True))
    ]
    if marked_points(record):
        first, *later = asked
        singly = _one_by_one(record) if time % 2 else []
        texts = [text for _, text, _ in singly]
        unnamed = [({"kind": kind}, text, None) for kind, text in UNNAMED.items()]
        return [*singly, first, *unnamed, *((*turn[:2], None) for turn in later if turn[1] not in texts)]
    compared = [turn for turn in asked if "places" in turn[0]]
    start = time % len(compared)
    return compared[start:] + compared[:start]


def _one_by_one(record: dict) -> list[tuple[dict, str, dict]]:
    """How near each point is, in an order of its own, with the mask of that point."""
    places, size = marked_points(record), upright_size(record["image"]["bytes"])
    letters = Random(record["id"]).sample(sorted(places), len(places))
    masks = [encode_mask(discs([places[letter]], size[::-1])) for letter in letters]
    return [
        ({"kind": "near", "letters": [letter]}, NEAR.format(letter), {"turn": 1, "offset": OPENING, **mask})
        for letter, mask in zip(letters, masks, strict=True)
    ]


def first_answers(record: dict, maps: list[Tensor], time: int = 0) -> list[str | None]:
    """What each map answers to the question for the closest; None where it does not tell."""
    question, size = deciding(record, time), upright_size(record["image"]["bytes"])
    places = candidates(question)
    return [told(question, nearness_at(places, depth, size)) for depth in maps]


def choose_map(record: dict, answers: list[str | None], rank: int, time: int = 0) -> int | None:
    """Which answer names what has its turn to be the nearest, counted from the lowest in the picture; another one
    where none does, None where none tells."""
    places = candidates(deciding(record, time))
    from_below = sorted(places, key=lambda answer: -places[answer][1])
    for turn in range(len(from_below)):
        wanted = from_below[(rank + turn) % len(from_below)]
        if wanted in answers:
            return answers.index(wanted)
    return None


def deciding(record: dict, time: int = 0) -> dict:
    """The first question of that time that names what is the nearest: a map is chosen by its answer."""
    naming = [question for question in _asked(record) if candidates(question)]
    return naming[time % len(naming)]


def candidates(question: dict) -> dict[str, list[int]]:
    """Answer → place of what it names (x, y) in pixels; none of a question that names nothing."""
    if question["kind"] == "points":
        return {f"({letter})": place for letter, place in question["points"].items()}
    named = zip(question.get("names", ()), question.get("places", ()), strict=True)
    return {as_sentence(name): place for name, place in named}


def give_span(record: dict, codes: list[int], depth: Tensor, codebook: str, time: int = 0) -> dict | None:
    """The record with these codes, which decode to `depth`, in its span, and the answers that follow from them; None
    where they do not tell what is the closest.  Other questions that they do not tell are left out.

    time: at every second, how near each point is comes first, when no answer before tells of it.
    """
    size, first = upright_size(record["image"]["bytes"]), deciding(record, time)
    answered = [
        (question, text, told(question, nearness_at(candidates(question) or candidates(first), depth, size)), mask)
        for question, text, mask in turns(record, time)
    ]
    if next(answer for question, _, answer, _ in answered if question == first) is None:
        return None
    kept = [turn for turn in answered if turn[2] is not None]
    messages = []
    for number, (_, text, answer, _) in enumerate(kept):
        messages += [user(text), assistant(answer, "none" if number else "seg+depth")]
    extra = json.loads(record["extra"]) | {GIVEN: True, "questions": [question for question, *_ in kept]}
    mask = kept[0][3]
    return {**record, "id": f"{record['id']}-given", "messages": messages, "masks": [] if mask is None else [mask],
            "depth": None, "depth_codes": codes, "depth_codebook": codebook,
            "extra": json.dumps(extra, ensure_ascii=False, sort_keys=True)}  # fmt: skip


def nearness_at(places: dict[str, list[int]], depth: Tensor, size: tuple[int, int]) -> dict[str, float]:
    """What a map says at each point (x, y) of a picture of that width and height."""
    (width, height), (rows, columns) = size, depth.shape
    return {
        letter: depth[int(y * rows / height), int(x * columns / width)].item() for letter, (x, y) in places.items()
    }


def told(question: dict, near: dict[str, float]) -> str | None:
    """What points or things this near answer, each by the answer that names it; None where two that it depends on are
    almost alike."""
    named = [f"({letter})" for letter in question.get("letters", ())] or list(near)
    if question["kind"] == "near":
        return f"{nearness(near[named[0]])}."
    ranked = sorted(named, key=near.get, reverse=True)
    steps = [near[one] - near[other] for one, other in pairwise(ranked)]
    if question["kind"] == "order":
        return ", ".join(ranked) + "." if min(steps) >= CLEAR / 2 else None
    chosen = -1 if question["kind"] == "farthest" else 0
    return ranked[chosen] if steps[chosen] >= CLEAR else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", type=Path, help="folder of the world's shards")
    parser.add_argument("out", type=Path, help="folder to write, as shards")
    parser.add_argument("--tokenizer", required=True, help="folder of the depth tokenizer")
    parser.add_argument("--split", default="train")
    parser.add_argument(
        "--each", type=int, default=1, metavar="N", help="maps for each picture (default: %(default)s)"
    )
    parser.add_argument("--about", choices=ABOUT, default="points", help="default: %(default)s")
    options = parser.parse_args(arguments)
    tally = Tally("counterfactual")
    found = read_counterfactual(
        options.scenes, tally=tally, tokenizer=options.tokenizer, split=options.split, each=options.each,
        about=options.about,
    )  # fmt: skip
    return write_data_set(found, options.out, options.split, tally)


if __name__ == "__main__":
    sys.exit(main())
