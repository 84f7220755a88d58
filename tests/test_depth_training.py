"""Training the depth tokenizer: the curve is the same however often a run is killed and on however many processes."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from warm import Warm, run

from perceptio.data.depths import encode_depth
from perceptio.data.label import load_vqvae
from perceptio.hub.manifest import verify_manifest
from perceptio.vqvae.export import depth_of_codes
from perceptio.vqvae.train import (
    DepthTrainingConfig,
    batch_indices,
    checkpoints,
    learning_rate_share,
    main,
    parse,
)

SETTINGS = {
    "train_count": None, "eval_count": None, "image_size": 24, "grid_size": 3, "num_codes": 8, "code_dim": 4,
    "hidden_size": 32, "num_encoder_layers": 1, "num_decoder_layers": 1, "num_attention_heads": 2, "steps": 60,
    "batch_size": 16, "warmup_steps": 5, "codes_from": 0.2, "log_every": 1, "eval_every": 30, "save_every": 10,
    "learning_rate": 0.005, "precision": "no",
}  # fmt: skip
TIMES = ("seconds",)


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory):
    """Planes and boxes: something that eight codes can learn."""
    folder, rng = tmp_path_factory.mktemp("depth"), np.random.default_rng(0)
    y, x = np.mgrid[:24, :24] / 23
    for number in range(300):
        a, b = rng.uniform(-1, 1, 2)
        plane = a * x + b * y
        plane = (plane - plane.min()) / max(np.ptp(plane), 1e-6) * 0.8
        left, top = rng.integers(0, 16, 2)
        plane[top : top + 8, left : left + 8] = rng.uniform(0.5, 1)
        (folder / f"{number:04d}.png").write_bytes(encode_depth(plane.astype(np.float32)))
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, depth_folder):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    maps = tmp_path_factory.mktemp("maps")
    path.write_text(yaml.safe_dump({**SETTINGS, "source": str(depth_folder), "maps": str(maps)}))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, recipe):
    """A run that nothing interrupts.  Sums over several threads are not the same to the last bit every time."""
    out = tmp_path_factory.mktemp("whole")
    done = run(command(recipe, out), env=on_cpu())
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def curve(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def steps(out: Path) -> list[dict]:
    return [line for line in curve(out) if "eval" not in line]


def command(recipe, out, *more) -> list[str]:
    return ["-m", "perceptio.vqvae.train", "--config", str(recipe), "--out", str(out), *more]


def test_it_learns_and_ends_in_a_tokenizer_that_loads(whole):
    lines = steps(whole)
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert np.mean([line["recon"] for line in lines[-5:]]) < 0.6 * lines[0]["recon"]
    assert "cycle" not in lines[20] and "cycle" in lines[-1] and lines[5]["codes_in_batch"] == 0
    vqvae = load_vqvae(whole / "model")
    assert verify_manifest(whole / "model") == []
    assert vqvae.config.codebook_hash == vqvae.codebook_hash()
    assert (depth_of_codes(vqvae).diff() >= 0).all(), "the codes are numbered from far to near"
    evaluation = json.loads((whole / "model" / "evaluation.json").read_text())
    assert evaluation["usage"] >= 0.5 and evaluation["maps"] > 5
    evaluated = [line for line in curve(whole) if "eval" in line]
    kept = [json.loads(line) for line in (whole / "model" / "curve.jsonl").read_text().splitlines()]
    assert kept == evaluated and [line["step"] for line in kept] == [30, 60]
    assert (whole / "model" / "evaluation.png").stat().st_size > 1000


def test_a_run_that_is_killed_twice_has_the_same_curve_and_the_same_weights(whole, recipe, tmp_path):
    out = tmp_path / "killed"
    for wanted in (15, 40):  # once before there are codes at all, once while the cycle is trained
        process = Warm(command(recipe, out), env=on_cpu())
        while not ((out / "log.jsonl").is_file() and any(line["step"] >= wanted for line in curve_so_far(out))):
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert not (out / "model").exists()
    assert run(command(recipe, out), env=on_cpu()).returncode == 0
    assert curve(out) == curve(whole)
    for name in ("model.safetensors", "config.json", "evaluation.json"):
        assert (out / "model" / name).read_bytes() == (whole / "model" / name).read_bytes(), name


def curve_so_far(out: Path) -> list[dict]:
    found = []
    for line in (out / "log.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # it is being written
            break
    return found


def test_a_cut_state_is_passed_over(whole, recipe, tmp_path):
    out = tmp_path / "cut"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    newest, before = checkpoints(out / "checkpoints")[::-1]
    state = newest / "optimizer.bin"
    state.write_bytes(state.read_bytes()[:-1])
    (out / "checkpoints" / ".step-00000099.incomplete").mkdir()
    assert checkpoints(out / "checkpoints") == [before]
    assert main(["--config", str(recipe), "--out", str(out)]) == 0
    assert curve(out) == curve(whole) and not list((out / "checkpoints").glob(".*"))


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_state(whole, recipe, tmp_path, capsys):
    out = tmp_path / "nan"
    shutil.copytree(whole, out)
    newest, before = checkpoints(out / "checkpoints")[::-1]
    shutil.rmtree(newest)
    weights = load_file(before / "model.safetensors")
    weights["vqvae.decoder.mend2.bias"][:] = float("nan")
    save_file(weights, before / "model.safetensors", metadata={"format": "pt"})
    assert main(["--config", str(recipe), "--out", str(out)]) == 2
    assert "the loss of step 50 is nan, expected a finite one: lower `learning_rate`" in capsys.readouterr().err
    assert checkpoints(out / "checkpoints") == [before]


def test_another_recipe_is_refused_and_where_it_reports_is_not_part_of_it(whole, recipe, capsys):
    assert main(["--config", str(recipe), "--out", str(whole), "--learning_rate", "0.001"]) == 2
    assert "holds a run with `learning_rate` 0.005, expected 0.001" in capsys.readouterr().err
    assert main(["--config", str(recipe), "--out", str(whole), "--save_every", "7"]) == 0


def test_two_processes_have_the_curve_of_one(recipe, tmp_path):
    """To rounding before there are codes; k-means then draws as it likes.  The commitment is left out, because before
    there are codes it is taken on the batch of each process."""
    more = ["--commitment_weight", "0"]
    assert main(["--config", str(recipe), "--out", str(tmp_path / "one"), *more]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, *command(recipe, tmp_path / "two", *more)], capture_output=True, text=True, env=on_cpu()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert len(one) == len(two) == 60
    for a, b in zip(one[:12], two[:12], strict=True):
        assert a["recon"] == pytest.approx(b["recon"], rel=1e-4)
    end = [np.mean([line["recon"] for line in lines[-5:]]) for lines in (one, two)]
    assert end[1] < 1.2 * end[0]
    state = load_file(checkpoints(tmp_path / "two" / "checkpoints")[-1] / "model.safetensors")
    assert state["codebook.inner._codebook.cluster_size"].sum() == pytest.approx(16 * 9, rel=0.02), "of both together"


def on_cpu() -> dict:
    import os

    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def test_every_epoch_goes_through_all_maps_once():
    seen = torch.cat([batch_indices(step, 16, 40, 0) for step in range(10)])
    for epoch in range(4):
        assert seen[epoch * 40 : epoch * 40 + 40].sort().values.tolist() == list(range(40))
    assert seen[:40].tolist() != seen[40:80].tolist()


def test_the_learning_rate_rises_stays_and_falls():
    config = DepthTrainingConfig(out="x", steps=100, warmup_steps=10, cool_from=0.5)
    rates = [learning_rate_share(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[10:51] == [1.0] * 41
    assert all(a >= b for a, b in zip(rates[50:], rates[51:], strict=False)) and rates[-1] == pytest.approx(0.02)


def test_the_command_line_wins_over_the_file(recipe):
    config = parse(["--config", str(recipe), "--out", "x", "--steps", "7"])
    assert config.steps == 7 and config.num_codes == 8 and config.train_count is None


BROKEN = {
    "an unknown field": ({"stepz": 3}, "has no field 'stepz'"),
    "no number": ({"batch_size": 1.5}, "`batch_size` is 1.5, expected a whole number"),
    "out of range": ({"codes_from": 1.0}, "`codes_from` is 1.0"),
    "a grid that does not fit": ({"image_size": 25}, "image_size` is 25, expected a multiple of `grid_size`"),
    "a folder that is not there": ({"source": "/nowhere/at/all"}, "neither manifest.json nor PNG files"),
    "noise that is none": ({"noise": float("nan")}, "`noise` is nan"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_wrong_settings_are_one_line(name, tmp_path, capsys):
    changes, message = BROKEN[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, **changes}))
    assert main(["--config", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]


def test_a_file_that_is_no_recipe(tmp_path, capsys):
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    for name in ("list.yaml", "absent.yaml"):
        assert main(["--config", str(tmp_path / name), "--out", str(tmp_path)]) == 2
        assert name in capsys.readouterr().err
