"""All losses of a batch: each against plain logits and masks, in float64, and nothing from what is not there."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from learning_samples import (
    NAN,
    SPAN,
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

from perceptio.data.record import assistant, user
from perceptio.data.sequence import IGNORED
from perceptio.losses_perceptio import (
    COUNTED,
    COUNTS,
    DEFAULT_WEIGHTS,
    LIKENESS,
    TERMS,
    depth_count_loss,
    sample_points,
)
from perceptio.training.adapters import thaw

EXACT = {"rtol": 1e-9, "atol": 1e-9}
MASK_TERMS = ("seg_bce_loss", "seg_dice_loss", "seg_object_loss", "seg_iou_loss", "seg_place_loss")
DEPTH_TERMS = ("depth_marker_loss", "depth_token_loss", "depth_count_loss", "depth_recon_loss")


def sharpen(model):
    """Random weights of the library's size give nearly equal logits, and masks that are full or empty."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.model.language_model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(4)
    for part in (model.seg_projector, model.mask_model.mask_decoder):
        for parameter in part.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    """Everything that may be trained is, in float32; the tests in float64 have a copy."""
    model, processor = load_tiny(tiny_folder())
    model = sharpen(copy.deepcopy(model))
    thaw(model)
    return model, processor


@pytest.fixture(scope="module")
def model(tiny):
    """In float64 throughout: the library's norm would compute in float32."""
    model = copy.deepcopy(tiny[0]).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(exact_norm, module)
    return model


def exact_norm(module, x):
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


@pytest.fixture(scope="module")
def collate(tiny):
    collate = collator_of(*tiny, mask_points=100)
    return lambda records: in_double(inputs_of(collate(records)))


def in_double(batch):
    """Pictures and labels with all the numbers that the model computes in."""
    if isinstance(batch, dict):
        return {name: value if name == "counts" else in_double(value) for name, value in batch.items()}
    return batch.double() if isinstance(batch, torch.Tensor) and batch.is_floating_point() else batch


@pytest.fixture(scope="module", params=["by hand", "world"])
def batch(request, collate):
    return collate(world()[:3] if request.param == "world" else some_of_each())


def with_counts(batch, like) -> dict:
    return {**batch, "targets": {**batch["targets"], "counts": like["targets"]["counts"]}}


def gradients(model, batch) -> dict:
    """Of the loss, by the name of each trained parameter; None where it reaches none."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(model(**batch).loss, parameters, allow_unused=True), strict=True))


def gradients_of(model, amounts: dict) -> dict:
    """Of each amount, by its name: zeros where it reaches nothing."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    return {name: torch.autograd.grad(amount, trained, **options) for name, amount in amounts.items()}


# Every term by itself


