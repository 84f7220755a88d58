"""The joint set: of one picture the mask of a thing, the depth of the whole scene, and a sentence about the thing.

One record per picture, with up to five expressions as turns.  The first answer opens with mask and depth, the others
with their masks: the depth is that of the picture, and once is enough.  The answer is one sentence from a captioner,
or, where the thing is not in the picture, one that says so.  `data.joint_run` writes it as shards.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image

from ..processing_perceptio import PictureError, load_picture
from .captions import CaptionRequest, Refusal
from .depths import decode_depth, encode_depth
from .record import assistant, make_record, user
from .sources.referring import ReferringItem, Thing
from .tally import Tally
from .templates import (
    DESCRIPTION_QUESTIONS,
    NO_TARGET_ANSWERS,
    REFERRING_ANSWERS,
    REFERRING_QUESTIONS,
    choose,
    fill,
    number,
)
from .validate import check_record

EXPRESSIONS = 5  # of one picture, as turns of one record
MORE = ("choose", "split")
DEPTH_TURNS = ("first", "all", "none")
ITEMS_AT_A_TIME = 8  # whose captions are asked for together

Labeller = Callable[[Image.Image], tuple[bytes, list[int], str]]


@dataclass(frozen=True)
class Turn:
    thing: Thing
    phrase: str


def build_joint(
    items: Iterable[ReferringItem],
    captioner=None,
    labeller: Labeller | None = None,
    *,
    tally: Tally | None = None,
    expressions: int = EXPRESSIONS,
    more: str = "choose",
    depth_turns: str | None = None,
    seed: int = 0,
) -> Iterator[dict]:
    """Records of the items; the tally counts their expressions (turns).

    captioner: see `data.captions`. None: answers say no more than the phrase does.
    labeller: an upright picture → (16-bit PNG, depth codes, hash of the codebook), of the whole picture.
    more: what becomes of expressions past `expressions`: "choose" takes so many by the seed, of as many things as
        possible, and counts the others as dropped; "split" puts them into further records of the same picture.
    depth_turns: which answers open with depth: "first", "all" or "none". By default the first, and none without a
        labeller. Without one, "first" and "all" give records that are to be labelled before they can be used.
    """
    if more not in MORE or expressions < 1:
        raise ValueError(f"`more` is {more!r} and `expressions` {expressions}, expected one of {MORE} and at least 1")
    depth_turns = depth_turns or ("first" if labeller else "none")
    if depth_turns not in DEPTH_TURNS:
        raise ValueError(f"`depth_turns` is {depth_turns!r}, expected one of {', '.join(DEPTH_TURNS)}")
    tally = Tally("joint") if tally is None else tally
    write = _Writer(captioner, labeller, depth_turns, seed, tally)
    rest = iter(items)
    while group := list(islice(rest, ITEMS_AT_A_TIME)):
        plans = []
        for item in group:
            samples, left = plan_turns(item, expressions, more, seed)
            if left:
                tally.drop("beyond the turns of its picture", item.id, left)
            plans.append((item, samples))
        yield from write(plans)


def plan_turns(item: ReferringItem, expressions: int, more: str, seed: int) -> tuple[list[list[Turn]], int]:
    """(the turns of each record, how many expressions are left over).

    The things take turns, each with its phrases in an order of the seed: five expressions are of five things if there
    are so many.
    """
    queues = []
    for thing in item.things:
        phrases = sorted(thing.phrases, key=lambda phrase: number(seed, item.id, thing.key, phrase))
        queues.append([Turn(thing, phrase) for phrase in phrases])
    queues.sort(key=lambda queue: number(seed, item.id, queue[0].thing.key))
    longest = max(map(len, queues), default=0)
    turns = [queue[rank] for rank in range(longest) for queue in queues if rank < len(queue)]
    samples = [turns[start : start + expressions] for start in range(0, len(turns), expressions)]
    samples = samples[:1] if more == "choose" else samples
    return samples, len(turns) - sum(map(len, samples))


class _Writer:
    """Planned turns → records."""

    def __init__(self, captioner, labeller: Labeller | None, depth_turns: str, seed: int, tally: Tally):
        self.captioner, self.labeller, self.depth_turns = captioner, labeller, depth_turns
        self.seed, self.tally = seed, tally

    def __call__(self, plans: list[tuple[ReferringItem, list[list[Turn]]]]) -> Iterator[dict]:
        pictures = [self._open(item, samples) for item, samples in plans]
        plans = [plan for plan, picture in zip(plans, pictures, strict=True) if picture is not None]
        pictures = [picture for picture in pictures if picture is not None]
        captions = self._captions(plans, pictures)
        for (item, samples), picture in zip(plans, pictures, strict=True):
            described = [[(turn, captions[id(turn)]) for turn in sample] for sample in samples]
            kept = [self._usable(item, sample) for sample in described]
            depth = self._depth(item, picture, sum(map(len, kept)))
            if depth is None:
                continue
            for index, sample in enumerate(kept):
                key = item.id if len(samples) == 1 else f"{item.id}/{index}"
                if sample and (record := self._record(item, key, sample, depth)):
                    yield record

    def _open(self, item: ReferringItem, samples: list[list[Turn]]):
        """The picture, () when nobody looks at it, None when it cannot be read."""
        if self.captioner is None and self.labeller is None:
            return ()
        try:
            return load_picture(item.image["bytes"])
        except PictureError as error:
            self.tally.drop("picture damaged", f"{item.id}: {error}", sum(map(len, samples)))
            return None

    def _captions(self, plans: list, pictures: list) -> dict[int, str | Refusal | None]:
        """The sentence of each turn, by its `id`; None where none is asked for."""
        turns = [turn for _, samples in plans for sample in samples for turn in sample]
        captions: dict[int, str | Refusal | None] = dict.fromkeys(map(id, turns))
        if self.captioner is None:
            return captions
        asked, requests = [], []
        for (item, samples), picture in zip(plans, pictures, strict=True):
            digest = hashlib.sha256(item.image["bytes"]).hexdigest()
            present = [turn for sample in samples for turn in sample if not turn.thing.absent]
            asked += present
            requests += [CaptionRequest(picture, turn.phrase, turn.thing.mask, digest) for turn in present]
        answers = self.captioner(requests) if requests else []
        captions.update({id(turn): answer for turn, answer in zip(asked, answers, strict=True)})
        return captions

    def _usable(self, item: ReferringItem, sample: list) -> list:
        kept = []
        for turn, caption in sample:
            if isinstance(caption, Refusal):
                self.tally.drop(caption.reason, f"{item.id}: {turn.phrase:.60}: {caption.detail:.120}")
            else:
                kept.append((turn, caption))
        return kept

    def _depth(self, item: ReferringItem, picture, count: int) -> dict | None:
        """The depth columns of the records of a picture; None when the labeller fails."""
        if self.labeller is None or not count:
            return {}
        try:
            depth, codes, codebook = self.labeller(picture)
        except (ValueError, RuntimeError) as error:
            self.tally.drop("labeller failed", f"{item.id}: {' '.join(str(error).split())[:200]}", count)
            return None
        return {"depth": depth, "depth_codes": codes, "depth_codebook": codebook}

    def _record(self, item: ReferringItem, key: str, sample: list, depth: dict) -> dict | None:
        messages, masks, facts = [], [], []
        for turn, caption in sample:
            place = len(messages) + 1
            messages.append(user(self._question(key, place, turn)))
            messages.append(assistant(self._answer(key, place, turn, caption), "seg"))
            masks.append({**turn.thing.mask, "turn": place})
            facts.append({"ref": turn.thing.key, "category": turn.thing.category})
        record = make_record(
            id=key,
            image=item.image,
            messages=messages,
            masks=masks,
            source=item.source,
            licence=item.licence,
            split=item.split,
            extra={**item.extra, "turns": facts},
            **depth,
        )
        problems = check_record(record)
        if problems:
            reason = f"{problems[0].field.partition('[')[0]} not usable"
            self.tally.drop(reason, f"{key}: {problems[0]}", len(sample))
            return None
        self.tally.keep(len(sample))
        return self._with_depth_turns(record)

    def _question(self, key: str, place: int, turn: Turn) -> str:
        questions = REFERRING_QUESTIONS if self.captioner is None else REFERRING_QUESTIONS + DESCRIPTION_QUESTIONS
        return fill(choose(questions, self.seed, key, place - 1), turn.phrase)

    def _answer(self, key: str, place: int, turn: Turn, caption: str | None) -> str:
        if caption is not None:
            return caption
        answers = NO_TARGET_ANSWERS if turn.thing.absent else REFERRING_ANSWERS
        return fill(choose(answers, self.seed, key, place), turn.phrase)

    def _with_depth_turns(self, record: dict) -> dict:
        count = {"first": 1, "all": len(record["messages"]), "none": 0}[self.depth_turns]
        answers = [message for message in record["messages"] if message["role"] == "assistant"]
        for message in answers[:count]:
            message["perception"] = "seg+depth"
        return record


def labeller_from(teacher: Callable, vqvae) -> Labeller:
    """A labeller of a depth teacher and a depth tokenizer (see `data.label`)."""
    from .label import encode_codes, finish_depth

    codebook = vqvae.codebook_hash()

    def label(picture: Image.Image) -> tuple[bytes, list[int], str]:
        values = finish_depth(np.asarray(teacher([picture])[0]), picture.size, getattr(teacher, "kind", "inverse"))
        stored = encode_depth(values)
        return stored, encode_codes(decode_depth(stored), vqvae), codebook

    return label
