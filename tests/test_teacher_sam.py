"""The promptable segmenter of perceptio-tiny: its scenes, its prompts, and a short training."""

import json

import numpy as np
import pytest
import torch

from perceptio.modeling_convolutions import ConvBackbone, PerceptioMaskModel, PerceptioVisionModel
from perceptio.teachers.convolutions import open_convolutions, start_convolutions
from perceptio.teachers.sam import (
    BOTTOM_RIGHT,
    POINT,
    TOP_LEFT,
    PromptedSam,
    SamTrainingConfig,
    draw_prompts,
    main,
    sam_config,
    take_stages,
)
from perceptio.teachers.vision import vision_config
from perceptio.world.instances import InstanceSet, scene_instances, write_instances
from perceptio.world.scene import sample_scene
from perceptio.world.views import thing_map


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_instances(tmp_path_factory.mktemp("scenes"), count=6, side=64, workers=0)


@pytest.fixture
def args(tmp_path):
    return SamTrainingConfig(str(tmp_path), side=64, prompts=6)


def test_a_scene_is_the_worlds_own(scenes):
    image, things = scenes[3]["image"], scenes[3]["things"]
    scene = sample_scene(np.random.default_rng([0, 0, 3]), 64, 64)
    assert np.array_equal(image.numpy(), scene.rendering.image)
    assert np.array_equal(things.numpy().astype(int) - 1, thing_map(scene)) and things.max() >= 2
    assert np.array_equal(scene_instances(3, side=64)["things"], things.numpy())


def test_a_click_is_told_as_the_place_in_the_picture_is():
    """The library draws the numbers of both by chance: a new model then never learned to find a click's place."""
    sam = PromptedSam(sam_config(64, 16, [1, 1, 2, 1], 32)).sam
    cell, row, column = 16, 1, 2  # of the coarsest map
    click = torch.tensor([[[[column, row]]]]) * float(cell) + cell / 2 - 0.5
    clicked = sam.prompt_encoder(click, torch.ones(1, 1, 1, dtype=torch.int32), None, None)[0][0, 0, 0]
    place = sam.get_image_wide_positional_embeddings()[0, :, row, column]
    torch.testing.assert_close(clicked - sam.prompt_encoder.point_embed.weight[POINT], place)


def test_scenes_are_laid_down_once(scenes, tmp_path):
    folder = scenes.folder
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    write_instances(folder, count=6, side=64, workers=0)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match="holds other scenes"):
        write_instances(folder, count=7, side=64, workers=0)
    assert len(InstanceSet(folder)) == 6
    with pytest.raises(IndexError):
        scenes[6]


@pytest.mark.parametrize("boxes", [0.0, 1.0])
def test_a_prompt_shows_its_mask(scenes, args, boxes):
    args.boxes = boxes
    for index in range(6):
        things = scenes[index]["things"]
        drawn = draw_prompts(scenes[index], args, np.random.default_rng(index), whole=True)
        mirrored = np.random.default_rng(index).random() < 0.5
        shown = things.flip(1) if mirrored else things
        assert drawn["pixel_values"].shape == (3, 64, 64) and drawn["masks"].shape == (6, 16, 16)
        for points, labels, mask in zip(drawn["points"], drawn["labels"], drawn["masks"], strict=True):
            if boxes:
                assert labels.tolist() == [TOP_LEFT, BOTTOM_RIGHT]
                (left, top), (right, bottom) = (points / 4).tolist()
                rows, columns = mask.nonzero().unbind(1)
                slack = 2 + 0.1 * 16
                assert left - slack <= columns.min() and columns.max() <= right + slack
                assert top - slack <= rows.min() and rows.max() <= bottom + slack
            else:
                x, y = points[0].long().tolist()
                assert labels[0] == POINT and shown[y, x] > 0
                found = (shown == shown[y, x]).float().reshape(16, 4, 16, 4).mean((1, 3)) >= 0.5
                assert torch.equal(found, mask)


