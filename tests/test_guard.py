"""A step that is not finite is left out, said and counted; a tracker that fails is no reason to stop."""

import json
import math

import pytest
import torch
from toy_training import STEPS, StockTrainer, ToyData, ToyTrainer, curve, one_thread, start, start_two, toy, wait
from transformers import TrainerCallback
from transformers.integrations import WandbCallback

from perceptio.training.checkpoints import check_finite, checkpoints, find_checkpoint
from perceptio.training.guard import GuardedSteps, module_names

__all__ = ["one_thread"]  # a fixture of this module too


def bad_steps(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "bad_steps.jsonl").read_text().splitlines()]


class Snapshots(TrainerCallback):
    """Weights and the optimizer's state after each step."""

    def __init__(self):
        self.taken = []

    def on_train_begin(self, *args, **kwargs):
        self.on_step_end(*args, **kwargs)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        moments = [value.clone() for values in optimizer.state_dict()["state"].values() for value in values.values()]
        self.taken.append([*weights.values(), *moments])


def test_one_bad_sample_in_64_changes_nothing_and_is_named(tmp_path, caplog):
    """The stock trainer goes on with weights that are NaN, and logs a loss of 0."""
    snapshots = Snapshots()
    trainer = toy(tmp_path, data=ToyData(pixels={20: math.nan}), max_steps=40, callbacks=[snapshots])
    output = trainer.train()
    found = bad_steps(tmp_path)
    assert found and all("sample-20" in entry["samples"] and len(entry["samples"]) == 4 for entry in found)
    assert found[0]["modules"] == ["body.0", "mask_head", "text_head"] and found[0]["loss"] == "nan"
    for entry in found:
        before, after = snapshots.taken[entry["step"] - 1 : entry["step"] + 1]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        assert f"step {entry['step']} is left out: loss nan" in caplog.text
    assert "samples: sample-" in caplog.text
    check_finite(trainer.model)
    assert len(checkpoints(tmp_path)) == 40

    entries = curve(trainer)
    bad = {entry["step"] for entry in found}
    assert {entry["step"] for entry in entries if not math.isfinite(entry["loss"])} == bad
    assert entries[-1]["bad_steps"] == trainer.bad_steps == len(bad)
    good = [entry["loss"] for entry in entries if entry["step"] not in bad]
    assert output.training_loss == pytest.approx(sum(good) / len(good), rel=1e-6)
    assert not trainer.args.logging_nan_inf_filter


def test_without_bad_steps_the_guard_changes_nothing(tmp_path):
    class Guarded(GuardedSteps, StockTrainer):
        pass

    stock, guarded = (toy(tmp_path, kind=kind, save_strategy="no") for kind in (StockTrainer, Guarded))
    losses = []
    for run in (stock, guarded):
        torch.manual_seed(11)
        losses.append(run.train().training_loss)
    assert losses[0] == losses[1]
    stock, guarded = curve(stock), curve(guarded)
    assert [{**entry, "bad_steps": 0} for entry in stock] == guarded


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_an_infinite_gradient_of_one_head_is_named_as_its(tmp_path, max_grad_norm):
    """Clipping spreads what is not finite over all gradients; the names come from before."""
    data = ToyData(faults={20: math.inf})
    trainer = toy(tmp_path, data=data, max_steps=16, max_grad_norm=max_grad_norm, save_strategy="no")
    trainer.train()
    [entry] = bad_steps(tmp_path)
    assert entry["modules"] == ["mask_head"] and "sample-20" in entry["samples"]
    check_finite(trainer.model)


def test_an_overflow_of_half_precision_is_left_to_the_scaler_until_its_scale_is_one(tmp_path, monkeypatch):
    """It looks for its scale by trying too large ones, perhaps more in a row than the guard allows."""

    def run(name, **options):
        trainer = toy(tmp_path / name, save_strategy="no", **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
        monkeypatch.setattr(trainer.accelerator, "native_amp", True)
        monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "fp16")
        before = trainer.model.text_head.weight.detach().clone()
        trainer.train()
        check_finite(trainer.model)
        assert not torch.equal(before, trainer.model.text_head.weight)
        return trainer, scaler

    trainer, scaler = run("overflow", extra={"max_bad_steps": 1})
    assert trainer.bad_steps == 0 and 1 < scaler.get_scale() < 2.0**126
    trainer, _ = run("bad", data=ToyData(pixels={20: math.nan}), max_steps=16)
    assert trainer.bad_steps == 1


