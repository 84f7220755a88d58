"""From records to a batch: everything at its place, nothing cut, and what cannot be used is named or left out."""

import numpy as np
import pytest
import torch
from learning_samples import (
    CODES,
    HEIGHT,
    NAN,
    SIDE,
    SPAN,
    WIDTH,
    box,
    collator_of,
    empty,
    inputs_of,
    load_tiny,
    record,
    slope,
    some_of_each,
    world,
)
from own_samples import jpeg, png
from torch.utils.data import DataLoader
from toy_training import one_thread
from warm import CONTEXT

from perceptio.data.depths import encode_depth
from perceptio.data.masks import decode_mask
from perceptio.data.record import DataError, assistant, user
from perceptio.data.sequence import IGNORED, build_sequence
from perceptio.losses_perceptio import COUNTS
from perceptio.training.collator import PerceptioCollator

__all__ = ["one_thread"]  # a fixture of this module too


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_tiny(tiny_folder())


@pytest.fixture(scope="module")
def collate(tiny):
    return collator_of(*tiny)


def counts(batch) -> dict:
    return dict(zip(COUNTS, batch["targets"]["counts"].tolist(), strict=True))


def alone(collate, **options):
    """The targets of one record."""
    return collate([record(**options)])["targets"]


# Where things are


@pytest.mark.parametrize("records", [world, some_of_each], ids=["world", "by hand"])
def test_positions_point_at_the_right_tokens(collate, tiny, records):
    records, config = list(records()), tiny[0].config
    batch = collate(records)
    ids, labels, targets = batch["input_ids"], batch["labels"], batch["targets"]
    at = targets["seg_positions"]
    assert (ids[at[:, 0], at[:, 1]] == config.seg_token_id).all() and (ids == config.seg_token_id).sum() == len(at)
    spans = targets["depth_positions"]
    assert (ids[spans[:, 0], spans[:, 1]] == config.depth_start_token_id).all()
    assert (ids[spans[:, 0], spans[:, 1] + SPAN + 1] == config.depth_end_token_id).all()
    assert (ids == config.depth_start_token_id).sum() == len(spans) == len(targets["depth_labels"])
    first, count = config.depth_code_token_ids
    for row, start in spans.tolist():
        span = ids[row, start + 1 : start + 1 + SPAN]
        assert ((span >= first) & (span < first + count)).all()
        assert (labels[row, start - 1 : start + SPAN + 2] != IGNORED)[1:].all()
    assert batch["sample_ids"] == [record["id"] for record in records] and batch["skipped"] == []


def test_masks_are_flat_and_each_knows_its_picture(collate):
    """Records with 0, 1 and several masks: the numbers count the pictures that have masks, not the rows."""
    masks = [box(bottom=24), box(top=24), box(right=32), box(left=32)]
    records = [record("words", picture=False), record("one", masks[:1]), record("none"), record("three", masks[1:])]
    targets = collate(records)["targets"]
    assert targets["seg_positions"][:, 0].tolist() == [1, 3, 3, 3]
    assert targets["mask_images"].tolist() == [0, 1, 1, 1] and targets["sam_pixel_values"].shape == (2, 3, 64, 64)
    halves = torch.zeros(4, SIDE, SIDE, dtype=torch.bool)
    halves[0, :8], halves[1, 8:], halves[2, :, :8], halves[3, :, 8:] = True, True, True, True
    assert torch.equal(targets["mask_labels"], halves)
    columns = targets["seg_positions"][1:, 1].tolist()
    assert columns == sorted(columns)


def test_a_picture_of_sam_belongs_to_its_masks(collate):
    first, second = record("first", [box()]), record("second", [box()])
    pixels = collate([first, record("between"), second])["targets"]["sam_pixel_values"]
    assert torch.equal(pixels[0], collate([first])["targets"]["sam_pixel_values"][0])
    assert torch.equal(pixels[1], collate([second])["targets"]["sam_pixel_values"][0])
    assert not torch.equal(pixels[0], pixels[1])


