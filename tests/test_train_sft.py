"""The trainer: which weight moves what, whatever the batch is cut into, and what wrong input says."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_samples import absent, build, gradients, masked, plain, records, text_only, trainer_of

from perceptio.data.shards import write_shards
from perceptio.losses_perceptio import TERMS
from perceptio.train_sft import PerceptioSFTConfig, main, parse
from perceptio.training.data import RunData
from perceptio.training.models import load_model

ROOT = Path(__file__).parent.parent
PARTS = {
    "LoRA": "lora_",
    "rows": "trainable_tokens_delta",
    "projector": "multi_modal_projector",
    "seg projector": "seg_projector",
    "mask decoder": "mask_decoder",
}
LANGUAGE = {"LoRA", "rows", "projector"}
WEIGHTS = [f"{term.removesuffix('_loss')}_weight" for term in TERMS]


@pytest.fixture(scope="module")
def rows():
    return records(8)


def only(name: str) -> dict:
    return {weight: float(weight == name) for weight in WEIGHTS}


def moved(found: dict[str, torch.Tensor]) -> set[str]:
    return {part for part, word in PARTS.items() if any(word in n and g.abs().max() > 0 for n, g in found.items())}


def same(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1e-3, gradient.abs().max().item())
        assert (found[name] - gradient).abs().max().item() <= tolerance * scale, name


def flip_lora(trainer) -> None:
    """LoRA starts with B = 0, where A has no gradient."""
    torch.manual_seed(1)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.02)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_weight_moves_exactly_its_parameters(tiny_folder, rows, tmp_path, weight):
    trainer = trainer_of(tiny_folder(), rows, tmp_path, **only(weight))
    flip_lora(trainer)
    expected = set(PARTS) if weight.startswith("seg") else LANGUAGE
    if weight == "seg_place_weight":  # which asks for the prompt alone
        expected -= {"mask decoder"}
    assert moved(gradients(trainer, [rows[:2]])) == expected
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert all(any(word in name for word in PARTS.values()) for name in trained)


def test_without_weights_nothing_moves(tiny_folder, rows, tmp_path):
    trainer = trainer_of(tiny_folder(), rows, tmp_path, **dict.fromkeys(WEIGHTS, 0.0))
    found = gradients(trainer, [rows[:2]])
    assert moved(found) == set() and set(found) == {n for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_twice_the_weight_is_twice_the_gradient(tiny_folder, rows, tmp_path):
    once = gradients(trainer_of(tiny_folder(), rows, tmp_path / "1", **only("seg_dice_weight")), [rows[:2]])
    changes = {**only("seg_dice_weight"), "seg_dice_weight": 2.0}
    same(
        gradients(trainer_of(tiny_folder(), rows, tmp_path / "2", **changes), [rows[:2]]),
        {n: 2 * g for n, g in once.items()},
    )


@pytest.mark.parametrize("full", [False, True])
def test_what_a_step_is_cut_into_changes_nothing(tiny_folder, rows, tmp_path, full):
    mixed = [rows[0], plain(rows[1]), masked(rows[2]), text_only(), absent(rows[3]), rows[4], plain(rows[5]), rows[6]]
    trainer = trainer_of(tiny_folder(), rows, tmp_path, full=full)
    whole = gradients(trainer, [mixed])
    same(gradients(trainer, [[row] for row in mixed]), whole)
    same(gradients(trainer, [mixed[:3], mixed[3:]]), whole)
    same(gradients(trainer, [mixed[::-1]]), whole)


def test_sampled_points_do_not_depend_on_the_batch(tiny_folder, rows, tmp_path):
    trainer = trainer_of(tiny_folder(), rows, tmp_path, mask_points=40)
    same(gradients(trainer, [[row] for row in rows[:4]]), gradients(trainer, [rows[:4]]))


def test_a_record_without_a_modality_adds_nothing_to_it(tiny_folder, rows, tmp_path):
    for weight in (name for name in WEIGHTS if name.startswith(("seg", "depth"))):
        trainer = trainer_of(tiny_folder(), rows, tmp_path / weight, **only(weight))
        same(gradients(trainer, [[rows[0], plain(rows[1])]]), gradients(trainer, [[rows[0]]]))
        none = gradients(trainer, [[plain(rows[1]), text_only()]])
        assert none and all(gradient.abs().max() == 0 for gradient in none.values()), weight


def test_the_log_holds_every_term_and_the_loss_is_their_sum(tiny_folder, rows, tmp_path):
    trainer = trainer_of(tiny_folder(), rows, tmp_path, max_steps=2, per_device_train_batch_size=4)
    trainer.train()
    for line in trainer.state.log_history[:2]:
        total = sum(trainer.args.loss_weights[term] * line[term] for term in TERMS)
        assert line["loss"] == pytest.approx(total, rel=1e-4)
        assert {"token_accuracy", "code_accuracy", "mask_iou", "span_validity", "span_token_accuracy"} <= set(line)


def test_evaluation_does_not_depend_on_its_batches(tiny_folder, rows, tmp_path):
    from datasets import Dataset

    found = []
    for size in (1, 3):
        trainer = trainer_of(tiny_folder(), rows, tmp_path / str(size), per_device_eval_batch_size=size)
        mixed = Dataset.from_list([rows[0], plain(rows[1]), masked(rows[2]), absent(rows[3])])
        found.append(trainer.evaluate(mixed))
    for term in (*TERMS, "loss", "mask_iou", "code_accuracy", "answer_accuracy"):
        assert found[0][f"eval_{term}"] == pytest.approx(found[1][f"eval_{term}"], rel=1e-4, abs=1e-6), term


def test_records_are_shared_out_by_their_lengths(tiny_folder, rows, tmp_path):
    mixed = [text_only("a"), rows[0], rows[1], text_only("b"), rows[2], plain(rows[3]), plain(rows[4]), rows[5]]
    step = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    read, steps = {}, {}
    for kind in ("sequential", "batch_rebalance", "group_by_length"):
        trainer = trainer_of(tiny_folder(), mixed, tmp_path / kind, train_sampling_strategy=kind, **step)
        batches = list(trainer.get_train_dataloader())
        read[kind] = sum(batch["input_ids"].numel() for batch in batches)
        names = [batch["sample_ids"] for batch in batches]
        steps[kind] = [set(one + two) for one, two in zip(names[::2], names[1::2], strict=True)]
    assert steps["batch_rebalance"] == steps["sequential"] and read["batch_rebalance"] < read["sequential"]
    assert set.union(*steps["group_by_length"]) == {row["id"] for row in mixed}
    assert read["group_by_length"] < read["sequential"]
    torch.manual_seed(8)
    assert [batch["sample_ids"] for batch in trainer.get_train_dataloader()] == names


def curve(trainer) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("kind", [{"lora_dropout": 0.3}, {"full": True, "muon": True}], ids=["LoRA", "Muon"])
def test_a_run_that_goes_on_has_the_same_curve(tiny_folder, rows, tmp_path, kind):
    """Dropout and sampled points included."""
    recipe = {"max_steps": 6, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 3,
              "mask_points": 40, "learning_rate": 1e-2, **kind}  # fmt: skip
    whole = trainer_of(tiny_folder(), rows, tmp_path / "whole", **recipe)
    whole.train()
    first = trainer_of(tiny_folder(), rows, tmp_path / "cut", **recipe)
    first.train()
    for late in ("checkpoint-6",):
        for path in sorted((tmp_path / "cut" / late).iterdir()):
            path.unlink()
    second = trainer_of(tiny_folder(), rows, tmp_path / "cut", **recipe)
    torch.manual_seed(99)
    second.train(resume_from_checkpoint=True)
    assert curve(second) == curve(whole) and len(curve(whole)) == 6
    for (name, expected), (_, found) in zip(
        whole.model.named_parameters(), second.model.named_parameters(), strict=True
    ):
        assert torch.equal(found, expected), name


def test_another_recipe_does_not_go_on(tiny_folder, rows, tmp_path):
    recipe = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer_of(tiny_folder(), rows, tmp_path, **recipe).train()
    with pytest.raises(ValueError, match="seg_dice"):
        trainer_of(tiny_folder(), rows, tmp_path, **recipe, seg_dice_weight=0.7).train(resume_from_checkpoint=True)


def test_a_record_that_cannot_be_used_is_left_out_and_listed(tiny_folder, rows, tmp_path):
    broken = {**rows[1], "id": "broken", "image": {"bytes": rows[1]["image"]["bytes"][:300], "path": None}}
    with pytest.raises(ValueError, match="'broken'"):
        trainer_of(tiny_folder(), [rows[0], broken], tmp_path / "stop", max_steps=2).train()
    trainer = trainer_of(tiny_folder(), [rows[0], broken, rows[2]], tmp_path / "skip", max_steps=3, on_error="skip",
                         per_device_train_batch_size=1)  # fmt: skip
    trainer.train()
    listed = [json.loads(line) for line in (tmp_path / "skip" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in listed] == ["broken"]
    assert [line.get("skipped_records", 0) for line in trainer.state.log_history if "loss" in line] == [0, 1, 0]
    assert all(math.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line)


def test_what_only_other_trainings_can_do_is_refused(tmp_path):
    for changes, name in (
        ({"packing": True}, "packing"),
        ({"on_error": "ignore"}, "on_error"),
        ({"seg_bce_weight": -1.0}, "seg_bce_weight"),
        ({"lora_r": 0}, "lora_r"),
        ({"muon": True}, "muon"),
        ({"mask_points": -5}, "mask_points"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` is"):
            PerceptioSFTConfig(str(tmp_path), **changes)


def test_the_file_and_the_command_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: base\ndata: photos\noutput_dir: out\nlearning_rate: 1e-4\nseg_bce_weight: 3\n")
    run, config = parse(["--config", str(file), "--learning_rate", "2e-5"])
    assert (run.model, run.data) == ("base", "photos")
    assert (config.learning_rate, config.seg_bce_weight, config.lora_r) == (2e-5, 3.0, 128)


def test_wrong_input_is_one_line(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("perceptio.training.guard.get_available_reporting_integrations", lambda: ["tensorboard"])
    photos = tmp_path / "photos"
    photos.mkdir()
    base = ["--model", str(tiny_folder()), "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    for arguments, words in (
        ([*base, "--data", str(tmp_path / "absent")], "absent"),
        ([*base, "--data", str(photos)], "no rows"),
        ([*base, "--data", str(photos), "--lora_r", "0"], "lora_r"),
        ([*base, "--data", str(photos), "--eval_strategy", "steps"], "eval_data"),
        ([*base, "--data", str(photos), "--report_to", "trackio"], "pip install trackio, or pass --report_to none"),
    ):
        assert main(arguments) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("perceptio: ") and words in lines[-1], lines[-1]


def test_four_bits(tmp_path, rows):
    """The language model in 4 bits, what is trained beside it in float32."""
    pytest.importorskip("bitsandbytes")
    model = build(tmp_path / "base", width=128)
    data = tmp_path / "scenes"
    write_shards(rows[:2], data)
    arguments = {"model": model, "data": data, "output_dir": tmp_path / "run", "lora_r": 4, "max_steps": 3,
                 "report_to": "none", "mask_points": 0, "learning_rate": 0.01, "qlora": True}  # fmt: skip
    assert main([str(part) for name, value in arguments.items() for part in (f"--{name}", value)]) == 0
    found = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    changed = [name for name, tensor in found.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert changed and all(found[name].dtype == torch.float32 for name in changed)
    with pytest.raises(ValueError, match="`qlora` is set beside `full`"):
        load_model(model, PerceptioSFTConfig(str(tmp_path / "other"), full=True), qlora=True)


@pytest.mark.parametrize("train_vision", [False, True])
def test_every_part_has_the_attention_that_is_fast_for_it(tiny_folder, tmp_path, train_vision):
    args = PerceptioSFTConfig(str(tmp_path / "run"), full=True, train_vision=train_vision, use_cpu=True)
    model = load_model(str(tiny_folder()), args)
    chosen = {
        name: part.config._attn_implementation
        for name, part in model.named_modules()
        if name in ("model.language_model", "model.vision_tower", "mask_model.mask_decoder.transformer")
    }
    assert chosen == {
        "model.language_model": "sdpa",
        "model.vision_tower": "eager" if train_vision else "sdpa",
        "mask_model.mask_decoder.transformer": "eager",
    }


def test_what_a_published_size_takes_needs_no_file(tmp_path, capsys):
    recipe = ["--config", str(ROOT / "recipes" / "perceptio-8b.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main([*recipe, "--model", "layout:8b", "--dry_run", "--gpus", "16", "--samples", "64000"]) == 0
    said = capsys.readouterr().out
    assert "16 × A100-80GB" in said and "500 steps of 128 samples" in said and "GPU-hours" in said
    assert not (tmp_path / "run").exists()
    assert main([*recipe, "--model", "layout:8b"]) == 2
    assert "pass --dry_run" in capsys.readouterr().err


def test_a_lost_evaluation_file_costs_the_evaluation_alone(tiny_folder, rows, tmp_path, caplog):
    scenes = tmp_path / "scenes"
    write_shards(rows[:3], scenes)
    held_out = RunData(str(scenes))
    changes = {
        "max_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_train_batch_size": 1,
        "panels": 0,
    }
    trainer = trainer_of(tiny_folder(), rows[:3], tmp_path / "run", held_out=held_out.evaluation(), **changes)
    assert trainer.evaluate()["eval_scenes_mask_iou"] >= 0
    held_out.mixture.tables[0].open.clear()  # as when there is more data than is kept in memory
    for path in (scenes / "data").iterdir():
        path.unlink()
    trainer.train()
    assert trainer.state.global_step == 3 and "is not evaluated" in caplog.text
