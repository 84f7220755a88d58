"""The losses by hand, by another formula, and by their gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from perceptio import losses_perceptio as losses
from perceptio.hub.tiny import tiny_config
from perceptio.losses_perceptio import (
    COUNTED,
    COUNTS,
    DEFAULT_WEIGHTS,
    LIKENESS,
    TERMS,
    Head,
    HeadCrossEntropy,
    depth_count_loss,
    depth_recon_loss,
    depth_token_loss,
    head_cross_entropy,
    mask_iou,
    sample_points,
    seg_bce_loss,
    seg_dice_loss,
    seg_iou_loss,
    seg_object_loss,
    seg_place_loss,
    total_loss,
)
from perceptio.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio.training.adapters import new_token_ids, peft_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TOKENS, WIDTH, VOCABULARY = 7, 5, 11
ROW_IDS = torch.tensor([9, 2, 4])
HALF = (torch.float16, torch.bfloat16)


def from_seed(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, kind=torch.float64, grad=False):
    values = torch.randn(shape, generator=from_seed(seed), dtype=torch.float64)
    return values.to(kind).requires_grad_(grad)


# The head


def head_inputs(with_rows: bool, kind=torch.float64, tokens=TOKENS):
    states, weight = randn(tokens, WIDTH, kind=kind, grad=True), randn(VOCABULARY, WIDTH, seed=1, kind=kind, grad=True)
    rows = randn(len(ROW_IDS), WIDTH, seed=2, kind=kind, grad=True) if with_rows else None
    targets = torch.randint(VOCABULARY, (tokens,), generator=from_seed(3))
    return states, Head(weight, ROW_IDS if with_rows else None, rows), targets


def dense(head: Head) -> torch.Tensor:
    """The weight that the head stands for."""
    return head.weight if head.rows is None else head.weight.index_copy(0, head.row_ids, head.rows)


def plain(states, head, targets):
    logits = states @ dense(head).T
    return F.cross_entropy(logits, targets, reduction="sum"), logits.argmax(-1)


def gradients(loss, states, head):
    return torch.autograd.grad(loss, [t for t in (states, head.weight, head.rows) if t is not None])


@pytest.mark.parametrize("pieces", [1, 3, TOKENS])
@pytest.mark.parametrize("with_rows", [False, True], ids=["weight", "rows"])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_the_head_is_plain_cross_entropy(monkeypatch, kind, with_rows, pieces):
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * VOCABULARY * math.ceil(TOKENS / pieces))
    states, head, targets = head_inputs(with_rows, kind)
    found, likeliest = head_cross_entropy(states, head, targets)
    expected, best = plain(states, head, targets)
    assert found.dtype == kind and torch.equal(likeliest, best)
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients(3 * found, states, head), gradients(3 * expected, states, head), strict=True):
        assert one.dtype == kind
        torch.testing.assert_close(one, other)


def test_the_head_by_hand():
    """Two words of logits 0 and log 3: the second has probability 3/4."""
    states = torch.tensor([[math.log(3.0)]], requires_grad=True)
    head = Head(torch.tensor([[0.0], [1.0]]))
    loss, likeliest = head_cross_entropy(states, head, torch.tensor([0]))
    loss.backward()
    assert likeliest.tolist() == [1]
    assert loss.item() == pytest.approx(math.log(4)) and states.grad.item() == pytest.approx(0.75)


@pytest.mark.parametrize("with_rows", [False, True], ids=["weight", "rows"])
def test_the_heads_gradient_is_that_of_its_value(monkeypatch, with_rows):
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * VOCABULARY * 2)
    states, head, targets = head_inputs(with_rows)

    def value(*tensors):
        return HeadCrossEntropy.apply(*tensors[:2], tensors[2] if with_rows else None, head.row_ids, targets)[0]

    assert gradcheck(value, [states, head.weight, *([head.rows] if with_rows else [])])


def test_replaced_rows_of_the_weight_get_no_gradient():
    states, head, targets = head_inputs(True)
    _, d_weight, d_rows = gradients(head_cross_entropy(states, head, targets)[0], states, head)
    assert not d_weight[ROW_IDS].any() and d_weight.any(-1).sum() == VOCABULARY - len(ROW_IDS)
    assert d_rows.any(-1).all()


@pytest.mark.parametrize("with_rows", [False, True], ids=["weight", "rows"])
def test_the_head_under_autocast(with_rows):
    """bfloat16 keeps 8 bits: 1 % of the largest gradient; the sum itself and all gradients stay in float32."""
    states, head, targets = head_inputs(with_rows, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = head_cross_entropy(states, head, targets)
    expected, _ = plain(states, head, targets)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=0.01)
    for one, other in zip(gradients(found, states, head), gradients(expected, states, head), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=0.01 * other.abs().max().item() + 0.01)


def test_frozen_half_weights_beside_trained_float_rows():
    """As peft keeps them: the weight in bfloat16, the rows that are trained in float32."""
    states, head, targets = head_inputs(True, torch.float32)
    head.weight = head.weight.detach().to(torch.bfloat16)
    found, _ = head_cross_entropy(states.to(torch.bfloat16), head, targets)
    found.backward()
    exact = head_inputs(True, torch.float32)[1]
    plain(states.detach(), exact, targets)[0].backward()
    assert found.dtype == head.rows.grad.dtype == states.grad.dtype == torch.float32
    torch.testing.assert_close(head.rows.grad, exact.rows.grad, rtol=0, atol=0.05)


def test_nothing_of_the_logits_size_is_kept(monkeypatch):
    monkeypatch.setattr(losses, "LOGIT_BYTES", 1)
    states, head, targets = head_inputs(False, tokens=40)
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        head_cross_entropy(states, head, targets)
    assert sorted(kept) == [VOCABULARY * WIDTH, 40 * WIDTH]


def test_without_gradients_none_are_made():
    """The logits alone: 2 T V D operations, and not those of two gradients besides."""
    states, head, targets = head_inputs(True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        found, likeliest = head_cross_entropy(states, head, targets)
    expected, best = plain(states, head, targets)
    assert not found.requires_grad and torch.equal(likeliest, best)
    torch.testing.assert_close(found, expected.detach())
    assert counter.get_total_flops() == 2 * TOKENS * WIDTH * (VOCABULARY + len(ROW_IDS))


@pytest.mark.parametrize("with_rows", [False, True], ids=["weight", "rows"])
def test_no_token_is_no_loss_and_a_zero_gradient(with_rows):
    states, head, targets = head_inputs(with_rows, tokens=0)
    found, likeliest = head_cross_entropy(states, head, targets)
    assert found.item() == 0 and len(likeliest) == 0
    for gradient in gradients(found, states, head):
        assert not gradient.any()


def test_states_without_a_gradient_leave_the_head_its_own():
    states, head, targets = head_inputs(True)
    head_cross_entropy(states.detach(), head, targets)[0].backward()
    _, d_weight, d_rows = gradients(plain(states, head, targets)[0], states, head)
    assert states.grad is None
    torch.testing.assert_close((head.weight.grad, head.rows.grad), (d_weight, d_rows))


def test_a_frozen_head_passes_the_gradient_on():
    states, head, targets = head_inputs(False)
    head.weight = head.weight.detach()
    head_cross_entropy(states, head, targets)[0].backward()
    torch.testing.assert_close(states.grad, torch.autograd.grad(plain(states, head, targets)[0], states)[0])


def test_a_second_derivative_is_refused_and_not_wrong():
    states, head, targets = head_inputs(False)
    loss, _ = head_cross_entropy(states, head, targets)
    (first,) = torch.autograd.grad(loss.square(), states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# The head of a model, with and without peft's rows


@pytest.fixture(params=[True, False], ids=["tied", "apart"])
def wrapped(request):
    """A model whose new token rows are trained, and are no longer what they were."""
    torch.manual_seed(0)
    ids = {"seg_token_id": 70, "depth_start_token_id": 71, "depth_end_token_id": 72, "depth_code_token_ids": [73, 8]}
    model = PerceptioForConditionalGeneration(
        tiny_config(vocab_size=96, image_token_id=69, tie_word_embeddings=request.param, **ids), branches=()
    )
    model = get_peft_model(model, peft_config(model, r=2)).train(False)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += randn(*parameter.shape, seed=5, kind=torch.float32)
    return model


STATES = {
    "active": lambda model: None,
    "merged": lambda model: model.merge_adapter(),
    "merged and taken back": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "disabled by peft": lambda model: model.base_model.disable_adapter_layers(),
}


@pytest.mark.parametrize("state", STATES)
def test_the_head_of_a_model_is_what_its_layer_computes(wrapped, state):
    STATES[state](wrapped)
    layer = wrapped.get_base_model().lm_head
    head = Head.of(layer)
    states = randn(4, 32, kind=torch.float32)
    torch.testing.assert_close(states @ dense(head).T, layer(states))
    assert (head.rows is not None) == (state in ("active", "merged and taken back"))


def test_the_rows_of_the_head_are_the_trained_parameter(wrapped):
    layer = wrapped.get_base_model().lm_head
    head = Head.of(layer)
    assert head.row_ids.tolist() == list(new_token_ids(wrapped.config)) and not head.weight.requires_grad
    delta = layer.token_adapter.trainable_tokens_delta["default"]
    assert head.rows is delta and any(delta is parameter for parameter in wrapped.parameters())
    tied = wrapped.get_base_model().model.language_model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    assert (delta is tied) == bool(wrapped.config.tie_word_embeddings)


def test_the_head_without_an_adapter_is_its_weight():
    layer = torch.nn.Linear(3, 4, bias=False)
    head = Head.of(layer)
    assert head.weight is layer.weight and head.rows is head.row_ids is None


def test_two_active_adapters_are_an_error(wrapped):
    adapter = wrapped.get_base_model().lm_head.token_adapter
    adapter.trainable_tokens_delta["second"] = adapter.trainable_tokens_delta["default"]
    adapter._active_adapter = ["default", "second"]
    with pytest.raises(ValueError, match=r"\['default', 'second'\] are active at once.*set_adapter"):
        Head.of(wrapped.get_base_model().lm_head)


@pytest.mark.parametrize("with_rows", [False, True], ids=["weight", "rows"])
def test_selected_rows_and_their_gradients(with_rows):
    _, head, _ = head_inputs(with_rows)
    ids, direction = torch.tensor([4, 0, 9, 10, 4]), randn(5, WIDTH, seed=8)
    trained = [head.weight, *([head.rows] if with_rows else [])]
    found, expected = head.select(ids), dense(head)[ids]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, trained, direction), torch.autograd.grad(expected, trained, direction)
    )


# Depth


def test_the_token_loss_is_a_mean_over_the_span():
    """Two codes; logits 0, 0 cost log 2, logits log 3, 0 cost log 4/3 and log 4."""
    logits = torch.tensor([[[0, 0], [math.log(3), 0]], [[math.log(3), 0], [0, 0]]], dtype=torch.float64)
    found = depth_token_loss(logits, torch.tensor([[1, 0], [1, 0]]))
    torch.testing.assert_close(found, torch.log(torch.tensor([2 * 4 / 3, 4 * 2], dtype=torch.float64)) / 2)
    assert gradcheck(lambda x: depth_token_loss(x, torch.tensor([[1, 0], [1, 0]])), logits.requires_grad_())


def expected_error(logits) -> float:
    """E|length - N| / N over every place where the span may end; one that has not ended by N + 1 is one too long."""
    n, inside, error = len(logits) - 1, 1.0, 0.0
    for length, row in enumerate(logits.exp().tolist()):
        ends = row[-1] / sum(row)
        error += inside * ends * abs(length - n)
        inside *= 1 - ends
    return (error + inside) / n


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_count_loss_is_the_expected_error_of_the_length(n):
    logits = 2 * randn(4, n + 1, 4, seed=n)
    found = depth_count_loss(logits)
    assert found.tolist() == pytest.approx([expected_error(row) for row in logits])
    assert gradcheck(depth_count_loss, logits.requires_grad_())


def test_the_count_loss_by_hand():
    """Two codes are due.  Half of the spans end at once (2 too few), a quarter after one code, an eighth rightly, and
    an eighth goes on: (2/2 + 1/4 + 1/8) / 2."""
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    assert depth_count_loss(logits).item() == pytest.approx(11 / 16)


def ends(*certain: bool) -> torch.Tensor:
    """Logits that are sure whether to end at each place."""
    return torch.tensor([[[0.0, 0.0, 60.0 if end else -60.0] for end in certain]])


def test_the_count_loss_is_zero_only_where_every_end_is_right():
    assert depth_count_loss(ends(False, False, False, True)).item() < 1e-20
    for wrong, cost in {(True, False, False, True): 3, (False, True, False, True): 2, (False, False, True, True): 1,
                        (False, False, False, False): 1}.items():  # fmt: skip
        assert depth_count_loss(ends(*wrong)).item() == pytest.approx(cost / 3)


def test_the_count_loss_teaches_where_to_end():
    """A descent step makes an early end less likely and the right one more likely."""
    logits = randn(8, 5, 4, seed=3, grad=True)
    depth_count_loss(logits).sum().backward()
    of_the_end = logits.grad[..., -1]
    assert (of_the_end[:, :-1] > 0).all() and (of_the_end[:, -1] < 0).all()


def expected_length(logits) -> float:
    return (1 - logits.softmax(-1)[0, :, -1]).cumprod(0).sum().item()


@pytest.mark.parametrize("start", [3.0, -6.0], ids=["from too short", "from too long"])
def test_descent_brings_the_length_to_its_number(start):
    logits = torch.zeros(1, 5, 3)
    logits[..., -1] = start
    logits.requires_grad_()
    lengths, errors = [], []
    for _ in range(300):
        loss = depth_count_loss(logits).sum()
        lengths.append(expected_length(logits.detach()))
        errors.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, logits)
        logits.data -= 10 * gradient
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05
    assert (lengths[0] < 1) if start > 0 else (lengths[0] > 4.9)
    assert lengths[-1] == pytest.approx(4, abs=0.15)


def test_the_count_loss_is_the_number_itself_where_all_is_certain_and_has_a_gradient_where_that_has_none():
    logits = 2 * randn(16, 5, 4, seed=4, grad=True)
    ended = F.pad(logits.argmax(-1) == 3, (0, 1), value=True)
    hard = (ended.int().argmax(-1) - 4).abs() / 4
    assert len(set(hard.tolist())) > 3
    torch.testing.assert_close(depth_count_loss(10000 * logits), hard.double())
    assert not hard.requires_grad and depth_count_loss(logits).requires_grad


def test_the_reconstruction_is_compared_where_there_is_depth():
    """(1 + 0 + 4) / 3 over three pixels; the fourth has no value."""
    decoded = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], requires_grad=True)
    loss = depth_recon_loss(decoded, torch.tensor([[[0.0, float("nan")], [3.0, 2.0]]]))
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([5 / 3])
    torch.testing.assert_close(decoded.grad, torch.tensor([[[2 / 3, 0], [0, 4 / 3]]]))


def test_a_map_without_a_value_is_no_loss():
    decoded = randn(2, 3, 3, grad=True)
    depth = torch.stack([torch.full((3, 3), float("nan")), torch.zeros(3, 3)]).double()
    loss = depth_recon_loss(decoded, depth)
    loss.sum().backward()
    assert loss[0] == 0 and loss[1] > 0 and not decoded.grad[0].any() and decoded.grad[1].all()
    assert gradcheck(lambda x: depth_recon_loss(x, depth), decoded)


# Masks


def test_bce_and_dice_by_hand():
    """Probability 1/2 everywhere, half of the pixels in: log 2, and 1 - (2 * 1 + 1) / (2 + 2 + 1)."""
    logits, masks = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert seg_bce_loss(logits, masks).tolist() == pytest.approx([math.log(2)])
    assert seg_dice_loss(logits, masks).tolist() == pytest.approx([0.4])


@pytest.mark.parametrize("loss", [seg_bce_loss, seg_dice_loss])
def test_gradients_of_the_mask_losses(loss):
    logits, masks = randn(3, 6, grad=True), (randn(3, 6, seed=1) > 0).double()
    assert gradcheck(lambda x: loss(x, masks), logits)


SIDE = 256  # 65536 pixels: one more than float16 can count
SHAPES = {"empty": 0, "one pixel": 1, "half": SIDE * SIDE // 2, "full": SIDE * SIDE}


def flat_mask(pixels: int, kind) -> torch.Tensor:
    return (torch.arange(SIDE * SIDE) < pixels).to(kind)[None]


@pytest.mark.parametrize("kind", [torch.float32, *HALF])
@pytest.mark.parametrize("gold", SHAPES)
@pytest.mark.parametrize("said", SHAPES)
def test_mask_losses_are_finite_for_every_mask(said, gold, kind):
    masks = flat_mask(SHAPES[gold], kind)
    logits = (20 * (2 * flat_mask(SHAPES[said], kind) - 1)).requires_grad_()
    bce, dice = seg_bce_loss(logits, masks), seg_dice_loss(logits, masks)
    (bce + dice).sum().backward()
    assert logits.grad.isfinite().all() and bce.isfinite() and 0 <= dice.item() <= 1
    a, b = SHAPES[said], SHAPES[gold]
    assert bce.item() == pytest.approx(20 * abs(a - b) / SIDE**2, rel=0.01, abs=1e-6)
    assert dice.item() == pytest.approx(1 - (2 * min(a, b) + 1) / (a + b + 1), abs=1e-3)


def test_whether_the_thing_is_there():
    found = seg_object_loss(torch.tensor([0.0, math.log(3), math.log(3)]), torch.tensor([True, True, False]))
    assert found.tolist() == pytest.approx([math.log(2), math.log(4 / 3), math.log(4)])
    present = torch.tensor([True, False])
    assert gradcheck(lambda x: seg_object_loss(x, present), randn(2, grad=True))


def test_the_predicted_iou_follows_the_one_that_was_found():
    predicted, found = torch.tensor([[0.5, 1.0]], requires_grad=True), torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = seg_iou_loss(predicted, found)
    loss.sum().backward()
    assert loss.tolist() == [0.625] and predicted.grad.tolist() == [[-0.5, 1.0]] and found.grad is None


def test_the_prompt_is_drawn_to_the_parts_of_the_picture_in_the_mask():
    seen = torch.eye(4)[None].repeat(4, 1, 1)  # four parts, each like itself alone
    shares = torch.tensor([[0.0, 0.5, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0], [0.2, 0.0, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0]])
    prompts = torch.tensor([[0.0, 3.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [2.0, 0.0, 2.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    right, wrong, both, empty = seg_place_loss(prompts, seen, shares).tolist()
    assert 0 <= right < 1e-3 and abs(wrong - 1 / LIKENESS) < 1e-3 and 0 <= both < 1e-2 and empty == 0
    assert seg_place_loss(2 * prompts, seen, 0.1 * shares).tolist() == pytest.approx(
        [right, wrong, both, empty], abs=1e-6
    )
    assert gradcheck(
        lambda p, s: seg_place_loss(p, s, shares[:3].double()), (randn(3, 5, grad=True), randn(3, 4, 5, grad=True))
    )


def test_intersection_and_union_in_pixels():
    """The mask holds the upper row; the logits its left pixel and the one below."""
    logits, masks = torch.tensor([[[1.0, -1.0], [2.0, 0.0]]]), torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert mask_iou(logits, masks) == (torch.tensor([1.0]), torch.tensor([3.0]))
    candidates = torch.stack([logits, -logits], dim=1)  # [1, 2, 2, 2]
    intersection, union = mask_iou(candidates, masks[:, None])
    assert intersection.tolist() == [[1.0, 1.0]] and union.tolist() == [[3.0, 2.0]]


def test_nothing_against_nothing_has_neither_intersection_nor_union():
    """0 / 0 is left to the caller, who knows whether such a mask counts."""
    intersection, union = mask_iou(torch.full((1, 2, 2), -1.0), torch.zeros(1, 2, 2))
    assert intersection.item() == union.item() == 0


def ramp(side=64) -> torch.Tensor:
    """From -1 at the left edge to 1 at the right one."""
    return ((torch.arange(side) + 0.5) / side * 2 - 1).expand(1, side, side).clone()


@pytest.mark.parametrize("points", [1, 100, 1001])
def test_as_many_points_as_were_asked_for_and_none_twice(points):
    logits, masks = randn(2, 64, 64), torch.ones(2, 64, 64).double()
    found, gold = sample_points(logits, masks, torch.tensor([1, 2]), points)
    assert found.shape == gold.shape == (2, points)
    assert all(len(row.unique()) == points for row in found)


def test_three_quarters_of_the_points_are_where_it_is_least_certain():
    """Of 3 P places on a ramp the P * 3/4 nearest to 0 lie within 1/4; of the other P / 4 a quarter does by chance."""
    found, _ = sample_points(ramp(), ramp(), torch.tensor([5]), 4000)
    near = (found.abs() < 0.25).float().mean().item()
    assert near == pytest.approx(0.75 + 0.25 * 0.25, abs=0.02)
    assert found.abs().max() > 0.95


def test_the_points_of_a_mask_do_not_depend_on_its_batch():
    logits, masks, seeds = randn(3, 16, 16), (randn(3, 16, 16, seed=1) > 0).double(), torch.tensor([7, 2**52, 9])
    together = sample_points(logits, masks, seeds, 50)
    for i in range(3):
        alone = sample_points(logits[i : i + 1], masks[i : i + 1], seeds[i : i + 1], 50)
        assert torch.equal(alone[0][0], together[0][i]) and torch.equal(alone[1][0], together[1][i])
    others = sample_points(logits, masks, seeds + 2, 50)
    assert not torch.equal(others[0], together[0])


def test_logits_and_masks_are_seen_at_the_same_places():
    logits = randn(2, 16, 16)
    found, gold = sample_points(logits, logits, torch.tensor([0, 1]), 60)
    assert torch.equal(found, gold)


@pytest.mark.parametrize("points", [0, 64, 65])
def test_all_pixels_where_no_number_or_a_larger_one_is_asked_for(points):
    logits, masks = randn(2, 8, 8), randn(2, 8, 8, seed=1)
    found, gold = sample_points(logits, masks, torch.tensor([0, 1]), points)
    assert torch.equal(found, logits.flatten(1)) and torch.equal(gold, masks.flatten(1))


def test_no_mask_has_no_points():
    logits = randn(0, 8, 8, grad=True)
    found, gold = sample_points(logits, logits.detach(), torch.zeros(0, dtype=torch.long), 10)
    assert len(found) == len(gold) == 0 and seg_bce_loss(found, gold).sum() == 0 == seg_dice_loss(found, gold).sum()


def test_points_along_the_edge_are_as_certain_as_their_pixels():
    """Zeros beyond the edge, mixed in, made a perfect mask that touches it look unsure and wrong there."""
    found, gold = sample_points(torch.full((1, 8, 8), 20.0), torch.ones(1, 8, 8), torch.tensor([3]), 63)
    torch.testing.assert_close(found, torch.full((1, 63), 20.0))
    torch.testing.assert_close(gold, torch.ones(1, 63))


def test_the_gradient_reaches_the_logits_alone_and_not_through_the_places():
    """A point is a mean of four pixels whose shares add up to 1, wherever it lies."""
    logits, masks = randn(2, 8, 8, grad=True), randn(2, 8, 8, seed=1, grad=True)
    found, gold = sample_points(logits, masks, torch.tensor([0, 1]), 40)
    found.sum().backward()
    assert not gold.requires_grad and masks.grad is None
    torch.testing.assert_close(logits.grad.sum((1, 2)), torch.full((2,), 40.0).double())
    assert (logits.grad >= 0).all()
    assert gradcheck(lambda x: sample_points(x, masks, torch.tensor([0, 1]), 40)[0], logits)


# The sum


def test_the_sum_of_all_losses_by_hand():
    """Sums 1, 2, 3 …; 10 tokens, 8 of answers, 2 masks that show something, 4 masks, 5 spans; every weight
    its own."""
    sums = {term: torch.tensor(float(i + 1)) for i, term in enumerate(TERMS)}
    counts = torch.tensor([10.0, 8.0, 2.0, 4.0, 5.0, 3.0])
    weights = {term: 10.0**i for i, term in enumerate(TERMS)}
    loss, parts = total_loss(sums, counts, weights)
    expected = [1 / 10, 2 / 8, 3 / 2, 4 / 2, 5 / 4, 6 / 2, 7 / 2, 8 / 5, 9 / 5, 10 / 5, 11 / 5]
    assert [parts[term].item() for term in TERMS] == pytest.approx(expected)
    assert loss.item() == pytest.approx(sum(part * 10**i for i, part in enumerate(expected)))


def test_pieces_of_a_batch_add_up_to_it():
    sums = [{term: randn(seed=seed + i, kind=torch.float64) for i, term in enumerate(TERMS)} for seed in (0, 20)]
    counts = torch.tensor([7.0, 5.0, 3.0, 4.0, 2.0, 2.0])
    whole, _ = total_loss({term: sums[0][term] + sums[1][term] for term in TERMS}, counts, DEFAULT_WEIGHTS)
    pieces = [total_loss(part, counts, DEFAULT_WEIGHTS)[0] for part in sums]
    torch.testing.assert_close(sum(pieces), whole)


def test_what_nothing_was_counted_of_is_zero():
    sums = {term: torch.zeros((), requires_grad=True) for term in TERMS}
    loss, parts = total_loss(sums, torch.zeros(len(COUNTS)), DEFAULT_WEIGHTS)
    loss.backward()
    assert loss == 0 and not any(part.item() for part in parts.values())
    assert {term: sums[term].grad.item() for term in TERMS} == pytest.approx(DEFAULT_WEIGHTS)


def test_every_term_has_a_count_and_a_weight():
    assert set(COUNTED.values()) <= set(COUNTS) and set(DEFAULT_WEIGHTS) == set(TERMS)
    assert (DEFAULT_WEIGHTS["seg_bce_loss"], DEFAULT_WEIGHTS["seg_dice_loss"]) == (2.0, 0.5)
