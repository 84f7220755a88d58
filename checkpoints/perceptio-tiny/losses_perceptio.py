"""The losses of Perceptio: pure functions, each with one value per token, mask or span, and their sum in one place.

T tokens that are learned, D width, V vocabulary, K codes, N codes of a span, M masks, R spans, P points, H W pixels.

The means are over the whole batch of an optimizer step, whatever it was cut into: the caller gives the counts of all
of it, and parts simply add up.  A sample without a mask or without depth adds exactly zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# What each mean is over.
COUNTED = {
    "text_loss": "tokens",
    "answer_loss": "words",
    "seg_bce_loss": "masks",
    "seg_dice_loss": "masks",
    "seg_object_loss": "objects",
    "seg_iou_loss": "masks",
    "seg_place_loss": "masks",
    "depth_marker_loss": "spans",
    "depth_token_loss": "spans",
    "depth_count_loss": "spans",
    "depth_recon_loss": "spans",
}
TERMS = tuple(COUNTED)
# tokens that are learned; those of them outside of perception; masks that show something; all masks; depth spans;
# records with an answer.
COUNTS = ("tokens", "words", "masks", "objects", "spans", "answers")
DEFAULT_WEIGHTS = {**dict.fromkeys(TERMS, 1.0), "answer_loss": 0.0, "seg_bce_loss": 2.0, "seg_dice_loss": 0.5,
                   "seg_object_loss": 0.5, "seg_iou_loss": 0.1, "seg_place_loss": 0.0}  # fmt: skip
IGNORED = -100
LIKENESS = 0.1  # of cosines: the smaller, the more the likeliest parts of the picture count
LOGIT_BYTES = 1 << 27  # of the logits that exist at one time


def total_loss(sums: dict[str, Tensor], counts: Tensor, weights: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted loss and its unweighted parts: what this piece of the batch adds to each mean.

    sums: of each term over this piece.  counts: float[6] over the whole batch, in the order of `COUNTS`.
    """
    share = dict(zip(COUNTS, counts.clamp(min=1).unbind(), strict=True))
    parts = {term: sums[term] / share[COUNTED[term]].to(sums[term]) for term in TERMS}
    return sum(weights[term] * part for term, part in parts.items()), parts


# Text: next-token cross-entropy that never holds float[T, V]


def answer_words(labels: Tensor, config) -> Tensor:
    """bool like `labels`: what is learned of the answers alone, without perception tokens."""
    first, codes = config.depth_code_token_ids
    control = [config.seg_token_id, config.depth_start_token_id, config.depth_end_token_id]
    of_perception = torch.isin(labels, torch.tensor(control, device=labels.device))
    return (labels != IGNORED) & ~of_perception & ((labels < first) | (labels >= first + codes))


class HeadCrossEntropy(torch.autograd.Function):
    """The sum of the cross-entropies of `targets`, in pieces; the gradient is made on the way, while the logits are
    there, so that nothing of their size is kept or computed twice.

    states: float[T, D];  weight: float[V, D];  row_ids: int[r], rows: float[r, D], or None: rows that stand in the
    place of those of the weight;  targets: int[T].  Returns float[] and the likeliest ids int[T].
    """

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, rows: Tensor | None, row_ids: Tensor | None, targets: Tensor):
        wants_states, wants_weight, wants_rows = ctx.needs_input_grad[:3]
        kind = _compute_type(states)
        head, new = weight.to(kind), None if rows is None else rows.to(kind)
        d_states = torch.zeros_like(states) if wants_states else None
        d_weight = torch.zeros_like(weight, dtype=at_least_float32(weight.dtype)) if wants_weight else None
        d_rows = torch.zeros_like(rows, dtype=at_least_float32(rows.dtype)) if wants_rows else None
        total, likeliest = states.new_zeros((), dtype=at_least_float32(kind)), torch.empty_like(targets)
        piece = max(1, LOGIT_BYTES // (4 * len(weight)))
        with torch.autocast(states.device.type, enabled=False):
            for start in range(0, len(states), piece):
                part = slice(start, start + piece)
                h, gold = states[part].to(kind), targets[part, None]
                logits = h @ head.T  # [t, V]
                if new is not None:
                    logits[:, row_ids] = h @ new.T
                likeliest[part] = logits.argmax(-1)
                logits = logits.to(total.dtype)
                norm = logits.logsumexp(-1, keepdim=True)
                total += (norm - logits.gather(1, gold)).sum()
                if not any(ctx.needs_input_grad[:3]):
                    continue
                error = logits.sub_(norm).exp_()  # the probabilities, less 1 at the target
                error.scatter_add_(1, gold, -torch.ones_like(gold, dtype=error.dtype))
                error = error.to(kind)
                if new is not None:
                    own = error[:, row_ids]
                    error[:, row_ids] = 0
                    if wants_rows:
                        d_rows += own.T @ h
                if wants_states:
                    d_states[part] = error @ head if new is None else error @ head + own @ new
                if wants_weight:
                    d_weight += error.T @ h
        grads = [d_states, d_weight, d_rows]
        ctx.save_for_backward(*(grad for grad in grads if grad is not None))
        ctx.present = [grad is not None for grad in grads]
        ctx.kinds = [weight.dtype, None if rows is None else rows.dtype]
        ctx.mark_non_differentiable(likeliest)
        return total, likeliest

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total: Tensor, _):
        saved = iter(ctx.saved_tensors)
        d_states, d_weight, d_rows = (next(saved) if there else None for there in ctx.present)
        scaled = [None if grad is None else grad * d_total.to(grad.dtype) for grad in (d_states, d_weight, d_rows)]
        for index, kind in enumerate(ctx.kinds, start=1):
            scaled[index] = None if scaled[index] is None else scaled[index].to(kind)
        return (*scaled, None, None)


