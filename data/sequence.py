"""A record as the model sees it in training: the exact text, its ids, and which of them are learned."""

import json
from dataclasses import dataclass, field

from torch import Tensor

from ..processing_perceptio import (
    DEPTH_END_TOKEN,
    DEPTH_START_TOKEN,
    END_TURN_TOKEN,
    MARK,
    SEG_TOKEN,
    START_TURN_TOKEN,
    depth_code_token,
)
from .record import GIVEN, OPENING, READ, DataError

IGNORED = -100


@dataclass
class TrainingSequence:
    """One record, tokenized.

    text: what the sequence says, its picture tokens as one `<IMG_CONTEXT>`.
    input_ids, labels: list[int] of one length; labels hold -100 where nothing is learned: all but the answers, each
    with its opening, its depth span and the end of its turn.
    seg_positions: columns of the [SEG]s, in the order of the record's masks.
    depth_spans: (column of <d_start>, column of <d_end>) of each span; none where the span is given.
    read_spans: whether its answers are read from them.
    inputs: the rest of what the processor returns (pixel_values, …).
    """

    text: str
    input_ids: list[int]
    labels: list[int]
    seg_positions: list[int]
    depth_spans: list[tuple[int, int]]
    read_spans: bool = False
    inputs: dict[str, Tensor] = field(default_factory=dict, repr=False)


def render(record: dict, processor, codes: list[int] | None = None, answer_first: bool = False) -> str:
    """The record as the text that `processor(text=…, images=…)` takes.

    Control tokens come from the record's masks and depth alone: those that stand in its texts stay text.
    codes: the depth codes, when the record itself carries none.
    answer_first: perception comes behind the answer's words, as it is not meant to; for comparisons.
    """
    codes = record.get("depth_codes") if codes is None else codes
    messages, first, escape = [], True, processor.escaper()
    for turn, message in enumerate(record["messages"]):
        if message["role"] == "assistant":
            content = _answer(record, turn, processor, escape, codes, answer_first)
        else:
            content = escape(message["content"])
            if first and message["role"] == "user" and record["image"] is not None:
                content, first = [{"type": "image"}, {"type": "text", "text": content}], False
        messages.append({"role": message["role"], "content": content})
    return processor.apply_chat_template(messages, tokenize=False, sanitize_control_tokens=False)


def _answer(record: dict, turn: int, processor, escape, codes: list[int] | None, answer_first: bool) -> str:
    message = record["messages"][turn]
    mode, content = message["perception"] or "none", message["content"]
    offsets = [mask["offset"] for mask in record["masks"] if mask["turn"] == turn and mask["offset"] != OPENING]
    if answer_first and offsets:
        raise DataError(f"record {record['id']!r} has a [SEG] within its answer, which cannot come before perception")
    cuts = [0, *offsets, len(content)]
    pieces = [escape(content[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    opening = SEG_TOKEN if "seg" in mode else ""
    if "depth" in mode:
        if codes is None:
            raise DataError(
                f"record {record['id']!r} asks for a depth span and has no depth codes; expected "
                f"{processor.depth_grid_size**2} of them: label the data first"
            )
        if len(codes) != processor.depth_grid_size**2:
            raise DataError(
                f"record {record['id']!r} has {len(codes)} depth codes, the model writes "
                f"{processor.depth_grid_size**2}: label the data with the model's own depth tokenizer"
            )
        opening += DEPTH_START_TOKEN + "".join(map(depth_code_token, codes)) + DEPTH_END_TOKEN
    words = SEG_TOKEN.join(pieces)
    return words + opening if answer_first else opening + words


def build_sequence(
    record: dict, processor, codes: list[int] | None = None, answer_first: bool = False, **kwargs
) -> TrainingSequence:
    """Tokenize one record; kwargs go to the processor."""
    text = render(record, processor, codes, answer_first)
    images = None if record["image"] is None else [record["image"]["bytes"]]
    inputs = dict(processor(images=images, text=[text], return_tensors="pt", **kwargs))
    ids = inputs.pop("input_ids")[0].tolist()
    inputs.pop("attention_mask", None)
    labels, seg_positions, depth_spans = mark_targets(ids, processor)
    if len(seg_positions) != len(record["masks"]):
        raise DataError(
            f"record {record['id']!r} has {len(record['masks'])} masks and its answers {len(seg_positions)} [SEG]s, "
            "expected one mask for each: run `perceptio data check`"
        )
    extra = json.loads(record.get("extra") or "{}")
    if extra.get(GIVEN):
        for opened, closed in depth_spans:
            labels[opened : closed + 1] = [IGNORED] * (closed + 1 - opened)
        depth_spans = []
    read = bool(extra.get(READ))
    return TrainingSequence(text.replace(MARK, ""), ids, labels, seg_positions, depth_spans, read, inputs)


def mark_targets(ids: list[int], processor) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """(labels, columns of [SEG], depth spans) of a rendered record; padding may stand on either side.

    A turn starts at the control token <|im_start|>, which no text can produce, so that counting is safe.
    """
    start, end = processor.tokenizer.convert_tokens_to_ids([START_TURN_TOKEN, END_TURN_TOKEN])
    header = processor.tokenizer.encode(f"{START_TURN_TOKEN}assistant\n", add_special_tokens=False)
    labels = [IGNORED] * len(ids)
    seg_positions, depth_spans = [], []
    position = 0
    while position < len(ids):
        if ids[position] != start or ids[position : position + len(header)] != header:
            position += 1
            continue
        position += len(header)
        stop = ids.index(end, position) + 1
        labels[position:stop] = ids[position:stop]
        seg_positions += [column for column in range(position, stop) if ids[column] == processor.seg_token_id]
        if processor.depth_start_token_id in ids[position:stop]:
            opened = ids.index(processor.depth_start_token_id, position)
            depth_spans.append((opened, ids.index(processor.depth_end_token_id, opened)))
        position = stop
    return labels, seg_positions, depth_spans