def test_a_batch_is_its_records_padded_on_the_right(collate, tiny):
    records = [*some_of_each(), *world()]
    batch, pad = collate(records), tiny[1].tokenizer.pad_token_id
    tiles = []
    for row, one in enumerate(records):
        single = collate([one])
        length = single["input_ids"].shape[1]
        for name, fill in (("input_ids", pad), ("labels", IGNORED), ("attention_mask", 0)):
            assert torch.equal(batch[name][row, :length], single[name][0])
            assert (batch[name][row, length:] == fill).all()
        assert single["attention_mask"].all()
        tiles += [single["pixel_values"]] if "pixel_values" in single else []
    assert torch.equal(batch["pixel_values"], torch.cat(tiles))
    total = sum(torch.tensor(list(counts(collate([one])).values())) for one in records)
    assert batch["targets"]["counts"].tolist() == total.tolist()


def test_the_counts_by_hand(collate):
    batch = collate(some_of_each())
    found = counts(batch)
    # The absent thing is a mask that shows nothing; every record has one answer.
    assert {name: found[name] for name in ("masks", "objects", "spans", "answers")} == {
        "masks": 3,
        "objects": 4,
        "spans": 3,
        "answers": 7,
    }
    assert found["tokens"] == (batch["labels"] != IGNORED).sum()


def test_points_are_drawn_by_record_and_mask(collate):
    two = [box(), box(bottom=9)]
    seeds = alone(collate, name="a", masks=two)["mask_seeds"].tolist()
    again = collate([record("z", [box()]), record("a", two)])["targets"]["mask_seeds"].tolist()
    assert again[1:] == seeds and len({*again, *(seed + 1 for seed in again)}) == 6
    assert alone(collate, masks=two)["mask_points"] == 12544


# Masks at the resolution of mask logits: 4 × 3 pixels a cell


def test_a_mask_of_one_pixel_survives(collate):
    targets = alone(collate, masks=[box(13, 21, 14, 22)])
    assert targets["mask_labels"].nonzero().tolist() == [[0, 4, 5]] and targets["mask_present"].tolist() == [True]


def test_a_thin_line_keeps_every_cell_that_it_touches(collate):
    targets = alone(collate, masks=[box(left=7, right=8)])
    assert targets["mask_labels"].sum() == SIDE and targets["mask_labels"][0, :, 1].all()


@pytest.mark.parametrize(("right", "cells"), [(10, 3), (9, 2)], ids=["half of a cell", "a quarter"])
def test_a_cell_is_in_where_half_of_it_is(collate, right, cells):
    labels = alone(collate, masks=[box(right=right)])["mask_labels"][0]
    assert labels[:, :cells].all() and not labels[:, cells:].any()


def test_an_empty_mask_says_that_nothing_is_there(collate):
    targets = alone(collate, masks=[empty(), box()])
    assert targets["mask_present"].tolist() == [False, True]
    assert not targets["mask_labels"][0].any() and targets["mask_labels"][1].all()


def test_a_mask_of_a_picture_smaller_than_its_logits(collate):
    """A pixel is 16/6 × 16/8 cells: two of each way are rows 5 1/3 to 10 2/3 and columns 6 to 10."""
    labels = alone(collate, image=jpeg(8, 6), masks=[box(2, 3, 4, 5, height=6, width=8)])["mask_labels"][0]
    expected = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    expected[5:11, 6:10] = True
    assert torch.equal(labels, expected)


def test_low_masks_of_rendered_scenes_are_their_masks(collate):
    """Within the cells of the outline."""
    for one in world():
        targets = collate([one])["targets"]
        for mask, low, there in zip(one["masks"], targets["mask_labels"], targets["mask_present"], strict=True):
            full = decode_mask(mask)
            assert there == full.any()
            if full.mean() > 0.02:
                assert low.float().mean().item() == pytest.approx(full.mean(), rel=0.35)


