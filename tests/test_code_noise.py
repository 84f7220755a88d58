"""Codes that are read are not always those that are learned."""

import pytest
import torch
import torch.nn.functional as F
from learning_samples import SPAN, collator_of, inputs_of, load_tiny, record, some_of_each

from perceptio.training.noise import with_code_noise


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_tiny(tiny_folder())


@pytest.fixture(scope="module")
def batch(tiny):
    return inputs_of(collator_of(*tiny)(some_of_each()))


def test_codes_of_the_spans_alone_are_replaced_and_by_codes(tiny, batch):
    config, ids, spans = tiny[0].config, batch["input_ids"], batch["targets"]["depth_positions"]
    inside = torch.zeros_like(ids, dtype=torch.bool)
    for row, start in spans.tolist():
        inside[row, start + 1 : start + 1 + SPAN] = True
    first, codes = config.depth_code_token_ids
    torch.manual_seed(0)
    changed = torch.zeros_like(ids)
    for _ in range(200):
        noisy = with_code_noise(ids, spans, config, 0.25)
        assert torch.equal(noisy[~inside], ids[~inside])
        assert ((noisy[inside] >= first) & (noisy[inside] < first + codes)).all()
        changed += noisy != ids
    share = changed[inside].float().mean() / 200 / (1 - 1 / codes)  # a random code can be the right one
    assert share.item() == pytest.approx(0.25, abs=0.03)
    assert with_code_noise(ids, spans, config, 0.0) is ids and with_code_noise(ids, spans[:0], config, 0.5) is ids


def test_a_span_that_answers_are_read_from_is_left_alone(tiny):
    codes = [3, 1, 4, 1, 5, 2, 6, 5, 3]
    read = record("read", codes=codes, extra={"read_span": True})
    targets = inputs_of(collator_of(*tiny)([read, record(codes=codes), read]))["targets"]
    assert targets["depth_positions"][:, 0].tolist() == [0, 1, 2]
    assert targets["noisy_positions"].tolist() == targets["depth_positions"][1:2].tolist()


def test_what_is_learned_is_the_right_codes_after_wrong_ones(tiny, batch):
    model, spans = tiny[0], batch["targets"]["depth_positions"]
    first, codes = model.config.depth_code_token_ids
    torch.manual_seed(1)
    noisy = with_code_noise(batch["input_ids"], spans, model.config, 0.5)
    with torch.no_grad():
        found = model(**{**batch, "input_ids": noisy}).losses["depth_token_loss"]
        plain = {name: value for name, value in batch.items() if name not in ("targets", "labels")}
        logits = model(**{**plain, "input_ids": noisy}).logits
    expected = [
        F.cross_entropy(logits[row, start : start + SPAN, first : first + codes],
                        batch["input_ids"][row, start + 1 : start + 1 + SPAN] - first)
        for row, start in spans.tolist()
    ]  # fmt: skip
    torch.testing.assert_close(found, torch.stack(expected).mean().to(found), rtol=1e-5, atol=1e-6)
    assert not torch.equal(noisy, batch["input_ids"])
