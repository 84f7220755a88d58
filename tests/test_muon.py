"""Muon beside AdamW: each weight's own step, and a state that goes through a file."""

import copy

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from perceptio.training.muon import Muon, MuonTraining, muon_groups


class Model(nn.Module):
    def __init__(self, tied: bool = True):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.hidden = nn.Linear(8, 16)
        self.back = nn.Linear(16, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.conv = nn.Conv1d(1, 2, 3)
        self.lm_head = nn.Linear(8, 7, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids, labels=None):
        states = self.back(self.hidden(self.embed(ids)).relu())
        states = states + self.conv(states.reshape(-1, 1, 8)).mean()
        logits = self.lm_head(states)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def names_of(model, group) -> set[str]:
    names = {id(weight): name for name, weight in model.named_parameters()}
    return {names[id(weight)] for weight in group["params"]}


def test_only_matrices_of_hidden_layers_are_muons(model):
    matrices, others, vectors = muon_groups(model, 0.1)
    assert names_of(model, matrices) == {"hidden.weight", "back.weight"} and matrices["muon"]
    assert names_of(model, others) == {"embed.weight", "conv.weight"} and others["weight_decay"] == 0.1
    assert names_of(model, vectors) == {"hidden.bias", "back.bias", "conv.bias"} and vectors["weight_decay"] == 0.0


def test_a_weight_that_is_kept_as_a_matrix_is_muons(model):
    class Rows(nn.Module):
        def forward(self, matrix):
            return matrix.unflatten(1, (1, 3))

        def right_inverse(self, weight):
            return weight.flatten(1)

    nn.utils.parametrize.register_parametrization(model.conv, "weight", Rows())
    matrices, others, _ = muon_groups(model, 0.1)
    assert "conv.parametrizations.weight.original" in names_of(model, matrices)
    assert names_of(model, others) == {"embed.weight"}


def test_the_others_take_adamws_step(model):
    """Over several steps; a step on a matrix is as long as AdamW's usual one, in all its directions."""
    twin = copy.deepcopy(model)
    ours = Muon(muon_groups(model, 0.1), lr=1e-2, betas=(0.9, 0.98))
    groups = muon_groups(twin, 0.1)[1:]
    theirs = torch.optim.AdamW([{k: v for k, v in group.items() if k != "muon"} for group in groups], lr=1e-2,
                               betas=(0.9, 0.98))  # fmt: skip
    before = model.hidden.weight.detach().clone()
    for seed in range(3):
        ids = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(seed))
        for one in (model, twin):
            one.zero_grad()
            one(ids, ids)["loss"].backward()
        with torch.no_grad():  # the same gradients, though the matrices go their own way
            for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
                if other.grad is not None:
                    mine.grad.copy_(other.grad)
        ours.step()
        theirs.step()
        if seed == 0:
            decayed = before * (1 - 1e-2 * 0.1)
            moved = model.hidden.weight.detach() - decayed
            assert 0.5 < moved.norm() / (1e-2 * 0.2 * moved.numel() ** 0.5) < 1.5
            sizes = torch.linalg.svdvals(moved)
            assert sizes.median() > 0.4 * sizes.max()  # a few words do not span all of them
    for name, weight in model.named_parameters():
        same = torch.allclose(weight, dict(twin.named_parameters())[name], rtol=1e-5, atol=1e-7)
        assert same or name in ("hidden.weight", "back.weight"), name


def test_a_schedule_that_asks_for_the_first_learning_rate_finds_it(model):
    optimizer = Muon(muon_groups(model, 0.1), lr=1e-2)
    schedule = get_scheduler("polynomial", optimizer, num_warmup_steps=0, num_training_steps=4,
                             scheduler_specific_kwargs={"lr_end": 0.0})  # fmt: skip
    optimizer.step()
    schedule.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.75e-2}


class MuonTrainer(MuonTraining, Trainer):
    pass


def test_a_trainer_goes_on_where_it_stopped(tmp_path, model):
    ids = torch.randint(7, (64, 5), generator=torch.Generator().manual_seed(1))
    rows = [{"ids": row, "labels": row} for row in ids]

    def run(name: str, resume=None, steps: int = 8) -> tuple[dict, MuonTrainer]:
        args = TrainingArguments(str(tmp_path / name), max_steps=steps, per_device_train_batch_size=4, save_steps=4,
                                 learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True,
                                 remove_unused_columns=False, lr_scheduler_type="constant")  # fmt: skip
        args.muon = True
        torch.manual_seed(0)
        trainer = MuonTrainer(Model(tied=False), args, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}, trainer

    whole, trainer = run("whole")
    assert isinstance(trainer.optimizer.optimizer, Muon)
    losses = trainer.model(ids, ids)["loss"], Model()(ids, ids)["loss"]
    assert losses[0] < losses[1]
    again, _ = run("again", resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())