def test_a_part_of_a_scene_shows_its_things_larger(scenes, args):
    """A click lies in its mask there, too, and the things fill more of the part than of the whole."""
    args.boxes, filled = 0.0, {True: 0.0, False: 0.0}
    for index in range(60):
        for whole in filled:
            drawn = draw_prompts(scenes[index % 6], args, np.random.default_rng(index), whole)
            filled[whole] += (drawn["things"] > 0).float().mean().item()
            for (x, y), mask in zip(drawn["points"][:, 0].long().tolist(), drawn["masks"], strict=True):
                near = mask[max(0, y // 4 - 1) : y // 4 + 2, max(0, x // 4 - 1) : x // 4 + 2]
                assert near.any() or mask.sum() < 4
    assert filled[False] > 1.15 * filled[True]


def test_a_picture_without_things_goes_through(args):
    empty = {
        "image": torch.zeros(64, 64, 3, dtype=torch.uint8),
        "things": torch.zeros(64, 64, dtype=torch.uint8),
        "depth": torch.zeros(64, 64, dtype=torch.float16),
        "names": torch.zeros(256, 3, dtype=torch.uint8),
        "places": torch.full((5, 2), -1, dtype=torch.int16),
    }
    drawn = draw_prompts(empty, args, np.random.default_rng(0))
    assert not drawn["masks"].any() and torch.isfinite(drawn["points"]).all()
    assert not drawn["noun"].any() and drawn["depth"].shape == (16, 16)


@pytest.mark.parametrize("convolutions", [(), (8, 16, 24, 40)])
def test_masks_alone_teach_all_of_its_encoder(scenes, args, convolutions):
    """In evaluation there are no questions about cells, so that all of the loss goes through the mask decoder."""
    torch.manual_seed(0)
    model = PromptedSam(sam_config(64, 8, [1, 1, 2, 1], 32, convolutions)).eval()
    drawn = draw_prompts(scenes[0], args, np.random.default_rng(0))
    model(**{name: value[None] for name, value in drawn.items()})["loss"].backward()
    untaught = [name for name, weight in model.sam.vision_encoder.named_parameters() if weight.grad is None]
    assert untaught == []


def test_it_begins_with_a_towers_stages_and_leaves_them():
    torch.manual_seed(0)
    tower = PerceptioVisionModel(vision_config(64, 16, 32, 1, 2, (8, 16, 24), (1, 1, 2)))
    start_convolutions(tower)
    model = PromptedSam(sam_config(64, 8, [1, 1, 2, 1], 32, [8, 16, 24, 40]))
    take_stages(model.sam, tower)
    open_convolutions(model.sam, norms=True)
    backbone = model.sam.vision_encoder.backbone.eval()
    picture = torch.randn(1, 3, 64, 64)
    found = backbone(picture).intermediate_hidden_states
    given = tower.embeddings.patch_embeddings.stages(picture)
    assert len(found) == 4 and all(torch.equal(a.movedim(-1, 1), b) for a, b in zip(found, given, strict=False))
    trained = {name for name, weight in backbone.named_parameters() if weight.requires_grad}
    assert trained and all(name.startswith("stages.blocks.3.") for name in trained)
    for others in ([8, 16, 32, 40], [8, 16, 24, 40]):
        other = PromptedSam(sam_config(64, 8, [1, 1, 1, 1] if others[2] == 24 else [1, 1, 2, 1], 32, others))
        with pytest.raises(ValueError, match="`encoder` has stages of the widths"):
            take_stages(other.sam, tower)


@pytest.mark.parametrize("convolutions", [False, True])
def test_a_short_training_learns_and_leaves_a_model(convolutions, tmp_path, capsys):
    arguments = {"output_dir": tmp_path, "scenes": 12, "eval_scenes": 4, "side": 64, "width": 16, "decoder_width": 32,
                 "per_device_train_batch_size": 4, "max_steps": 30, "learning_rate": 3e-3, "logging_steps": 5,
                 "save_steps": 15, "report_to": "none", "disable_tqdm": True, "bf16": False, "prompts": 2,
                 "train_sampling_strategy": "sequential"}  # fmt: skip
    words = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    words += ["--convolutions", "16", "32", "48", "64"] if convolutions else []
    assert main([*words, "--blocks", "1", "1", "2", "1"]) == 0
    state = json.loads((tmp_path / "checkpoint-30" / "trainer_state.json").read_text())
    losses = [line["loss"] for line in state["log_history"] if "loss" in line]
    assert losses[-1] < losses[0] - 0.3, losses
    figures = json.loads((tmp_path / "model" / "evaluation.json").read_text())
    assert figures["scenes"] == 4 and 0 <= figures["mean_iou_boxes"] <= 1
    kept = PerceptioMaskModel.from_pretrained(tmp_path / "model")
    assert kept.config.prompt_encoder_config.image_size == 64
    assert isinstance(kept.vision_encoder.backbone, ConvBackbone) == convolutions
    features = [tuple(level.shape) for level in kept.get_image_embeddings(torch.zeros(1, 3, 64, 64))]
    assert features == [(1, 4, 16, 16), (1, 8, 8, 8), (1, 32, 4, 4)]
    wrong = [("side", "100", "100"), ("convolutions", "16", r"[16]")]
    wrong += [] if convolutions else [("encoder", "some", "'some'")]
    for field, value, told in wrong:
        assert main([*words, f"--{field}", value]) == 2
        assert f"`{field}` is {told}" in capsys.readouterr().err


def test_a_tracker_that_is_not_installed_is_named_before_a_scene_is_rendered(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("perceptio.training.guard.get_available_reporting_integrations", lambda: [])
    assert main(["--output_dir", str(tmp_path / "out"), "--report_to", "trackio"]) == 2
    assert "pip install trackio, or pass --report_to none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
