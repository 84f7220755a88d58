"""Patches that convolutions read: a model of its own with them, InternVL's tower without."""

import json

import pytest
import torch

from perceptio.configuration_perceptio import PerceptioConfig
from perceptio.hub.tiny import tiny_config
from perceptio.modeling_convolutions import ConvPatches, PerceptioVisionModel
from perceptio.modeling_perceptio import PerceptioForConditionalGeneration

PLAIN = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
         "image_size": 32, "patch_size": 4}  # fmt: skip
STAGES = {"conv_widths": [8, 16], "conv_depths": [1, 2]}


def config_with(**fields) -> PerceptioConfig:
    return tiny_config(vision_config={**PLAIN, **STAGES, **fields})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return PerceptioForConditionalGeneration(config_with()).eval()


def test_a_folder_keeps_them(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = PerceptioForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.vision_config.conv_widths == [8, 16]
    picture = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found, given = (one.get_image_features(pixel_values=picture).pooler_output for one in (again, model))
    assert torch.equal(found, given) and found.shape == (2, 16, 32)
    alone = PerceptioVisionModel(model.config.vision_config).eval()
    alone.load_state_dict(model.model.vision_tower.state_dict())
    assert torch.equal(alone(picture).last_hidden_state, model.model.vision_tower(picture).last_hidden_state)


def test_they_see_beyond_their_patch_and_all_in_their_place(model):
    patches = model.model.vision_tower.embeddings.patch_embeddings
    assert isinstance(patches, ConvPatches)
    before = torch.randn(1, 3, 32, 32)
    after = before.clone()
    after[:, :, 5, 9] += 1  # the patch in row 1, column 2 of eight
    changed = (patches(after) - patches(before)).abs().amax(-1).view(8, 8)
    assert changed.argmax() == 8 * 1 + 2 and (changed > 0).sum() > 1
    assert not changed[:, 7].any() and not changed[7].any()


def test_without_widths_the_tower_is_internvls(model):
    plain = PerceptioForConditionalGeneration(tiny_config(vision_config=PLAIN))
    names = set(plain.model.vision_tower.state_dict())
    assert "embeddings.patch_embeddings.projection.weight" in names
    assert not any("first" in name for name in names)


@pytest.mark.parametrize(
    "fields, field",
    [
        ({"conv_widths": "wide"}, "conv_widths"),
        ({"conv_widths": [8, 16, 32]}, "conv_depths"),
        ({"conv_widths": [8, 10**9]}, "conv_widths"),
        ({"conv_widths": [8] * 9, "conv_depths": [1] * 9}, "conv_widths"),
        ({"conv_depths": [1]}, "conv_depths"),
        ({"conv_depths": None}, "conv_depths"),
        ({"conv_depths": [1, 0]}, "conv_depths"),
        ({"conv_widths": [8, 8, 8, 8], "conv_depths": [1, 1, 1, 1]}, "patch_size"),
    ],
)
def test_stages_that_cannot_be_are_refused(fields, field, tmp_path):
    with pytest.raises(ValueError, match=f"`vision_config.{field}` is"):
        config_with(**fields)
    config = config_with().to_dict()
    config["vision_config"].update(fields)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=field):
        PerceptioConfig.from_pretrained(tmp_path)
