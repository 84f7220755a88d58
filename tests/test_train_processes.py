"""Two processes do what one does, whatever each of them is given."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file
from toy_training import free_port
from warm import Warm, place

from perceptio.losses_perceptio import TERMS

SCRIPT = Path(__file__).parent / "train_in_processes.py"


# What recipes/accelerate/fsdp2.yaml comes to, in half precision not: accelerate hands it over in the environment.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
}


def run(folder, out: Path, processes: int, **changes) -> tuple[list[dict], dict]:
    """In as many processes, each told its place as torchrun tells it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(FSDP2 if changes.get("sharded") else {})}
    port, words = free_port(), [SCRIPT, folder, out, json.dumps(changes)]
    places = [place(rank, processes, port) for rank in range(processes)] if processes > 1 else [{}]
    started = [Warm(words, env=environment | one) for one in places]
    try:
        for process in started:
            _, errors = process.communicate()
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in started:
            process.kill()
    return json.loads((out / "lines.json").read_text()), load_file(out / "trained.safetensors")


def compare(found, expected, tolerance: float = 1e-4) -> None:
    steps = [[line for line in lines if "loss" in line] for lines, _ in (found, expected)]
    assert len(steps[0]) == len(steps[1])
    for one, two in zip(*steps, strict=True):
        for term in ("loss", "grad_norm", *TERMS, "mask_iou", "code_accuracy", "token_accuracy"):
            assert one.get(term) == pytest.approx(two.get(term), rel=tolerance, abs=1e-6), term
    assert found[1].keys() == expected[1].keys()
    for name, weight in expected[1].items():
        assert (found[1][name] - weight).abs().max() <= tolerance * max(1.0, weight.abs().max()), name


@pytest.mark.parametrize("full", [False, True])
def test_one_two_and_cut_up_are_the_same(tiny_folder, tmp_path, full):
    """A process without any mask or picture in its batch has the same graph as the other: nothing hangs."""
    folder = tiny_folder()
    one = run(folder, tmp_path / "one", 1, per_device_train_batch_size=4, full=full)
    two = run(folder, tmp_path / "two", 2, per_device_train_batch_size=2, full=full)
    compare(two, one)
    if not full:
        parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        compare(run(folder, tmp_path / "cut", 2, **parts), one)
        compare(run(folder, tmp_path / "by length", 2, **parts, train_sampling_strategy="batch_rebalance"), one)


@pytest.mark.parametrize("before, after", [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(tiny_folder, tmp_path, before, after):
    folder = tiny_folder()
    saved = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 0.001}
    whole = run(folder, tmp_path / "whole", before, per_device_train_batch_size=4 // before, **saved)
    for path in (tmp_path / "whole" / "checkpoint-2").iterdir():
        path.unlink()
    rest = run(folder, tmp_path / "whole", after, per_device_train_batch_size=4 // after, resume=True, **saved)
    compare(rest, whole)


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_weights_cut_over_processes_learn_the_same(tiny_folder, tmp_path, full):
    folder = tiny_folder()
    one = run(folder, tmp_path / "one", 1, per_device_train_batch_size=4, full=full)
    saved = {"save_strategy": "steps", "save_steps": 1, "sharded": True, "result": True, "full": full}
    cut = run(folder, tmp_path / "cut", 2, per_device_train_batch_size=2, **saved)
    compare(cut, one)
    ones = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "sharded": True, "full": full}
    compare(run(folder, tmp_path / "ones", 2, **ones), one)  # one process with a picture, the other without
    for path in (tmp_path / "cut" / "checkpoint-2").glob("*.*"):
        path.unlink()
    compare(
        run(folder, tmp_path / "cut", 2, per_device_train_batch_size=2, resume=True, **{**saved, "result": False}), one
    )
    name = "model.safetensors" if full else "adapter_model.safetensors"
    written = load_file(tmp_path / "cut" / "model" / name)
    for key, weight in one[1].items():
        short = key.replace(".default", "").replace(".modules_to_save", "")
        assert (written[short] - weight).abs().max() <= 1e-4 * max(1.0, weight.abs().max()), key