class LossOnly(ToyTrainer):
    """A loss that is NaN at the fourth step without a path to any gradient."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss + (math.nan if self.state.global_step == 3 and self.args.process_index == 0 else 0)


def test_a_loss_without_a_way_to_any_gradient_is_seen_too(tmp_path):
    snapshots = Snapshots()
    toy(tmp_path, kind=LossOnly, callbacks=[snapshots], save_strategy="no").train()
    [entry] = bad_steps(tmp_path)
    assert entry["step"] == 4 and entry["modules"] == [] and entry["grad_norm"] != "nan"
    assert all(torch.equal(*pair) for pair in zip(*snapshots.taken[3:5], strict=True))


def test_an_accumulated_step_is_left_out_as_a_whole(tmp_path):
    data = ToyData(pixels={20: math.inf})
    trainer = toy(tmp_path, data=data, gradient_accumulation_steps=3, logging_steps=2, save_strategy="no")
    trainer.train()
    found = bad_steps(tmp_path)
    assert found and all(len(set(entry["samples"])) in (12, 4) for entry in found)  # the last of an epoch is short
    assert trainer.bad_steps == len(found) and math.isfinite(curve(trainer)[-1]["loss"])
    assert sum(not math.isfinite(entry["loss"]) for entry in curve(trainer)) >= 1


def test_too_many_in_a_row_stop_the_run_and_the_last_checkpoint_is_good(tmp_path):
    class Spoiled(ToyTrainer):
        def compute_loss(self, *args, **kwargs):
            good = self.state.global_step < 4 or self.state.global_step == 6
            return super().compute_loss(*args, **kwargs) * (1 if good else math.nan)

    trainer = toy(tmp_path, kind=Spoiled, extra={"max_bad_steps": 3})
    with pytest.raises(FloatingPointError, match=r"3 steps in a row, up to step 10, .* expected fewer than 3: look"):
        trainer.train()
    assert [entry["step"] for entry in bad_steps(tmp_path)] == [5, 6, 8, 9, 10], "a good step begins the count anew"
    assert find_checkpoint(tmp_path) == (tmp_path / "checkpoint-9", [])
    assert trainer.bad_steps == 5


def test_a_killed_run_remembers_its_bad_steps(tmp_path):
    data = ToyData(pixels=dict.fromkeys((3, 20, 33, 50), math.nan))
    whole = toy(tmp_path / "whole", data=data)
    whole.train()
    assert 0 < whole.bad_steps < STEPS
    early = toy(tmp_path / "out", data=data, save_steps=4)
    early.add_callback(Stop(at=7))
    with pytest.raises(KeyError):
        early.train()
    resumed = toy(tmp_path / "out", data=data)
    resumed.train(resume_from_checkpoint=True)
    one, other = (json.dumps(curve(run), sort_keys=True) for run in (resumed, whole))
    assert one == other  # as text, because NaN is not equal to itself
    assert bad_steps(tmp_path / "out") == bad_steps(tmp_path / "whole")


class Stop(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyError("stopped")


def test_names_of_modules():
    heads = ["module.model.mask_decoder.mlp.0.weight", "module.model.mask_decoder.mlp.2.bias", "lm_head.weight"]
    assert module_names(heads) == ["lm_head", "model.mask_decoder.mlp"]
    assert module_names(["base_model.model.model.vision.layers.3.q.lora_A.default.weight"]) == [
        "model.vision.layers.3.q.lora_A.default"
    ]
    assert module_names(["scale"]) == ["scale"]


# Trackers and memory


class BrokenTracker(WandbCallback):
    """A tracker whose service is gone at the third log."""

    def __init__(self):
        self.calls = []

    def setup(self, *args, **kwargs):
        pass

    def on_train_begin(self, *args, **kwargs):
        self.calls.append("begin")

    def on_log(self, args, state, control, **kwargs):
        self.calls.append(state.global_step)
        if state.global_step == 3:
            raise ConnectionError("no route\nto the tracker")

    def on_train_end(self, *args, **kwargs):
        self.calls.append("end")


def test_a_tracker_that_fails_is_dropped_and_training_goes_on(tmp_path, caplog):
    tracker, reference = BrokenTracker(), toy(tmp_path, save_strategy="no")
    reference.train()
    trainer = toy(tmp_path, save_strategy="no", callbacks=[tracker])
    order = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    trainer.train()
    assert tracker.calls == ["begin", 1, 2, 3] and curve(trainer) == curve(reference)
    assert [type(callback).__name__ for callback in trainer.callback_handler.callbacks] == [
        name for name in order if name != "BrokenTracker"
    ]
    warnings = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert warnings == [
        "BrokenTracker failed (ConnectionError: no route to the tracker) and is dropped: training goes on without it"
    ]


def test_other_callbacks_may_stop_the_run(tmp_path):
    class Own(TrainerCallback):
        def on_log(self, *args, **kwargs):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        toy(tmp_path, save_strategy="no", callbacks=[Own()]).train()


class Hungry(ToyTrainer):
    """Runs out of memory with more than two samples."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if len(inputs["x"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_out_of_memory_says_what_the_batch_was_and_what_to_change(tmp_path):
    trainer = toy(tmp_path, kind=Hungry, save_strategy="no")
    with pytest.raises(
        RuntimeError, match="step 1 ran out of memory on cpu with a batch of 4 samples: lower"
    ) as caught:
        trainer.train()
    for remedy in ("gradient_accumulation_steps", "gradient_checkpointing", "max_length"):
        assert remedy in str(caught.value)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    inputs = {"input_ids": torch.zeros(2, 4096, dtype=torch.long)}
    assert "2 sequences of 4096 tokens" in trainer._explain_memory(inputs)
    assert toy(tmp_path, kind=Hungry, per_device_train_batch_size=2, save_strategy="no").train().global_step == STEPS


