"""torch's Muon for the matrices of hidden layers and its AdamW for all the rest, as one optimizer.

A matrix's momentum is made orthogonal before it is applied: all its directions are learned at one speed, where AdamW
mostly learns a few.  For training from nothing; in rendered scenes it needs about half of AdamW's steps.
"""

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from .models import is_sharded

HEADS = ("lm_head", "heads")  # last parts of the names of linear layers whose output is a loss's input


class Muon(torch.optim.Optimizer):
    """Parameter groups with `muon: True` hold matrices; one learning rate serves both kinds."""

    def __init__(self, groups: list[dict], lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8):
        matrices, others = ([group for group in groups if group.get("muon", False) is kind] for kind in (True, False))
        self.parts = {}
        if matrices:
            self.parts[True] = torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw")
        if others:
            self.parts[False] = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps)
        super().__init__([group for part in self.parts.values() for group in part.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for kind, part in self.parts.items():  # loading a state puts other objects in place of groups and state
            part.param_groups = [group for group in self.param_groups if group.get("muon", False) is kind]
            part.state = self.state
            part.step()
        return loss


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """What is trained, as matrices, other weights, and weights without decay (vectors).  Of the parametrized
    weights those are matrices that are kept as one."""
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    hidden = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in HEADS
    } - embedded
    kept = [part.original for part in model.modules() if isinstance(part, ParametrizationList) and part.is_tensor]
    hidden |= {id(weight) for weight in kept if weight.ndim == 2}
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
