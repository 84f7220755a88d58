"""`train_sft.py` as people run it: stopped, killed, taken up again, and what is left behind loads elsewhere."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from training_samples import records, trainer_of
from transformers.integrations import TensorBoardCallback
from warm import Warm, run

from perceptio.data.shards import write_shards
from perceptio.training.checkpoints import checkpoints

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    found = records(8)
    write_shards(found[:6], folder, split="train")
    write_shards([{**record, "split": "validation"} for record in found[6:]], folder, split="validation")
    return folder


def command(model, data, out, *more: str) -> list[str]:
    settings = {"model": model, "data": data, "output_dir": out, "lora_r": 4, "lora_dropout": 0.2, "save_steps": 1,
                "logging_steps": 1, "report_to": "none", "per_device_train_batch_size": 1, "max_steps": 40,
                "gradient_checkpointing": False, "mask_points": 40, "learning_rate": "1e-2", "panels": 1}  # fmt: skip
    flags = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    return [str(ROOT / "train_sft.py"), *flags, *more]


def start(*arguments) -> Warm:
    return Warm(command(*arguments), env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(out: Path, step: int, process: Warm) -> None:
    while not any(path.name == f"checkpoint-{step}" for path in checkpoints(out)):
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.02)


def curve(out: Path, steps: int) -> list[tuple]:
    state = json.loads((out / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in state["log_history"] if "loss" in line]


def test_stopped_killed_and_taken_up_again(tiny_folder, shards, tmp_path):
    model, out = tiny_folder(), tmp_path / "run"
    process = start(model, shards, out, "--dataloader_num_workers", "1")
    wait_for(out, 4, process)
    for one in (*psutil.Process(process.pid).children(), process):  # as a scheduler does
        one.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 75, errors[-2000:]
    process = start(model, shards, out)
    _, errors = process.communicate()
    assert process.returncode == 2 and "--resume" in errors.strip().splitlines()[-1]
    process = start(model, shards, out, "--resume")
    wait_for(out, 12, process)
    process.kill()
    process.communicate()
    process = start(model, shards, out, "--resume", "--eval_data", str(shards))
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]
    assert "eval_scenes_mask_iou" in output and f"wrote {out / 'model'}" in output
    whole = start(model, shards, tmp_path / "whole")
    assert whole.wait() == 0
    assert curve(out, 40) == curve(tmp_path / "whole", 40) and len(curve(out, 40)) == 40
    ends = [load_file(folder / "model" / "adapter_model.safetensors") for folder in (out, tmp_path / "whole")]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    scores = json.loads((out / "scores.json").read_text())
    assert scores["after"]["eval_scenes_loss"] != scores["before"]["eval_scenes_loss"]
    assert list((out / "panels").glob("eval_scenes-step-*.png"))


@pytest.mark.parametrize("how", ["adapter", "merged", "full"])
def test_what_is_left_behind_loads_in_a_fresh_process(tiny_folder, shards, tmp_path, how):
    from perceptio.training.result import save_result

    model = tiny_folder()
    trainer = trainer_of(model, records(2), tmp_path / "run", max_steps=1, learning_rate=0.05, full=how == "full")
    trainer.train()
    folder = save_result(trainer, merge=how == "merged")
    program = f"""
import json
from perceptio.pipeline_perceptio import PerceptioPipeline
from transformers import pipeline

see = pipeline("perceptio", model={str(folder)!r}, pipeline_class=PerceptioPipeline)
found = see(image={str(ROOT / "assets" / "cups.jpg")!r}, text="Which?", perception="seg+depth", max_new_tokens=20)
print(json.dumps(dict(codes=found["depth_codes"], score=found["score"], untrained=see.model.config.untrained)))
"""
    done = run(["-c", program], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    live = trainer.model.get_base_model() if how != "full" else trainer.model
    from perceptio.pipeline_perceptio import PerceptioPipeline

    pipe = PerceptioPipeline(model=live.eval(), processor=trainer.processing_class)
    expected = pipe(image=str(ROOT / "assets" / "cups.jpg"), text="Which?", perception="seg+depth", max_new_tokens=20)
    assert said["codes"] == expected["depth_codes"] and said["untrained"] is False
    assert said["score"] == pytest.approx(expected["score"], abs=1e-4)
    assert not list(folder.glob("*.bin")) and (folder / "manifest.json").is_file()


def test_a_step_that_is_not_finite_changes_nothing(tiny_folder, tmp_path):
    trainer = trainer_of(tiny_folder(), records(3), tmp_path, max_steps=3, per_device_train_batch_size=1,
                         save_strategy="steps", save_steps=1, learning_rate=0.01, warmup_steps=0)  # fmt: skip
    weight = next(p for n, p in trainer.model.named_parameters() if "mask_decoder" in n and p.requires_grad)
    seen = []

    def spoil(gradient):
        seen.append(weight.detach().clone())
        return gradient * float("nan") if len(seen) == 2 else gradient

    weight.register_hook(spoil)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["bad_steps"] for line in lines] == [0, 1, 1] and trainer.bad_steps == 1
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[0], seen[1])
    listed = json.loads((tmp_path / "bad_steps.jsonl").read_text())
    assert (
        listed["step"] == 2 and listed["samples"] == [records(3)[1]["id"]] and "mask_decoder" in str(listed["modules"])
    )
    for path in checkpoints(tmp_path):
        found = load_file(path / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in found.values() if tensor.is_floating_point())


def test_predictions_reach_the_tracker(tiny_folder, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = records(3)
    changes = {"max_steps": 1, "report_to": "tensorboard", "panels": 2}
    trainer = trainer_of(tiny_folder(), rows, tmp_path / "run", held_out=Dataset.from_list(rows), **changes)
    trainer.train()
    trainer.evaluate()
    tracker = next(one for one in trainer.callback_handler.callbacks if isinstance(one, TensorBoardCallback))
    tracker.tb_writer.flush()  # it writes behind our back
    folder = next((tmp_path / "run").rglob("events.out.tfevents*")).parent
    events = accumulator.EventAccumulator(str(folder)).Reload()
    assert {"panels/eval/0", "panels/eval/1"} <= set(events.Tags()["images"])
    assert {"train/seg_dice_loss", "eval/mask_iou"} <= set(events.Tags()["scalars"])
    drawn = Image.open(tmp_path / "run" / "panels" / "eval-step-00000001-0.png")
    assert drawn.width > 300 and len(drawn.getcolors(1 << 24)) > 100