def test_an_allocator_that_really_fails(tmp_path):
    class Greedy(ToyTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) + torch.empty(1 << 60).sum()

    with pytest.raises(RuntimeError, match="step 1 ran out of memory on cpu"):
        toy(tmp_path, kind=Greedy, save_strategy="no").train()


def test_other_errors_pass_as_they_are(tmp_path):
    class Wrong(ToyTrainer):
        def compute_loss(self, *args, **kwargs):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="^mat1 and mat2"):
        toy(tmp_path, kind=Wrong, save_strategy="no").train()


# Two processes


def test_two_processes_leave_out_the_same_steps(tmp_path):
    """One has a sample that is NaN, one has a loss that is NaN by itself."""
    options = {"max_steps": 8, "ddp_find_unused_parameters": False, "kind": LossOnly, "faults": {21: math.nan}}
    for process in start_two(tmp_path / "log", tmp_path / "out", **options):
        assert wait(process) == 0
    found = bad_steps(tmp_path / "out")
    assert 4 in [entry["step"] for entry in found] and all(len(entry["samples"]) == 8 for entry in found)
    spoiled = [entry for entry in found if "sample-21" in entry["samples"]]
    assert len(spoiled) == 1 and spoiled[0]["modules"] == ["mask_head"]
    weights = [torch.tensor(json.loads(path.read_text())) for path in sorted((tmp_path / "out").glob("weights-*"))]
    assert len(weights) == 2 and torch.equal(*weights) and weights[0].isfinite().all()


def test_a_run_that_cannot_go_on_ends_with_a_code_and_a_sentence(tmp_path):
    process = start(tmp_path / "log", tmp_path / "out", pixels=dict.fromkeys(range(64), math.nan))
    assert wait(process) == 2
    assert "FloatingPointError: 5 steps in a row, up to step 5" in (tmp_path / "log").read_text()
    path, skipped = find_checkpoint(tmp_path / "out")
    assert path.name == "checkpoint-4" and not skipped