def plainly(model, batch) -> dict:
    """The sum of each term, from all logits and from SAM2's masks one by one."""
    targets, labels, ids, config = batch["targets"], batch["labels"], batch["input_ids"], model.config
    plain = {name: value for name, value in batch.items() if name not in ("targets", "labels")}
    output = model(**plain)
    log_prob = output.logits.log_softmax(-1)
    costs = -log_prob[:, :-1].gather(2, ids[:, 1:, None])[..., 0]  # [B, L - 1] of the token that comes
    sums = {term: torch.zeros((), dtype=torch.float64) for term in TERMS}
    sums["text_loss"] = costs[labels[:, 1:] != IGNORED].sum()
    first, codes = config.depth_code_token_ids
    perception = {config.seg_token_id, config.depth_start_token_id, config.depth_end_token_id, IGNORED}
    perception |= set(range(first, first + codes))
    words = [[token not in perception for token in row] for row in labels[:, 1:].tolist()]
    sums["answer_loss"] = costs[torch.tensor(words)].sum()
    for (row, start), depth in zip(targets["depth_positions"].tolist(), targets["depth_labels"], strict=True):
        end = start + SPAN + 1
        assert ids[row, start] == config.depth_start_token_id and ids[row, end] == config.depth_end_token_id
        sums["depth_marker_loss"] += costs[row, start - 1] + costs[row, end - 1]
        inside = output.logits[row, start : end - 1, first : first + codes]
        sums["depth_token_loss"] += F.cross_entropy(inside, ids[row, start + 1 : end] - first)
        ends = output.logits[row, start:end, [config.depth_end_token_id]]
        with_end = torch.cat([output.logits[row, start:end, first : first + codes], ends], dim=-1)
        sums["depth_count_loss"] += depth_count_loss(with_end[None])[0]
        latents = (inside.softmax(-1) @ model.depth_model.codebook).T.view(1, -1, 3, 3)
        decoded = model.depth_model.decode(latents)[0]
        there = ~depth.isnan()
        sums["depth_recon_loss"] += (decoded - depth)[there].square().mean()
    for index, (row, column) in enumerate(targets["seg_positions"].tolist()):
        picture = targets["mask_images"][index]
        features = model.encode_pictures(targets["sam_pixel_values"][picture : picture + 1])
        state = output.last_hidden_state[row, column][None]
        chosen = model.decode_masks(state, features, [0])
        prompt = model.seg_projector(state)
        candidates, ious, _ = model._candidates(prompt, features, [0])
        there, gold = targets["mask_present"][index], targets["mask_labels"][index]
        sums["seg_object_loss"] -= torch.log(chosen.object_scores if there else 1 - chosen.object_scores)[0]
        if not there:
            continue
        sums["seg_place_loss"] += unlikeness(model, prompt[0], output.last_hidden_state[row], ids[row], gold)
        seed = targets["mask_seeds"][index : index + 1]
        logits, points = sample_points(chosen.mask_logits, gold[None].double(), seed, targets["mask_points"])
        prob, points = logits[0].sigmoid(), points[0]
        sums["seg_bce_loss"] -= (points * prob.log() + (1 - points) * (1 - prob).log()).mean()
        sums["seg_dice_loss"] += 1 - (2 * (prob * points).sum() + 1) / (prob.sum() + points.sum() + 1)
        found = [((c > 0) & gold).sum().double() / ((c > 0) | gold).sum() for c in candidates[0]]
        sums["seg_iou_loss"] += sum((iou - one) ** 2 for iou, one in zip(ious[0], found, strict=True)) / len(found)
    return sums


def unlikeness(model, prompt, states, ids, mask) -> torch.Tensor:
    """Of a prompt and the picture tokens of its mask, part by part; the last tile shows the whole picture."""
    count = model.config.image_seq_length
    tokens = [place for place, token in enumerate(ids.tolist()) if token == model.config.image_token_id][-count:]
    side = math.isqrt(count)
    alike, shares = [], []
    for place, token in enumerate(tokens):
        seen = model.seg_projector(states[token][None])[0]
        alike.append(prompt @ seen / prompt.norm() / seen.norm() / LIKENESS)
        (rows, columns) = (
            [place * size // side, -(-(place + 1) * size // side)]
            for place, size in zip(divmod(place, side), mask.shape, strict=True)
        )
        shares.append(mask[slice(*rows), slice(*columns)].double().mean())
    likely, wanted = torch.stack(alike).softmax(0), torch.stack(shares) / sum(shares)
    return sum(share * (share.log() - found.log()) for share, found in zip(wanted, likely, strict=True) if share > 0)


@pytest.fixture(scope="module")
def plain_terms(model, batch) -> dict:
    counts = dict(zip(COUNTS, batch["targets"]["counts"].tolist(), strict=True))
    return {term: amount / counts[COUNTED[term]] for term, amount in plainly(model, batch).items()}


@pytest.fixture(scope="module")
def output(model, batch):
    return model(**batch)


@pytest.mark.parametrize("term", TERMS)
def test_every_term_is_what_plain_logits_and_masks_give(plain_terms, output, term):
    found, expected = output.losses[term], plain_terms[term]
    assert found.dtype == torch.float64 and expected > 0
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("term", TERMS)
def test_every_terms_gradient_is_that_of_the_plain_one(model, plain_terms, output, term):
    found, expected = gradients_of(model, {"found": output.losses[term], "expected": plain_terms[term]}).values()
    torch.testing.assert_close(found, expected, **EXACT)


def test_the_loss_is_the_weighted_sum_and_so_is_its_gradient(model, batch, output):
    weights = {term: 0.3 + 0.7 * index for index, term in enumerate(TERMS)}
    weighted = model(**{**batch, "targets": {**batch["targets"], "weights": weights}})
    torch.testing.assert_close(weighted.loss, sum(weights[t] * output.losses[t] for t in TERMS), **EXACT)
    (whole,) = gradients_of(model, {"loss": weighted.loss}).values()
    parts = gradients_of(model, output.losses)
    summed = [sum(weights[term] * parts[term][i] for term in TERMS) for i in range(len(whole))]
    torch.testing.assert_close(list(whole), summed, **EXACT)


def test_the_default_weights_hold_where_none_are_given(output):
    expected = sum(DEFAULT_WEIGHTS[term] * part for term, part in output.losses.items())
    torch.testing.assert_close(output.loss, expected, **EXACT)


def test_nothing_falls_back_to_float32(model, batch):
    """A step of 1e-7 is lost in float32; in float64 every loss follows its gradient to five digits."""
    moved = copy.deepcopy(model)
    parameter = moved.model.language_model.layers[0].mlp.down_proj.weight
    output = moved(**batch)
    found = {term: torch.autograd.grad(part, parameter, retain_graph=True)[0] for term, part in output.losses.items()}
    direction = sum(gradient / gradient.norm() for gradient in found.values())
    sides = []
    with torch.no_grad():
        for step in (1e-7, -2e-7):
            parameter += step * direction
            sides.append(moved(**batch).losses)
    for term, gradient in found.items():
        slope = ((sides[0][term] - sides[1][term]) / 2e-7).item()
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5), term


