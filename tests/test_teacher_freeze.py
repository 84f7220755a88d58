"""The frozen parts that come with the repository: whole, small, and what a new language model is trained on."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import InternVLVisionModel

from perceptio.hub.manifest import verify_manifest
from perceptio.hub.train_tiny import stages
from perceptio.teachers.freeze import freeze, load_part, main
from perceptio.teachers.sam import PromptedSam, SamTrainer, draw_prompts
from perceptio.teachers.vision import VisionTrainingConfig, vision_config
from perceptio.world.instances import scene_instances

LOGGED = [{"step": 4, "loss": 3.0}, {"step": 7, "loss": 2.0}, {"step": 7, "train_runtime": 1.0}]
PARTS = {"sam-tiny": "mean_iou_boxes", "vision-tiny": "noun"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """As a trainer leaves it, but that nothing was trained."""
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    InternVLVisionModel(vision_config(56, 14, 32, 2, 2)).save_pretrained(folder / "model")
    (folder / "model" / "evaluation.json").write_text(json.dumps({"scenes": 4, "colour": 0.98765}))
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "trainer_state.json").write_text(json.dumps({"log_history": LOGGED}))
    return folder


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


def test_halves_on_the_disk_and_the_figures_on_the_card(run, tmp_path):
    folder = freeze(run, tmp_path / "part")
    stored = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16} and verify_manifest(folder) == []
    before, loaded = InternVLVisionModel.from_pretrained(run / "model", dtype=torch.float32), load_part(folder)
    for key, weight in loaded.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, before.state_dict()[key].half().float())
    card = (folder / "README.md").read_text("utf-8")
    assert "| colour | 0.988 |" in card and "7 steps" in card
    assert logged(folder) == LOGGED


def test_the_log_and_the_steps_are_those_of_all_trainings(run, tmp_path):
    """Also of what is there only frozen, and of one that was frozen behind two."""
    first = freeze(run, tmp_path / "first", [run])
    folder = freeze(run, tmp_path / "part", [first])
    assert logged(folder) == LOGGED * 3
    assert "14 steps" in (first / "README.md").read_text("utf-8")
    assert "21 steps" in (folder / "README.md").read_text("utf-8")
    assert main([str(run), str(tmp_path / "again"), "--first", str(first), str(run)]) == 0
    assert "28 steps" in (tmp_path / "again" / "README.md").read_text("utf-8")


def test_what_was_frozen_before_is_replaced_whole_or_not_at_all(run, tmp_path, monkeypatch):
    folder = freeze(run, tmp_path / "part")
    (folder / "of-before.txt").write_text("x")
    monkeypatch.setattr("perceptio.teachers.freeze.write_manifest", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        freeze(run, folder)
    assert (folder / "of-before.txt").is_file() and load_part(folder)
    monkeypatch.undo()
    freeze(run, folder)
    assert not (folder / "of-before.txt").exists() and verify_manifest(folder) == []
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_what_is_not_finished_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "part")]) == 2
    assert "nowhere" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert not (tmp_path / "part").exists()


def test_a_folder_of_something_else_is_told_from_its_own_files(tmp_path, request):
    with pytest.raises(FileNotFoundError, match="nowhere has no config.json"):
        load_part(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds a model of the type 'perceptio_depth', expected one of sam2"):
        load_part(request.config.rootpath / "checkpoints" / "depth-tiny")


@pytest.mark.parametrize("name", PARTS)
def test_the_trained_ones_are_whole_and_their_cards_true(name, request):
    folder = request.config.rootpath / "checkpoints" / name
    assert verify_manifest(folder) == []
    figures = json.loads((folder / "evaluation.json").read_text("utf-8"))
    card = (folder / "README.md").read_text("utf-8")
    shown = dict(re.findall(r"^\| ([a-z ]+) \| ([\d.]+) \|$", card, flags=re.MULTILINE))
    assert shown == {key.replace("_", " "): f"{value:.3f}" if key != "scenes" else str(value)
                     for key, value in figures.items()}  # fmt: skip
    told = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    steps = sum(step for step, after in zip(told, [*told[1:], 0], strict=True) if after < step)  # of each training
    assert f"{steps:,} steps" in card and figures[PARTS[name]] > 0.5


def test_the_segmenter_finds_what_a_box_shows(request):
    """On scenes of a split that it was not trained on; a new one has an IoU of about 0.1, one whose encoder never
    learned one of 0.68."""
    from types import SimpleNamespace

    import numpy as np

    sam = load_part(request.config.rootpath / "checkpoints" / "sam-tiny")
    model, found = PromptedSam(sam.config).eval(), []
    model.sam.load_state_dict(sam.state_dict())
    args = SimpleNamespace(side=192, prompts=4, boxes=1.0)
    for index in range(6):
        scene = {key: torch.from_numpy(value) for key, value in scene_instances(index, 5, "test").items()}
        drawn = draw_prompts(scene, args, np.random.default_rng(index), whole=True)
        with torch.no_grad():
            found.append(model(**{key: value[None] for key, value in drawn.items()}))
    assert SamTrainer.measure(found)["mean_iou_boxes"] > 0.7


def test_training_can_begin_with_the_frozen_ones(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    names = [stage.name for stage in stages(frozen=True)]
    assert "segmenter" not in names and names[0] == "base" and names[1:] == [s.name for s in stages()][5:]
    words = stages(frozen=True)[0].words
    for name in PARTS:
        assert f"checkpoints/{name}" in words and load_part(f"checkpoints/{name}").dtype == torch.float32
    assert VisionTrainingConfig("out", start="checkpoints/vision-tiny").start == "checkpoints/vision-tiny"