def head_cross_entropy(states: Tensor, head: "Head", targets: Tensor) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy of `targets` int[T] after `states` float[T, D], and the likeliest ids int[T]."""
    weight, rows = head.weight, head.rows
    if not torch.is_grad_enabled():  # a function with its own backward is asked for gradients all the same
        states, weight, rows = states.detach(), weight.detach(), None if rows is None else rows.detach()
    return HeadCrossEntropy.apply(states, weight, rows, head.row_ids, targets)


class Head:
    """An output head as its weight, and the rows that are trained in the place of some of it.

    weight: float[V, D];  row_ids: int[r] and rows: float[r, D] when peft trains these rows alone, else None.
    """

    def __init__(self, weight: Tensor, row_ids: Tensor | None = None, rows: Tensor | None = None):
        self.weight, self.row_ids, self.rows = weight, row_ids, rows

    @classmethod
    def of(cls, module: torch.nn.Module) -> "Head":
        adapter = getattr(module, "token_adapter", None)  # of peft's TrainableTokensWrapper
        if adapter is None:
            return cls(_whole(module.weight))
        weight = _whole(adapter.base_layer.weight)
        active = [name for name in adapter.active_adapters if name in adapter.trainable_tokens_delta]
        # The library's own `disable_adapters` reaches the inner layer alone, peft's reaches both.
        if module.disable_adapters or adapter.disable_adapters or adapter.merged_adapters or not active:
            return cls(weight)
        if len(active) > 1:
            raise ValueError(
                f"the adapters {active} are active at once, expected one: call `set_adapter` with its name"
            )
        row_ids = torch.as_tensor(adapter.token_indices[active[0]], device=weight.device)
        return cls(weight, row_ids, _whole(adapter.trainable_tokens_delta[active[0]]))

    def select(self, ids: Tensor) -> Tensor:
        """Rows float[len(ids), D] of these ids, as they are trained."""
        if self.rows is None:
            return self.weight[ids]
        places = torch.full((len(self.weight),), -1, device=ids.device)
        places[self.row_ids] = torch.arange(len(self.row_ids), device=ids.device)
        places = places[ids]
        old = self.weight[ids].to(self.rows.dtype)
        return torch.where(places[:, None] >= 0, self.rows[places.clamp(min=0)], old)


def _whole(weight: Tensor) -> Tensor:
    """A parameter that is cut over several devices (a DTensor), put together."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


# Depth: over the rows of the codes and of the end marker alone


def depth_token_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy among the codes, mean over a span: logits float[R, N, K], codes int[R, N] → float[R]."""
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view(codes.shape).mean(-1)


def depth_count_loss(logits: Tensor) -> Tensor:
    """How many codes too few or too many are to be expected, over N: float[R, N + 1, K + 1] → float[R].

    The last of the K + 1 logits is the end marker's.  With q_t, the chance that the span ends at place t having come
    so far, the chance to be still inside after t places is S_t = (1 - q_1) … (1 - q_t).  E|length - N| is the sum of
    1 - S_t over the first N places, and of S_N+1 for not ending where it should.  Unlike the length of the sequence
    that is taught, or of the likeliest one, it has a gradient; it is 0 only where every end is certain and right.
    """
    logits = logits.to(at_least_float32(logits.dtype))
    inside = logits[..., :-1].logsumexp(-1) - logits.logsumexp(-1)  # log(1 - q)
    survival = inside.cumsum(-1).exp()
    return ((1 - survival[:, :-1]).sum(-1) + survival[:, -1]) / (logits.shape[1] - 1)


def depth_recon_loss(decoded: Tensor, depth: Tensor) -> Tensor:
    """Mean squared error over the pixels that have a value (not NaN): both float[R, H, W] → float[R]."""
    valid = ~depth.isnan()
    error = torch.where(valid, decoded - depth.nan_to_num(), 0).square()
    return error.flatten(1).sum(-1) / valid.flatten(1).sum(-1).clamp(min=1)


# Masks


def seg_bce_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy, mean over the points of a mask: float[M, P], 0/1 float[M, P] → float[M]."""
    kind = at_least_float32(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits.to(kind), masks.to(kind), reduction="none").mean(-1)