# What is not there


LACKING = {
    "masks": (MASK_TERMS, [record("b", depth=slope())]),
    "depth": (DEPTH_TERMS, [record("b", [box(bottom=9)])]),
    "masks and depth": (MASK_TERMS + DEPTH_TERMS, [record("b")]),
    "a picture": (MASK_TERMS + DEPTH_TERMS, [record("b", picture=False)]),
}


@pytest.mark.parametrize("lacking", LACKING)
def test_a_sample_without_it_adds_exactly_nothing(model, collate, lacking):
    terms, other = LACKING[lacking]
    first = [record("a", [box(right=30)], depth=slope())]
    alone, both = collate(first), collate([*first, *other])
    alone = with_counts(alone, both)
    one, two = (model(**batch).losses for batch in (alone, both))
    one, two = ({term: losses[term] for term in terms} for losses in (one, two))
    torch.testing.assert_close(two, one, **EXACT)
    torch.testing.assert_close(gradients_of(model, two), gradients_of(model, one), **EXACT)


@pytest.mark.parametrize("lacking", LACKING)
def test_the_terms_of_what_is_not_there_are_zero_with_zero_gradients(model, collate, lacking):
    terms, other = LACKING[lacking]
    losses = model(**collate(other)).losses
    assert all(losses[term].item() == 0 and losses[term].requires_grad for term in terms)
    found = gradients_of(model, {term: losses[term] for term in terms})
    assert not any(gradient.any() for part in found.values() for gradient in part)


BARE = {
    "words alone": [record("w", picture=False)],
    "a picture without masks": [record("p")],
    "depth alone": [record("d", depth=slope())],
    "masks alone": [record("m", [box(right=30)])],
    "an absent thing": [record("n", [empty()])],
    "a text without an answer": [record("q", picture=False, messages=[user("Hello?")])],
}


