"""Checkpoints: whole or not there at all, and a run that goes on has the curve of one that was never stopped."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy_training import FILES, STEPS, ToyTrainer, curve, one_thread, start, start_two, toy, wait, wait_for
from transformers import Trainer, TrainerCallback

from perceptio.hub.manifest import verify_manifest, write_manifest
from perceptio.training.checkpoints import check_finite, checkpoints, find_checkpoint, rotate

__all__ = ["one_thread"]  # a fixture of this module too

WIDE = 20_000  # writing takes a time that a kill can hit


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts, saved after every step."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = toy(folder)
    trainer.train()
    return folder, curve(trainer)


@pytest.fixture
def copy(whole, tmp_path):
    """The checkpoints of the steps 5, 6 and 7 of that run."""
    for step in (5, 6, 7):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / "out" / f"checkpoint-{step}")
    return tmp_path / "out"


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(bytes) is a folder on a file system of that size."""
    mounted = []

    def mount(size: int, options: str = "") -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "none", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a file system")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def steps(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in checkpoints(folder)]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".incomplete")]


def test_a_checkpoint_is_whole_and_says_of_what(whole):
    folder = whole[0] / "checkpoint-7"
    assert set(FILES) <= {path.name for path in folder.iterdir()} and verify_manifest(folder) == []
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 7 and manifest["facts"] == ToyTrainer.facts
    assert steps(whole[0]) == list(range(1, STEPS + 1)) and not leftovers(whole[0])
    assert find_checkpoint(whole[0]) == (whole[0] / f"checkpoint-{STEPS}", [])


# Killed


def test_a_run_that_is_killed_again_and_again_has_the_same_curve_and_the_same_weights(tmp_path):
    """Half of the kills come while it writes."""
    options = {"width": WIDE, "max_steps": 2 * STEPS}
    reference = toy(tmp_path / "reference", save_strategy="no", **options)
    reference.train()
    rng, out = random.Random(0), tmp_path / "out"
    for kill in range(6):
        process = start(tmp_path / "log", out, slow=0.02, **options)
        before = len(checkpoints(out)) if out.is_dir() else 0
        if kill % 2:
            wait_for(lambda: leftovers(out), process)
        else:
            wait_for(lambda before=before: out.is_dir() and len(checkpoints(out)) > before, process)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        assert wait(process) == -signal.SIGKILL
        path, skipped = find_checkpoint(out)
        assert not skipped and (path or kill == 0)
    resumed = toy(out, **options)
    resumed.train(resume_from_checkpoint=True)
    assert curve(resumed) == curve(reference)
    for name, tensor in load_file(out / f"checkpoint-{2 * STEPS}" / "model.safetensors").items():
        assert torch.equal(tensor, reference.model.state_dict()[name]), name
    assert not leftovers(out)


def test_what_a_killed_run_was_writing_is_finished_or_removed(copy, whole):
    for step, is_whole in ((6, True), (7, False)):
        outer = copy / f".checkpoint-{step}.incomplete"
        outer.mkdir()
        os.rename(copy / f"checkpoint-{step}", outer / f"checkpoint-{step}")
        if not is_whole:
            (outer / f"checkpoint-{step}" / "manifest.json").unlink()
    trainer = toy(copy, save_strategy="no")
    trainer.train(resume_from_checkpoint=True)
    assert steps(copy) == [5, 6] and not leftovers(copy) and trainer._initial_global_step == 6
    assert curve(trainer) == whole[1]


def test_a_run_that_was_killed_after_its_last_step_does_no_further_one(tmp_path, whole):
    """The stock loop would do one more, where the last step is not the end of an epoch."""
    folder = tmp_path / "out"
    shutil.copytree(whole[0] / f"checkpoint-{STEPS}", folder / f"checkpoint-{STEPS}")
    trainer = toy(folder)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS and curve(trainer) == whole[1]


# Damaged


@pytest.mark.parametrize("name", [*FILES, "training_args.bin"])
@pytest.mark.parametrize("damage", ["removed", "truncated", "zeroed", "one bit"])
def test_a_damaged_file_is_named_and_its_folder_skipped(copy, name, damage):
    path = copy / "checkpoint-7" / name
    content = path.read_bytes()
    changed = {
        "truncated": content[: len(content) // 2],
        "zeroed": bytes(len(content)),
        "one bit": bytes([content[0] ^ 1]) + content[1:],
    }
    path.unlink() if damage == "removed" else path.write_bytes(changed[damage])
    found, [(skipped, reason)] = find_checkpoint(copy)
    assert found == copy / "checkpoint-6" and skipped == copy / "checkpoint-7" and name in reason


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_folder_without_a_part_is_not_whole_whatever_its_manifest_says(copy, name):
    """The stock trainer goes on without optimizer or random numbers, and says nothing."""
    folder = copy / "checkpoint-7"
    (folder / name).unlink()
    write_manifest(folder)
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, "step": 7}))
    found, [(_, reason)] = find_checkpoint(copy)
    assert found == copy / "checkpoint-6" and "missing" in reason and name[:5] in reason
    model_only = name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    assert (find_checkpoint(copy, save_only_model=True)[0] == folder) is model_only