def seg_dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """One minus soft Dice: float[M, P], 0/1 float[M, P] → float[M].  The ones keep nothing against nothing at 0."""
    kind = at_least_float32(logits.dtype)  # the pixels of a whole map are more than float16 can count
    prob, masks = logits.to(kind).sigmoid(), masks.to(kind)
    overlap = 2 * (prob * masks).sum(-1) + 1
    return 1 - overlap / (prob.sum(-1) + masks.sum(-1) + 1)


def seg_object_loss(logits: Tensor, present: Tensor) -> Tensor:
    """Whether the thing is there at all: float[M], bool[M] → float[M]."""
    return F.binary_cross_entropy_with_logits(logits, present.to(logits.dtype), reduction="none")


def seg_iou_loss(predicted: Tensor, found: Tensor) -> Tensor:
    """Squared error of the IoU that SAM2 predicts for each of its candidates: both float[M, C] → float[M]."""
    return (predicted - found.detach()).square().mean(-1)


def seg_place_loss(prompts: Tensor, seen: Tensor, shares: Tensor) -> Tensor:
    """How far a prompt is from being like the parts of the picture that its mask lies in, and unlike the others.

    prompts: float[M, D_sam];  seen: float[M, T, D_sam], the picture's tokens as the prompt is made;  shares:
    float[M, T], of each token's part of the picture that is in the mask.  Divergence of the likenesses from the
    shares, float[M]; 0 for an empty mask.
    """
    kind = at_least_float32(prompts.dtype)
    alike = F.cosine_similarity(prompts.to(kind)[:, None], seen.to(kind), dim=-1) / LIKENESS
    wanted = shares.to(kind) / shares.to(kind).sum(-1, keepdim=True).clamp(min=1e-6)
    return F.kl_div(alike.log_softmax(-1), wanted, reduction="none").sum(-1)


def mask_iou(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """(intersection, union) in pixels of logits > 0 with 0/1 masks: float[…, H, W] → float[…]."""
    found, gold = logits > 0, masks > 0.5
    kind = at_least_float32(logits.dtype)
    return (found & gold).flatten(-2).sum(-1).to(kind), (found | gold).flatten(-2).sum(-1).to(kind)


def sample_points(logits: Tensor, masks: Tensor, seeds: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Logits and masks at `points` places of each mask, three quarters of them where the logits are least certain of
    three times as many random ones, the others at random: float[M, H, W] → float[M, P] each.

    seeds: int[M]; what is drawn for a mask does not depend on its batch.  0 points, or as many as pixels: all pixels.
    """
    if not len(logits) or not points or points >= logits.shape[-2:].numel():
        return logits.flatten(1), masks.flatten(1)
    with torch.no_grad():
        candidates = torch.stack([_uniform(seed, 3 * points) for seed in seeds.tolist()]).to(logits.device)
        others = torch.stack([_uniform(seed + 1, points) for seed in seeds.tolist()]).to(logits.device)
        unsure = _at(logits, candidates).abs().topk(int(0.75 * points), largest=False).indices
        chosen = candidates.gather(1, unsure[..., None].expand(-1, -1, 2))
        places = torch.cat([chosen, others[:, : points - chosen.shape[1]]], dim=1)
        gold = _at(masks, places)
    return _at(logits, places), gold


def _uniform(seed: int, count: int) -> Tensor:
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _at(maps: Tensor, places: Tensor) -> Tensor:
    """Values float[M, P] of float[M, H, W] at places float[M, P, 2], (x, y) from -1 to 1 edge to edge."""
    grid = places[:, :, None].to(maps.dtype)  # "border": zeros beyond the edge would be mixed into what lies along it
    return F.grid_sample(maps[:, None], grid, padding_mode="border", align_corners=False)[:, 0, :, 0]


# Numbers


def at_least_float32(kind: torch.dtype) -> torch.dtype:
    return torch.float32 if kind in (torch.float16, torch.bfloat16) else kind


def _compute_type(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


__all__ = ["COUNTED", "COUNTS", "DEFAULT_WEIGHTS", "TERMS", "Head", "head_cross_entropy", "total_loss"]