@pytest.mark.parametrize("bare", BARE)
def test_every_batch_reaches_the_same_parameters(model, collate, bare):
    """Processes with unlike batches wait for each other's gradients, so that none may lack one."""
    full = {name for name, gradient in gradients(model, collate(some_of_each())).items() if gradient is not None}
    found = gradients(model, collate(BARE[bare]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert full == trained == {name for name, gradient in found.items() if gradient is not None}
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_an_absent_thing_teaches_that_it_is_absent_and_no_mask(model, collate):
    losses = model(**collate([record("n", [empty()])])).losses
    assert losses["seg_object_loss"] > 0
    assert not any(losses[term].item() for term in MASK_TERMS if term != "seg_object_loss")


def test_a_map_without_a_value_teaches_nothing(model, collate):
    batch = collate([record("d", depth=slope())])
    batch["targets"]["depth_labels"][:] = NAN
    loss = model(**batch).losses["depth_recon_loss"]
    assert loss.item() == 0 and not any(gradient.any() for gradient in gradients_of(model, {"loss": loss})["loss"])


def test_a_batch_is_the_sum_of_its_records(model, collate):
    records = some_of_each()
    whole = collate(records)
    pieces = [with_counts(collate([one]), whole) for one in records]
    torch.testing.assert_close(model(**whole).loss, sum(model(**piece).loss for piece in pieces), **EXACT)
    found, parts = gradients(model, whole), [gradients(model, piece) for piece in pieces]
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, sum(part[name] for part in parts), **EXACT)


# Frozen parts, half precision, figures


def test_frozen_parts_get_no_gradient_and_pass_it_on(model, batch, output):
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"mask_model", "depth_model"}
    assert not any(name.startswith("mask_model.mask_decoder") for name in frozen)
    weight = model.model.language_model.layers[0].mlp.down_proj.weight
    assert torch.autograd.grad(output.losses["depth_recon_loss"], weight, retain_graph=True)[0].any()
    model(**batch).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    model.zero_grad()


def test_under_bfloat16_all_terms_are_float32_and_near(tiny, batch):
    model, inputs = tiny[0], {k: v.float() if k == "pixel_values" else v for k, v in batch.items()}
    targets = inputs["targets"]
    inputs["targets"] = {k: v.float() if hasattr(v, "is_floating_point") and v.is_floating_point() else v
                         for k, v in targets.items()}  # fmt: skip
    exact = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**inputs)
    for term in TERMS:
        assert rough.losses[term].dtype == torch.float32
        assert rough.losses[term].item() == pytest.approx(exact.losses[term].item(), rel=0.15, abs=0.05)
    rough.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()


def counted(model, batch) -> dict:
    """Figures, one by one, of the plain outputs."""
    targets, labels, ids, config = batch["targets"], batch["labels"], batch["input_ids"], model.config
    with torch.no_grad():
        output = model(**{k: v for k, v in batch.items() if k not in ("targets", "labels")})
    said = output.logits.argmax(-1)
    first, codes = config.depth_code_token_ids
    span = {config.seg_token_id, config.depth_start_token_id, config.depth_end_token_id, *range(first, first + codes)}
    figures = {name: [0, 0] for name in ("token_accuracy", "answer_accuracy", "span_token_accuracy", "code_accuracy",
               "span_validity", "mask_iou", "mask_ciou", "object_accuracy")}  # fmt: skip

    def count(name, amount, of=1):
        figures[name][0] += float(amount)
        figures[name][1] += float(of)

    for row in range(len(ids)):
        answer = []
        for column in range(1, ids.shape[1]):
            if labels[row, column] != IGNORED:
                right = said[row, column - 1] == ids[row, column]
                count("token_accuracy", right)
                if int(ids[row, column]) not in span:
                    answer.append(bool(right))
        if answer:
            count("answer_accuracy", all(answer))
    for row, start in targets["depth_positions"].tolist():
        spoken = said[row, start - 1 : start + SPAN + 1].tolist()
        for right, (a, b) in enumerate(zip(spoken, ids[row, start : start + SPAN + 2].tolist(), strict=True)):
            count("span_token_accuracy", a == b)
            if 0 < right <= SPAN:
                among = output.logits[row, start + right - 1, first : first + codes].argmax() + first
                count("code_accuracy", among == b)
        valid = spoken[0] == config.depth_start_token_id and spoken[-1] == config.depth_end_token_id
        count("span_validity", valid and all(first <= token < first + codes for token in spoken[1:-1]))
    for index, (row, column) in enumerate(targets["seg_positions"].tolist()):
        picture, there = targets["mask_images"][index], bool(targets["mask_present"][index])
        features = model.encode_pictures(targets["sam_pixel_values"][picture : picture + 1])
        with torch.no_grad():
            mask = model.decode_masks(output.last_hidden_state[row, column][None], features, [0])
        count("object_accuracy", (mask.object_scores[0] > 0.5) == there)
        if there:
            found, gold = mask.mask_logits[0] > 0, targets["mask_labels"][index]
            overlap, union = (found & gold).sum(), (found | gold).sum()
            count("mask_iou", overlap / union)
            count("mask_ciou", overlap, union)
    return figures