def test_other_folders_that_are_not_whole(copy):
    (copy / "checkpoint-7" / "checkpoint-is-incomplete.txt").touch()  # of the stock trainer's own way to save early
    (copy / "checkpoint-8").mkdir()
    os.rename(copy / "checkpoint-6", copy / "checkpoint-9")
    (copy / "checkpoint-tmp").mkdir()
    found, skipped = find_checkpoint(copy)
    assert found == copy / "checkpoint-5" and [path.name[-1] for path, _ in skipped] == ["9", "8", "7"]


def test_a_resumed_run_names_what_it_skips_and_goes_on_from_the_newest_whole_one(copy, whole, caplog):
    (copy / "checkpoint-7" / "optimizer.pt").unlink()
    (copy / "checkpoint-6" / "model.safetensors").write_bytes(b"")
    for path in checkpoints(copy):  # neither the newest nor the order of time says anything
        os.utime(path, (0, 0))
    trainer = toy(copy)
    trainer.train(resume_from_checkpoint=True)
    lines = [record.getMessage() for record in caplog.records]
    assert sum("is skipped" in line for line in lines) == 2
    assert any("checkpoint-7 is skipped: optimizer.pt" in line for line in lines)
    assert any("goes on from" in line and "checkpoint-5" in line for line in lines)
    assert curve(trainer) == whole[1] and find_checkpoint(copy) == (copy / f"checkpoint-{STEPS}", [])


def test_without_a_whole_checkpoint_it_starts_anew_and_says_so(tmp_path, whole, caplog):
    (tmp_path / "checkpoint-3").mkdir()
    trainer = toy(tmp_path, save_strategy="no")
    trainer.train(resume_from_checkpoint=True)
    assert "starts anew" in caplog.text and curve(trainer) == whole[1]


def test_a_named_checkpoint_must_be_whole(copy):
    (copy / "checkpoint-7" / "scheduler.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint-7 cannot be resumed: scheduler\.pt.*name a whole checkpoint"):
        toy(copy).train(resume_from_checkpoint=str(copy / "checkpoint-7"))
    copied = (copy / "checkpoint-6").rename(copy / "kept")
    write_manifest(copied)
    with pytest.raises(ValueError, match=r"kept cannot be resumed: manifest\.json: is of step None"):
        toy(copy).train(resume_from_checkpoint=str(copied))
    with pytest.raises(ValueError, match="not a folder"):
        toy(copy).train(resume_from_checkpoint=str(copy / "checkpoint-70"))


def test_later_checkpoints_of_another_run_are_named(copy, caplog):
    toy(copy, max_steps=6).train(resume_from_checkpoint=str(copy / "checkpoint-5"))
    assert "holds checkpoint-7 of another run" in caplog.text


# Facts


def test_other_facts_are_refused_by_name_unless_forced(copy, whole, monkeypatch, caplog):
    monkeypatch.setattr(ToyTrainer, "facts", {"learning_rate": 0.05, "codebook": "beef"})
    with pytest.raises(ValueError, match=r"`codebook` 'c0de', but this run has 'beef': .*`resume_anyway`"):
        toy(copy).train(resume_from_checkpoint=True)
    trainer = toy(copy, save_strategy="no", extra={"resume_anyway": True})
    trainer.train(resume_from_checkpoint=True)
    assert "`codebook` 'c0de'" in caplog.text and curve(trainer) == whole[1]


def test_a_fact_that_only_one_of_them_has_is_a_difference(copy, monkeypatch):
    monkeypatch.setattr(ToyTrainer, "facts", {"learning_rate": 0.05})
    with pytest.raises(ValueError, match="`codebook` 'c0de', but this run has None"):
        toy(copy).train(resume_from_checkpoint=True)


# Rotation