@pytest.mark.parametrize(
    "mask", [box(height=WIDTH, width=HEIGHT), box(height=24, width=32)], ids=["other orientation", "other size"]
)
def test_a_mask_of_another_picture_is_refused(collate, mask):
    """It would be squeezed into shape without a word."""
    with pytest.raises(DataError, match=r"record 'a' cannot be used.*expected the picture's 64 × 48"):
        collate([record(masks=[mask])])


def test_a_mask_is_one_of_the_picture_as_it_is_shown(collate):
    turned = record(masks=[box(height=WIDTH, width=HEIGHT, bottom=32, right=HEIGHT)])
    turned["image"]["bytes"] = jpeg(WIDTH, HEIGHT, orientation=6)
    labels = collate([turned])["targets"]["mask_labels"][0]
    assert labels[:8].all() and not labels[8:].any()


# Depth


def test_codes_are_made_from_depth_by_the_models_own_tokenizer(collate, tiny):
    vqvae, (first, _) = tiny[0].depth_model, tiny[0].config.depth_code_token_ids
    depth = np.float32(np.random.default_rng(0).random((HEIGHT, WIDTH)))
    batch = collate([record(depth=depth)])
    stored = torch.from_numpy(np.rint(depth * 65534) / 65534).float()
    expected = vqvae.encode(stored[None]).flatten()
    row, start = batch["targets"]["depth_positions"][0].tolist()
    assert torch.equal(batch["input_ids"][row, start + 1 : start + 1 + SPAN] - first, expected)
    torch.testing.assert_close(batch["targets"]["depth_labels"], vqvae.resize(stored[None]))


def test_codes_of_the_record_come_before_those_of_its_depth(collate, tiny):
    first, _ = tiny[0].config.depth_code_token_ids
    batch = collate([record(depth=slope(), codes=list(range(8, -1, -1))[1:] + [0], depth_codebook=None)])
    row, start = batch["targets"]["depth_positions"][0].tolist()
    found = batch["input_ids"][row, start + 1 : start + 1 + SPAN] - first
    assert found.tolist() == [7, 6, 5, 4, 3, 2, 1, 0, 0]
    torch.testing.assert_close(batch["targets"]["depth_labels"][0, 0], torch.linspace(0, 1, 24), rtol=0, atol=0.02)


def test_depth_of_codes_alone_is_their_decoding(collate, tiny):
    codes = [0, 1, 2, 3, 4, 5, 6, 7, 0]
    found = alone(collate, codes=codes)["depth_labels"]
    torch.testing.assert_close(found, tiny[0].depth_model.decode_ids(torch.tensor([codes])))


def test_a_later_span_has_the_same_depth(collate):
    messages = [user("How far?"), assistant("Far.", "depth"), user("Again?"), assistant("Far.", "depth")]
    targets = alone(collate, depth=slope(), messages=messages)
    assert len(targets["depth_positions"]) == 2 and torch.equal(*targets["depth_labels"])


def test_holes_are_filled_for_the_codes_and_not_learned(collate, tiny):
    """A hole of 6 × 8 pixels is 3 × 3 of the 24 × 24 that are compared; of one pixel most of the cell has a value."""
    depth = slope()
    depth[8:14, 16:24] = NAN
    depth[30, 40] = NAN
    batch = collate([record(depth=depth)])
    labels = batch["targets"]["depth_labels"][0]
    expected = torch.zeros(24, 24, dtype=torch.bool)
    expected[4:7, 6:9] = True
    assert torch.equal(labels.isnan(), expected)
    whole = collate([record(depth=slope())])["targets"]["depth_labels"][0]
    torch.testing.assert_close(labels[~expected], whole[~expected], rtol=0, atol=0.03)


def test_constant_depth_is_learned_as_it_is(collate):
    targets = alone(collate, depth=np.full((HEIGHT, WIDTH), 0.5, np.float32))
    torch.testing.assert_close(targets["depth_labels"], torch.full((1, 24, 24), 0.5), rtol=0, atol=1e-4)


def test_no_depth_is_made_where_no_answer_asks_for_it(collate):
    targets = alone(collate, depth=slope(), messages=[user("Hi"), assistant("Hello")])
    assert targets["depth_positions"].shape == (0, 2) and targets["depth_labels"].shape == (0, 24, 24)


