"""Muon for the matrices of hidden layers and AdamW for all the rest, as one optimizer.

A matrix's momentum is made orthogonal before it is applied: all its directions are learned at one speed, where AdamW
mostly learns a few.  For training from nothing; in rendered scenes it needs about half of AdamW's steps.
"""

import torch
from torch import Tensor, nn

from .models import is_sharded

HEADS = ("lm_head", "heads")  # last parts of the names of linear layers whose output is a loss's input
MOMENTUM, ROUNDS = 0.95, 5
QUINTIC = (3.4445, -4.7750, 2.0315)  # drives singular values to about 1 in five rounds, from anywhere in (0, 1]
MATCHING = 0.2  # the root mean square of AdamW's steps, so that one learning rate serves both


class Muon(torch.optim.Optimizer):
    """Parameter groups with `muon: True` hold matrices; the others take AdamW's step."""

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "muon": False})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    (self._turn if group["muon"] else self._adapt)(weight, group)
        return loss

    def _turn(self, weight: Tensor, group: dict) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
        direction = orthogonal(weight.grad.lerp(state["momentum"], MOMENTUM))
        weight.add_(direction, alpha=-group["lr"] * MATCHING * max(weight.shape) ** 0.5)

    def _adapt(self, weight: Tensor, group: dict) -> None:
        state, (first, second) = self.state[weight], group["betas"]
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(weight), "square": torch.zeros_like(weight)}
        state["step"] += 1
        state["mean"].lerp_(weight.grad, 1 - first)
        state["square"].mul_(second).addcmul_(weight.grad, weight.grad, value=1 - second)
        size = (state["square"] / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        weight.addcdiv_(state["mean"], size, value=-group["lr"] / (1 - first ** state["step"]))


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with its singular values near 1, in bfloat16's precision."""
    a, b, c = QUINTIC
    found = matrix.bfloat16()
    turned = found.shape[0] > found.shape[1]
    found = found.T if turned else found
    found = found / (found.norm() + 1e-7)
    for _ in range(ROUNDS):
        square = found @ found.T
        found = a * found + (b * square + c * square @ square) @ found
    return (found.T if turned else found).to(matrix.dtype)


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """What is trained, as matrices, other weights, and weights without decay (vectors)."""
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    hidden = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in HEADS
    } - embedded
    groups: list[dict] = [
        {"params": [], "muon": True, "weight_decay": weight_decay},
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for weight in model.parameters():
        if weight.requires_grad:
            groups[0 if id(weight) in hidden else 1 if weight.ndim > 1 else 2]["params"].append(weight)
    return [group for group in groups if group["params"]]


class MuonTraining:
    """A mixin for trainers: `class MyTrainer(MuonTraining, Trainer)`; takes Muon where `args.muon` is set."""

    def create_optimizer(self, model=None):
        if self.optimizer is None and self.args.muon:
            args = self.args
            if is_sharded(args):
                raise ValueError("`muon` is set, but it needs whole matrices, and these are cut over several devices")
            self.optimizer = Muon(
                muon_groups(self.model if model is None else model, args.weight_decay),
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
            )
        return super().create_optimizer(model)