def test_figures_are_those_counted_one_by_one(model, batch):
    found, expected = model(**batch).figures, counted(model, batch)
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert pair[1] > 0 and found[name].tolist() == pytest.approx(pair, rel=1e-5), name
        assert not found[name].requires_grad


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("broken", [None, 0, 4, SPAN + 1], ids=["whole", "start", "code", "end"])
def test_figures_of_a_model_that_says_everything_right_or_nothing(model, collate, monkeypatch, right, broken):
    """The head is asked for what it should say, but for one token of the span; or for what is never due."""
    batch = collate([record("a", [box(right=30)], depth=slope()), record("b")])
    ids, vocabulary = batch["input_ids"], model.config.text_config.vocab_size
    said = torch.zeros(*ids.shape, vocabulary, dtype=torch.float64)
    due = ids.roll(-1, 1) if right else torch.zeros_like(ids)
    ((row, start),) = batch["targets"]["depth_positions"].tolist()
    if broken is not None:
        due[row, start + broken - 1] = 0
    said.scatter_(2, due[..., None], 50.0)
    one_hot = copy.deepcopy(model)
    one_hot.lm_head.weight = torch.nn.Parameter(torch.eye(vocabulary, dtype=torch.float64))
    states = type("Output", (), {"last_hidden_state": said})
    monkeypatch.setattr(one_hot.model, "forward", lambda **kwargs: states)
    monkeypatch.setattr(one_hot, "_mask_terms", lambda *_: (dict.fromkeys(MASK_TERMS, torch.zeros(())), {}))
    output = one_hot(**batch)
    learned = int((batch["labels"] != IGNORED).sum())
    expected = {"token_accuracy": learned, "answer_accuracy": 2, "span_token_accuracy": SPAN + 2, "span_validity": 1}
    wrong = 0 if broken is None else 1
    for name, count in expected.items():
        amount = count - (0 if name == "answer_accuracy" else wrong)
        assert output.figures[name].tolist() == [amount if right else 0, count]
    if right and not wrong:
        assert output.figures["code_accuracy"].tolist() == [SPAN, SPAN]
        assert output.losses["text_loss"] < 1e-6 and output.losses["depth_marker_loss"] < 1e-6
        assert output.losses["depth_token_loss"] < 1e-6 and output.losses["depth_count_loss"] < 1e-6


def test_a_later_span_counts_as_one_more(model, collate):
    messages = [user("How far?"), assistant("Far.", "depth"), user("Again?"), assistant("Far.", "depth")]
    batch = collate([record("d", depth=slope(), messages=messages)])
    assert model(**batch).figures["span_validity"][1] == 2
    torch.testing.assert_close(
        model(**batch).losses["depth_recon_loss"], plainly(model, batch)["depth_recon_loss"] / 2
    )


def test_a_model_without_its_mask_branch_says_so(tiny, collate):
    lacking = copy.copy(tiny[0])
    lacking.missing_branches = frozenset({"mask"})
    with pytest.raises(ValueError, match="without the weights of its mask branch"):
        lacking(**collate([record("a", [box()])]))


def test_no_logits_are_made_of_all_tokens(tiny, collate, monkeypatch):
    """The head is never called: its weight is multiplied by what is learned alone."""
    model = tiny[0]
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: pytest.fail("the head was called"))
    batch = collate([record("w", picture=False)])
    assert model(**batch).logits is None
