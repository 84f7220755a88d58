"""The mean of several states of a model."""

import json

import pytest
import torch

from perceptio.hub.average import main
from perceptio.hub.manifest import verify_manifest
from perceptio.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio.processing_perceptio import PerceptioProcessor

MODEL = "checkpoints/perceptio-tiny"


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """Three, the second and third with other vision weights, and one with another depth tokenizer."""
    folder = tmp_path_factory.mktemp("states")
    model, processor = (
        PerceptioForConditionalGeneration.from_pretrained(MODEL),
        PerceptioProcessor.from_pretrained(MODEL),
    )
    moved = model.model.vision_tower.encoder.layer[0].lambda_1
    begun = moved.detach().clone()
    for name, change in (("first", 0.0), ("second", 3.0), ("third", 6.0)):
        with torch.no_grad():
            moved.copy_(begun + change)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    with torch.no_grad():
        next(model.depth_model.decoder.parameters()).add_(1e-3)
    model.save_pretrained(folder / "other")
    return folder, begun


def test_every_state_counts_alike_and_nothing_else_changes(states, tmp_path, capsys):
    folder, begun = states
    assert main([str(tmp_path / "mean"), *(str(folder / name) for name in ("first", "second", "third"))]) == 0
    assert "the mean of 3 states" in capsys.readouterr().out and verify_manifest(tmp_path / "mean") == []
    mean, first = (
        PerceptioForConditionalGeneration.from_pretrained(place).state_dict()
        for place in (tmp_path / "mean", folder / "first")
    )
    moved = "model.vision_tower.encoder.layer.0.lambda_1"
    torch.testing.assert_close(mean.pop(moved), begun + 3)
    assert all(torch.allclose(weight, first[key], rtol=1e-6, atol=0) for key, weight in mean.items())
    assert all(torch.equal(weight, first[key]) for key, weight in mean.items() if key.startswith("depth_model."))
    assert PerceptioProcessor.from_pretrained(tmp_path / "mean").num_depth_codes == 128
    assert json.loads((tmp_path / "mean" / "mean.json").read_text()) == {"states": 3}


def test_what_is_no_state_of_the_model_is_one_line(states, tmp_path, capsys):
    folder, _ = states
    assert main([str(tmp_path / "mean"), str(folder / "first"), str(folder / "other")]) == 2
    assert "other is no state of the model in" in (line := capsys.readouterr().err.splitlines()[-1])
    assert "they differ in depth_model." in line
    assert main([str(tmp_path / "mean"), str(folder / "first")]) == 2
    assert "expected at least two folders" in capsys.readouterr().err.splitlines()[-1]
    assert main([str(tmp_path / "mean"), str(folder / "first"), str(tmp_path / "absent")]) == 2
    assert "absent holds no model, expected a folder" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "mean").exists()