# What cannot be used

GOOD = {"masks": [box()], "depth": slope()}
HALF_EMPTY = slope()
HALF_EMPTY[:, : WIDTH // 2 + 1] = NAN
POINTS = [user("Where?"), assistant("Here.", "seg")]
ASKS = [user("How far?"), assistant("Far.", "depth")]
FAULTS = {
    "no picture in the bytes": ({"image": b"<html>not found</html>"}, "no picture that can be read"),
    "cut picture": ({"image": jpeg(WIDTH, HEIGHT)[:300]}, "picture"),
    "no bytes": ({"image": {"bytes": None, "path": "a.jpg"}}, "picture"),
    "more than half of the depth missing": ({"depth": encode_depth(HALF_EMPTY)}, "52% of the map has no value"),
    "depth in eight bits": ({"depth": png(np.ones((HEIGHT, WIDTH), np.uint8))}, "expected a 16-bit picture"),
    "a photo for depth": ({"depth": jpeg(WIDTH, HEIGHT)}, "no depth map that can be read"),
    "depth without bytes": ({"depth": {"bytes": None, "path": "a.png"}}, "depth"),
    "masks without a picture": ({"image": None}, "has masks and no picture"),
    "depth is asked for": ({"depth": None, "masks": [], "messages": ASKS}, "neither depth nor codes"),
    "codes of another codebook": (
        {"depth_codes": [1] * SPAN, "depth_codebook": "feedfacefeedface"},
        "belong to the codebook feedfacefeedface, expected the model's",
    ),
    "codes beyond the codebook": ({"depth_codes": [0] * 8 + [CODES]}, "range from 0 to 8, expected 0 to 7"),
    "negative codes": ({"depth_codes": [-1] + [0] * 8}, "range from -1 to 0"),
    "codes of another grid": ({"depth_codes": [0] * 16}, "has 16 depth codes, the model writes 9"),
    "run lengths of nonsense": ({"masks": [{**box(), "counts": "\x01"}]}, "run lengths"),
    "run lengths that overrun": ({"masks": [{**box(), "counts": box(height=400)["counts"]}]}, "run lengths cover"),
    "more masks than places": ({"masks": [box(), {**box(), "turn": 3}]}, "2 masks and its answers 1"),
    "a place without a mask": ({"masks": [], "messages": POINTS}, "0 masks and its answers 1"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_used_is_named(collate, fault):
    changes, complaint = FAULTS[fault]
    with pytest.raises(DataError, match=rf"record 'bad' cannot be used: .*{complaint}"):
        collate([record("good", **GOOD), record("bad", **{**GOOD, **changes})])


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_used_is_left_out_and_listed(tiny, fault):
    changes, complaint = FAULTS[fault]
    good, bad = record("good", **GOOD), record("bad", **{**GOOD, **changes})
    batch = collator_of(*tiny, on_error="skip")([bad, good])
    assert batch["sample_ids"] == ["good"]
    assert [entry["id"] for entry in batch["skipped"]] == ["bad"] and complaint in batch["skipped"][0]["reason"]
    expected = collator_of(*tiny)([good])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["targets"]["counts"], expected["targets"]["counts"])


def test_a_batch_of_nothing_goes_through_and_changes_nothing(tiny):
    bad = record("bad", masks=[box()], image=b"nothing")
    model, batch = tiny[0], collator_of(*tiny, on_error="skip")([bad, bad])
    assert batch["sample_ids"] == [] and len(batch["skipped"]) == 2 and set(counts(batch).values()) == {0}
    model.requires_grad_(True)
    try:
        output = model(**inputs_of(batch))
        output.loss.backward()
        assert output.loss.item() == 0 and not any(part.item() for part in output.losses.values())
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        assert model.lm_head.weight.grad is not None
    finally:
        model.zero_grad()
        model.requires_grad_(False)


def test_a_long_sequence_is_refused_and_never_cut(tiny):
    one = record(**GOOD)
    length = collator_of(*tiny)([one])["input_ids"].shape[1]
    assert collator_of(*tiny, max_length=length)([one])["input_ids"].shape[1] == length
    complaint = rf"{length} tokens long, but `max_length` is {length - 1}.*raise `max_length` to {length}, or lower"
    with pytest.raises(DataError, match=complaint):
        collator_of(*tiny, max_length=length - 1)([one])


def test_fewer_tiles_are_fewer_tokens(tiny):
    one = record(image=jpeg(300, 100))
    many, few = (collator_of(*tiny, max_tiles=tiles)([one]) for tiles in (6, 1))
    assert len(few["pixel_values"]) == 1 < len(many["pixel_values"])
    tokens = tiny[1].image_seq_length
    shorter = many["input_ids"].shape[1] - few["input_ids"].shape[1]
    assert shorter == tokens * (len(many["pixel_values"]) - 1)


def test_another_way_to_meet_errors_is_an_error(tiny):
    with pytest.raises(ValueError, match='`on_error` is "?\'ignore\'.*expected "stop" or "skip"'):
        collator_of(*tiny, on_error="ignore")


def test_depth_without_a_tokenizer_is_refused(tiny):
    collate = PerceptioCollator(tiny[1], tiny[0].config)
    with pytest.raises(DataError, match="built without `depth_model`"):
        collate([record(depth=slope())])
    assert len(collate([record(depth=slope(), codes=[0] * SPAN)])["targets"]["depth_labels"]) == 1


# Control tokens that a person typed


TYPED = "[SEG]<d_start><d_3><d_end><|im_end|><IMG_CONTEXT><|im_start|>assistant\n<d_3>"


@pytest.mark.parametrize("where", ["question", "answer"])
def test_typed_control_tokens_are_text(collate, tiny, where):
    model, processor = tiny
    question, answer = (TYPED, "Here it is.") if where == "question" else ("Where is it?", TYPED)
    messages = [user(question), assistant(answer, "seg+depth")]
    batch = collate([record(masks=[box()], codes=[3] * SPAN, messages=messages)])
    ids, config = batch["input_ids"][0], model.config
    clean = collate([record(masks=[box()], codes=[3] * SPAN, messages=[user("a"), assistant("b", "seg+depth")])])
    first, count = config.depth_code_token_ids
    control = [
        config.seg_token_id,
        config.depth_start_token_id,
        config.depth_end_token_id,
        *range(first, first + count),
    ]
    control += processor.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>"])
    for token in control:
        assert (ids == token).sum() == (clean["input_ids"] == token).sum()
    assert len(batch["targets"]["seg_positions"]) == len(batch["targets"]["depth_positions"]) == 1
    learned = processor.tokenizer.decode(ids[batch["labels"][0] != IGNORED])
    assert ("<d_start><d_3><d_end>" in learned) == (where == "answer")


def test_what_is_learned_is_what_the_sequence_says(collate, tiny):
    """The collator adds nothing to `build_sequence`, and shifts nothing."""
    one = record(masks=[box()], codes=[3] * SPAN)
    sequence, batch = build_sequence(one, tiny[1]), collate([one])
    assert batch["input_ids"][0].tolist() == sequence.input_ids and batch["labels"][0].tolist() == sequence.labels


# Workers


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("context", ["fork", CONTEXT], ids=["fork", "forkserver"])
def test_workers_make_the_same_batches(tiny, context):
    records = [*some_of_each(), record("bad", image=b"nothing", masks=[box()])]
    collate = collator_of(*tiny, on_error="skip")
    loader = DataLoader(records, 3, num_workers=2, collate_fn=collate, multiprocessing_context=context)
    batches = list(loader)
    assert [batch["sample_ids"] for batch in batches] == [
        ["both", "words", "mask"], ["absent", "depth", "codes"], ["picture"],
    ]  # fmt: skip
    assert batches[2]["skipped"][0]["id"] == "bad"
    for start, batch in zip((0, 3, 6), batches, strict=True):
        expected = collate(records[start : start + 3])
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        for name, value in expected["targets"].items():
            found = batch["targets"][name]
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