def test_rotation_goes_by_step_number_and_not_by_time(tmp_path):
    for step in (2, 10, 9, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
    os.utime(tmp_path / "checkpoint-10", (0, 0))  # the clock was set back
    rotate(tmp_path / "checkpoint-10", None)
    assert steps(tmp_path) == [2, 9, 10, 30]
    rotate(tmp_path / "checkpoint-10", 3, keep=[tmp_path / "checkpoint-2"])
    assert steps(tmp_path) == [2, 9, 10], "what is later than the newest is of another run"
    rotate(tmp_path / "checkpoint-10", 1, keep=[tmp_path / "checkpoint-2"])
    assert steps(tmp_path) == [2, 10]
    rotate(tmp_path / "checkpoint-10", 1)
    assert steps(tmp_path) == [10]


def test_a_run_keeps_as_many_as_it_is_told(copy, whole):
    for path in checkpoints(copy):
        os.utime(path, (4e9, 4e9))
    trainer = toy(copy, save_total_limit=2)
    trainer.train(resume_from_checkpoint=True)
    assert steps(copy) == [STEPS - 1, STEPS] and curve(trainer) == whole[1]


def test_the_best_one_is_kept_under_its_final_name(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss", "evaluate": True}
    trainer = toy(tmp_path, save_total_limit=1, load_best_model_at_end=True, **options)
    seen = []
    trainer.add_callback(Each("on_save", lambda state: seen.append((state.best_model_checkpoint, steps(tmp_path)))))
    trainer.train()
    best = min((entry for entry in trainer.state.log_history if "eval_loss" in entry), key=lambda e: e["eval_loss"])
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best['step']}")
    assert steps(tmp_path) == [best["step"]]
    for step, (path, found) in enumerate(seen, 1):
        assert step in found and int(path.split("-")[-1]) in found and len(found) <= 2
    state = json.loads((tmp_path / f"checkpoint-{best['step']}" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == trainer.state.best_model_checkpoint
    assert state["best_global_step"] == best["step"]


def test_an_interrupted_run_keeps_its_last_checkpoint_beside_the_best(tmp_path):
    """With a limit of one the stock trainer deletes all but the best when it ends."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss", "evaluate": True}
    trainer = toy(tmp_path, save_total_limit=1, load_best_model_at_end=True, greater_is_better=True,
                  learning_rate=0.01, **options)  # fmt: skip
    trainer.add_callback(Each("on_step_end", lambda state: state.global_step == 5 and signal.raise_signal(15)))
    trainer.train()
    assert steps(tmp_path)[-1] == 5 and trainer.state.best_model_checkpoint != str(tmp_path / "checkpoint-5")


def test_the_final_folder_is_what_is_pushed(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self: None)
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append((folder, verify_manifest(folder)))
    )
    toy(tmp_path, max_steps=2, push_to_hub=True).train()
    assert pushed == [(str(tmp_path / f"checkpoint-{step}"), []) for step in (1, 2)]


# Weights that are not finite


class Each(TrainerCallback):
    """Calls a function of the state at an event."""

    def __init__(self, event, function):
        setattr(self, event, lambda args, state, control, **kwargs: (function(state), None)[1])


def test_no_checkpoint_holds_a_weight_that_is_not_finite(tmp_path):
    trainer = toy(tmp_path)

    def spoil(state):
        if state.global_step == 5:
            trainer.model.mask_head.bias.data.fill_(float("inf"))

    trainer.add_callback(Each("on_step_end", spoil))
    with pytest.raises(FloatingPointError, match=r"`mask_head\.bias` holds values that are not finite"):
        trainer.train()
    assert find_checkpoint(tmp_path) == (tmp_path / "checkpoint-4", []) and not leftovers(tmp_path)


def test_saved_buffers_are_looked_at_and_frozen_or_unsaved_tensors_are_not():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.full((2,), -torch.inf), persistent=False)
    model[0].weight.requires_grad_(False).fill_(torch.nan)
    check_finite(model)
    model[1].running_var.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"1\.running_var"):
        check_finite(model)


# Disks and folders


@pytest.mark.parametrize("part", ["weights", "optimizer", "manifest"])
def test_a_full_disk_is_one_sentence_and_the_last_whole_checkpoint_stays(small_disk, part, tmp_path):
    """With a limit of one: the old one goes only after the new one is whole."""
    trainer = toy(tmp_path / "measure", width=WIDE, max_steps=1)
    trainer.train()
    pages = {path.name: -(-path.stat().st_size // 4096) for path in (tmp_path / "measure/checkpoint-1").iterdir()}
    room = {
        "weights": pages["model.safetensors"] // 2,
        "optimizer": pages["model.safetensors"] + pages["optimizer.pt"] // 2,
        "manifest": sum(pages.values()) - pages["manifest.json"],
    }[part]
    disk = small_disk((sum(pages.values()) + room + 1) * 4096)  # one page for the lock
    process = start(tmp_path / "log", disk, width=WIDE, save_total_limit=1)
    assert wait(process) == 2
    message = (tmp_path / "log").read_text().splitlines()[-1]
    assert message.startswith("OSError: ") and f"{disk / 'checkpoint-2'} could not be written" in message
    assert "bytes are free there" in message and "make room" in message and "Traceback" not in message
    assert find_checkpoint(disk) == (disk / "checkpoint-1", []) and not leftovers(disk)


def test_a_file_that_may_not_grow_is_one_sentence_too(tmp_path):
    for size in (200_000, 900_000):  # less than the weights, and less than the optimizer
        process = start(tmp_path / "log", tmp_path / "out", width=WIDE, file_limit=size)
        assert wait(process) == 2
        assert "OSError" in (tmp_path / "log").read_text() and find_checkpoint(tmp_path / "out") == (None, [])
    assert not leftovers(tmp_path / "out")


def test_an_output_folder_that_cannot_be_written_is_an_error_before_the_first_step(tmp_path, small_disk):
    (tmp_path / "file").write_text("here")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"cannot be written \(.*\), expected a folder .*: name another"):
            toy(path)
    with pytest.raises(OSError, match="Read-only file system"):
        toy(small_disk(1 << 20, ",ro"))


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="Permission denied"):
        toy(tmp_path)
    tmp_path.chmod(0o700)


def test_a_second_run_in_the_same_folder_refuses_and_a_killed_one_leaves_no_lock(tmp_path):
    first = start(tmp_path / "log", tmp_path / "out", slow=0.5)
    wait_for(lambda: (tmp_path / "out/checkpoint-1").exists(), first)
    with pytest.raises(OSError, match=f"in use by the run with the process number {first.pid}: wait"):
        toy(tmp_path / "out").train(resume_from_checkpoint=True)
    first.kill()
    wait(first)
    toy(tmp_path / "out", max_steps=2).train(resume_from_checkpoint=True)
    assert 2 in steps(tmp_path / "out")


# Signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_its_code(tmp_path, whole, number, code):
    out = tmp_path / "out"
    process = start(tmp_path / "log", out, slow=0.1, save_strategy="no")
    wait_for(lambda: (tmp_path / "log").exists() and "'loss'" in (tmp_path / "log").read_text(), process)
    os.kill(process.pid, number)
    assert wait(process) == code
    path, skipped = find_checkpoint(out)
    assert path and not skipped and not leftovers(out) and 0 < int(path.name.split("-")[1]) < STEPS
    trainer = toy(out, save_strategy="no")
    trainer.train(resume_from_checkpoint=True)
    assert curve(trainer) == whole[1] and trainer.interrupted is None


def test_a_second_signal_ends_it_at_once_and_nothing_half_is_taken_for_whole(tmp_path):
    out = tmp_path / "out"
    process = start(tmp_path / "log", out, slow=1.0)
    wait_for(lambda: (out / "checkpoint-1").exists(), process)
    process.terminate()
    time.sleep(0.1)
    process.terminate()
    assert wait(process) == -signal.SIGTERM
    assert find_checkpoint(out) == (out / "checkpoint-1", [])


def test_handlers_are_put_back_and_other_threads_need_none(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    seen = []
    trainer = toy(tmp_path, max_steps=1, callbacks=[Each("on_step_end", lambda _: seen.append(signal.getsignal(15)))])
    trainer.train()
    assert seen[0] != before[0] and (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    thread = threading.Thread(target=lambda: seen.append(toy(tmp_path, max_steps=1).train().global_step))
    thread.start()
    thread.join()
    assert seen[-1] == 1


# Two processes


def test_two_processes_stop_together_and_go_on_together(tmp_path):
    options = {"max_steps": 6, "ddp_find_unused_parameters": False}
    for process in start_two(tmp_path / "log", tmp_path / "reference", **options):
        assert wait(process) == 0
    out = tmp_path / "out"
    processes = start_two(tmp_path / "log", out, slow=0.1, **options)
    wait_for(lambda: (out / "checkpoint-2").exists(), processes[0])
    processes[1].terminate()  # only one of them is told
    assert [wait(process) for process in processes] == [75, 75]
    path, skipped = find_checkpoint(out)
    assert not skipped and {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in path.iterdir()}
    for process in start_two(tmp_path / "log", out, **options):
        assert wait(process) == 0
    assert curve(out / "checkpoint-6") == curve(tmp_path / "reference" / "checkpoint-6")


def test_when_one_of_two_dies_or_cannot_write_the_other_ends_too(tmp_path):
    processes = start_two(tmp_path / "log", tmp_path / "dies", slow=0.1)
    wait_for(lambda: (tmp_path / "dies/checkpoint-2").exists(), processes[0])
    processes[1].kill()
    assert wait(processes[0], 20) not in (0, None)
    path, skipped = find_checkpoint(tmp_path / "dies")
    assert path and not skipped

    processes = start_two(tmp_path / "log", tmp_path / "full")
    wait_for(lambda: (tmp_path / "full/checkpoint-2").exists(), processes[0])
    resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (4096, 4096))  # its random numbers take more
    assert [wait(process) for process in processes] == [2, 2]
    assert "OSError" in (tmp_path / "log.0").read_text() and not leftovers(tmp_path / "full")
    path, skipped = find_checkpoint(tmp_path / "full")
    assert path and not skipped
