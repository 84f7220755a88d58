"""The configuration: what it refuses, at construction and by name, and what it keeps."""

import json
import subprocess
import sys

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from perceptio.configuration_perceptio import AUTO_MAP, CUSTOM_PIPELINES, PerceptioConfig, PerceptioDepthConfig
from perceptio.hub.tiny import tiny_config, tiny_mask_config


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_a_configuration_survives_saving(family, tmp_path):
    config = tiny_config(family, blocked_token_ids=[3, 4], tie_word_embeddings=False)
    config.save_pretrained(tmp_path)
    loaded = PerceptioConfig.from_pretrained(tmp_path)
    saved, expected = loaded.to_dict(), config.to_dict()
    for part in (saved, expected):
        part.pop("_name_or_path", None)
    assert saved == expected
    assert loaded.text_config.model_type == family and loaded.tie_word_embeddings is False


def test_a_saved_configuration_is_a_whole_hub_repository(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == AUTO_MAP and saved["model_type"] == "perceptio"
    assert saved["custom_pipelines"].keys() == CUSTOM_PIPELINES.keys()
    assert all("--" not in target and "/" not in target for target in saved["auto_map"].values())


def test_the_default_is_the_published_size():
    config = PerceptioConfig()
    assert config.span_length == 100 and config.depth_config.num_codes == 128 and config.mask_image_size == 1024


def test_default_ids_are_disjoint_and_at_the_end_of_the_vocabulary():
    config = tiny_config()
    first, count = config.depth_code_token_ids
    ids = [config.seg_token_id, config.depth_start_token_id, config.depth_end_token_id, *range(first, first + count)]
    assert ids == list(range(512 - count - 3, 512))


BAD = {
    "an unknown key": ({"grid": 10}, "no field 'grid'"),
    "an unknown key of the depth part": ({"depth_config": {"grid": 10}}, "no field 'grid'"),
    "a kernel to fetch": ({"_attn_implementation_internal": "owner/kernel"}, "_attn_implementation_internal"),
    "a kernel to fetch, nested": (
        {"text_config": {"model_type": "qwen2", "_attn_implementation_internal": "owner/kernel"}},
        "_attn_implementation_internal",
    ),
    "code of another repository": ({"auto_map": {"AutoModel": "owner/name--m.C"}}, "another repository"),
    "code in a sub-configuration": ({"text_config": {"model_type": "qwen2", "auto_map": {}}}, "names code to run"),
    "an unsupported text model": ({"text_config": {"model_type": "gpt2"}}, "'gpt2', expected one of"),
    "a mask model of another type": ({"mask_config": {"model_type": "sam"}}, "'sam', expected one of"),
    "a negative size": ({"text_config": {"model_type": "qwen2", "hidden_size": -1}}, "text_config.hidden_size"),
    "10**12 layers": ({"text_config": {"model_type": "qwen2", "num_hidden_layers": 10**12}}, "num_hidden_layers"),
    "a huge picture": ({"vision_config": {"image_size": 10**9}}, "vision_config.image_size"),
    "a list for a part": ({"depth_config": [1]}, "depth_config"),
    "a string for a part": ({"mask_config": "sam2"}, "mask_config"),
    "grid and size apart": ({"depth_config": {"grid_size": 10, "image_size": 99}}, "image_size` is 99"),
    "no codes": ({"depth_config": {"num_codes": 0}}, "depth_config.num_codes` is 0"),
    "codes counted twice": ({"depth_code_token_ids": [400, 99]}, "counts 99 codes"),
    "codes that are no pair": ({"depth_code_token_ids": [400]}, "expected .first id, number of codes."),
    "an id beyond the vocabulary": ({"seg_token_id": 512}, "outside the vocabulary of 512"),
    "a negative id": ({"depth_end_token_id": -1}, "outside the vocabulary"),
    "an id that is text": ({"seg_token_id": "[SEG]"}, "seg_token_id"),
    "one id for two tokens": ({"seg_token_id": 502, "depth_start_token_id": 502}, "share an id"),
    "tokens per tile": ({"image_seq_length": 256}, "image_seq_length` is 256"),
    "SAM2 of two widths": (
        {"mask_config": {**tiny_mask_config().to_dict(), "mask_decoder_config": {"hidden_size": 64}}},
        "unequal width",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_contradiction_is_refused_at_construction_and_named(case):
    overrides, message = BAD[case]
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=message):
        tiny_config(**overrides)


def test_a_future_field_of_the_depth_part_is_named():
    with pytest.raises(ValueError, match="'temperature'.*version of perceptio that wrote it"):
        PerceptioDepthConfig(temperature=1.0)


@pytest.mark.parametrize("version", ["4.57.0", "5.5.0", "6.0.0"])
def test_an_unsupported_transformers_is_refused_in_one_sentence(version):
    code = f"import transformers; transformers.__version__ = {version!r}\nimport perceptio.configuration_perceptio"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert f"found {version}" in run.stderr.strip().splitlines()[-1] and "pip install" in run.stderr
