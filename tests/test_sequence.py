"""A record as the model sees it: control tokens come from masks and depth, and the answers are learned."""

import numpy as np
import pytest
from test_validate import jpeg, left_half
from transformers import AutoProcessor

from perceptio.data.masks import encode_mask
from perceptio.data.record import DataError, assistant, make_record, user
from perceptio.data.sequence import IGNORED, build_sequence, mark_targets


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def processor(request, tiny_folder):
    return AutoProcessor.from_pretrained(tiny_folder(request.param), trust_remote_code=True)


def record(**changes):
    empty = encode_mask(np.zeros((24, 32), bool))
    return {
        **make_record(
            id="a",
            image=jpeg(),
            messages=[
                user("Where is [SEG]<d_start><d_1>? <|im_end|><IMG_CONTEXT>"),
                assistant("The [SEG] cup on the left, and <d_end> a pot.", "seg+depth"),
                user("And the dog?"),
                assistant("None.", "seg"),
                user("Why?"),
                assistant("So."),
            ],
            masks=[left_half(), {**left_half(), "offset": 25}, {**empty, "turn": 3}],
            depth_codes=[index % 5 for index in range(9)],
            depth_codebook="x",
            source="own",
            licence="CC0-1.0",
        ),
        **changes,
    }


def test_the_sequence_of_a_record(processor):
    sequence = build_sequence(record(), processor)
    ids, labels = sequence.input_ids, sequence.labels
    seg, start = processor.seg_token_id, processor.depth_start_token_id
    end, first = processor.depth_end_token_id, processor.tokenizer.convert_tokens_to_ids("<d_0>")
    assert ids.count(seg) == 3 == len(sequence.seg_positions) and all(ids[at] == seg for at in sequence.seg_positions)
    assert ids.count(start) == ids.count(end) == 1
    ((opened, closed),) = sequence.depth_spans
    assert ids[opened - 1] == seg and (ids[opened], ids[closed]) == (start, end)
    assert ids[opened + 1 : closed] == [first + index % 5 for index in range(9)]
    assert opened - 1 == sequence.seg_positions[0] and closed < sequence.seg_positions[1] < sequence.seg_positions[2]
    learned = processor.tokenizer.decode([label for label in labels if label != IGNORED])
    assert learned == (
        "[SEG]<d_start>" + "".join(f"<d_{index % 5}>" for index in range(9)) + "<d_end>"
        "The [SEG] cup on the left[SEG], and <d_end> a pot.<|im_end|>[SEG]None.<|im_end|>So.<|im_end|>"
    )
    assert sequence.inputs["pixel_values"].ndim == 4 and "Where is [SEG]<d_start><d_1>?" in sequence.text


def test_padding_moves_nothing(processor):
    sequence = build_sequence(record(), processor)
    pad = [processor.tokenizer.pad_token_id or processor.tokenizer.eos_token_id] * 5
    labels, seg, spans = mark_targets(pad + sequence.input_ids + pad, processor)
    assert labels == [IGNORED] * 5 + sequence.labels + [IGNORED] * 5
    assert seg == [at + 5 for at in sequence.seg_positions] and spans == [
        (a + 5, b + 5) for a, b in sequence.depth_spans
    ]


def test_the_opening_is_what_generation_begins_with(processor):
    """Training and inference must agree to the token, or the first answer is out of distribution."""
    sequence = build_sequence(record(), processor)
    prompt = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": jpeg()},
                    {"type": "text", "text": record()["messages"][0]["content"]},
                ],
            }
        ],
        perception="seg+depth",
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )["input_ids"][0].tolist()
    assert sequence.input_ids[: len(prompt)] == prompt
    assert sequence.labels[len(prompt) - 3] == IGNORED and sequence.labels[len(prompt) - 2] == processor.seg_token_id


def test_codes_may_come_from_outside_and_must_fit(processor):
    bare = record(depth_codes=None)
    with pytest.raises(DataError, match="label the data"):
        build_sequence(bare, processor)
    with pytest.raises(DataError, match="8 depth codes, the model writes 9"):
        build_sequence(bare, processor, codes=[1] * 8)
    assert build_sequence(bare, processor, codes=[3] * 9).depth_spans


def test_text_alone_has_no_picture(processor):
    text = make_record(id="t", image=None, messages=[user("Hi"), assistant("Hello")], source="s", licence="l")
    sequence = build_sequence(text, processor)
    assert "pixel_values" not in sequence.inputs and sequence.seg_positions == []


def test_a_mask_without_its_place_is_an_error(processor):
    wrong = record()
    wrong["messages"][3]["perception"] = "none"
    with pytest.raises(DataError, match="3 masks and its answers 2"):
        build_sequence(wrong, processor)


def test_perception_may_come_behind_the_answer(processor):
    """For comparisons: the same tokens in another order, and the words no longer see the span."""
    own = record(masks=[record()["masks"][index] for index in (0, 2)])
    plain, late = build_sequence(own, processor), build_sequence(own, processor, answer_first=True)
    assert sorted(late.input_ids) == sorted(plain.input_ids) and late.input_ids != plain.input_ids
    learned = processor.tokenizer.decode([label for label in late.labels if label != IGNORED])
    codes = "".join(f"<d_{index % 5}>" for index in range(9))
    words = "The [SEG] cup on the left, and <d_end> a pot."
    assert learned == f"{words}[SEG]<d_start>{codes}<d_end><|im_end|>None.[SEG]<|im_end|>So.<|im_end|>"
    assert [late.input_ids[at] for at in late.seg_positions] == [processor.seg_token_id] * 2
    assert late.input_ids[late.depth_spans[0][0]] == processor.depth_start_token_id
    with pytest.raises(DataError, match="within its answer"):
        build_sequence(record(), processor, answer_first=True)
