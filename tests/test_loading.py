"""Damaged, foreign and incomplete folders: one error that names the file or the weight, never a plausible model."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, InternVLForConditionalGeneration

from perceptio.files_perceptio import CODE_FILES, INDEX_FILE, SINGLE_FILE, check_weight_files, read_header
from perceptio.hub.tiny import tiny_config
from perceptio.modeling_perceptio import NEVER_QUANTIZED, PerceptioForConditionalGeneration, _spare_branches


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with one weight file, and one with several shards."""
    torch.manual_seed(0)
    model = PerceptioForConditionalGeneration(tiny_config())
    model.config.depth_config.codebook_hash = model.depth_model.codebook_hash()
    root = tmp_path_factory.mktemp("saved")
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="200KB")
    return root


@pytest.fixture
def single(saved, tmp_path):
    return shutil.copytree(saved / "single", tmp_path / "single")


@pytest.fixture
def sharded(saved, tmp_path):
    return shutil.copytree(saved / "sharded", tmp_path / "sharded")


def load(folder, **kwargs):
    return PerceptioForConditionalGeneration.from_pretrained(folder, **kwargs)


def rewrite(folder, change) -> None:
    """Apply `change` to the state dict of a single-file folder."""
    weights = load_file(folder / SINGLE_FILE)
    weights = change(weights) or weights
    save_file(weights, folder / SINGLE_FILE, metadata={"format": "pt"})


def edit_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        part, _, field = key.rpartition("__")
        (config[part] if part else config)[field] = value
    (folder / "config.json").write_text(json.dumps(config))


def test_a_whole_folder_loads_with_equal_weights(single, sharded):
    one, several = load(single), load(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for (name, left), (_, right) in zip(one.state_dict().items(), several.state_dict().items(), strict=True):
        assert torch.equal(left, right), name
    assert one.missing_branches == frozenset()


def test_weights_are_saved_under_the_names_of_their_modules(single):
    """The library renames weights of its own classes in files, by a table that changes between versions."""
    assert load_file(single / SINGLE_FILE).keys() == load(single).state_dict().keys() - {"lm_head.weight"}


def test_a_saved_folder_carries_its_code_and_no_pickle(single):
    assert set(CODE_FILES) <= {path.name for path in single.iterdir()}
    assert {path.suffix for path in single.iterdir()} <= {".py", ".json", ".safetensors"}


DAMAGE = {
    "half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one byte long": lambda data: data + b"\0",
    "header only": lambda data: data[: 8 + int.from_bytes(data[:8], "little")],
    "empty": lambda data: b"",
    "four bytes": lambda data: data[:4],
    "a length of 0xFF": lambda data: b"\xff" * 8 + data[8:],
    "random bytes": lambda data: bytes(range(256)) * 8,
    "a header that is no JSON": lambda data: data[:8] + b"[" + data[9:],
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a pickle": lambda data: pickle.dumps({"weights": list(range(100))}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_weight_file_is_named(single, damage):
    path = single / SINGLE_FILE
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors.*again"):
        load(single)


def test_a_damaged_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(ValueError, match=shard.name):
        load(sharded)


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{INDEX_FILE} names {shard.name}, which is missing"):
        load(sharded)


def test_a_shard_that_the_index_does_not_name(sharded):
    shutil.copy(sorted(sharded.glob("model-*.safetensors"))[0], sharded / "model-00099-of-00099.safetensors")
    with pytest.raises(ValueError, match="model-00099-of-00099.safetensors is not in"):
        load(sharded)


def test_two_shards_with_one_key(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(ValueError, match="is in both"):
        load(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "nonsense"])
def test_an_unreadable_index_is_named(sharded, text):
    (sharded / INDEX_FILE).write_text(text)
    with pytest.raises(ValueError, match=INDEX_FILE):
        load(sharded)


def test_an_index_may_not_leave_the_folder(sharded):
    index = json.loads((sharded / INDEX_FILE).read_text())
    key = next(iter(index["weight_map"]))
    index["weight_map"][key] = "../single/model.safetensors"
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside the folder|is not in"):
        load(sharded)


REMOVED = [
    "depth_model.codebook",
    "depth_model.decoder.mend2.weight",
    "mask_model.mask_decoder.iou_token.weight",
    "mask_model.no_memory_embedding",
    "seg_projector.linear_2.bias",
    "model.language_model.layers.1.mlp.up_proj.weight",
    "model.multi_modal_projector.linear_1.weight",
]


@pytest.mark.parametrize("key", REMOVED)
def test_a_missing_weight_stops_the_loading(single, key):
    rewrite(single, lambda weights: weights.pop(key) is None or weights)
    with pytest.raises(ValueError, match=f"lacks 1 weights .{key}.*allow_missing=True"):
        load(single)


def test_every_single_weight_of_the_own_modules_is_missed(single):
    """The library fills a lost tensor with random numbers and logs a table; nothing of ours may be lost that way."""
    keys = [k for k in load_file(single / SINGLE_FILE) if k.startswith(("seg_projector", "depth_model"))]
    whole = load_file(single / SINGLE_FILE)
    for key in keys:
        save_file({k: v for k, v in whole.items() if k != key}, single / SINGLE_FILE, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=key):
            load(single)


@pytest.mark.parametrize(
    ("prefix", "branch"), [("mask_model.", "mask"), ("seg_projector.", "mask"), ("depth_", "depth")]
)
def test_without_a_branch_text_works_and_the_branch_says_what_to_do(single, prefix, branch):
    rewrite(single, lambda weights: {k: v for k, v in weights.items() if not k.startswith(prefix)})
    model = load(single, allow_missing=True)
    assert model.missing_branches == {branch}
    ids = torch.tensor([[5, 6, 7]])
    assert model.generate(input_ids=ids, max_new_tokens=2, pad_token_id=0).shape[1] > 3
    config = model.config
    opening = config.seg_token_id if branch == "mask" else config.depth_start_token_id
    with pytest.raises(ValueError, match=f"without the weights of its {branch} branch"):
        model.perceive(input_ids=torch.tensor([[5, opening]]), max_new_tokens=12)


@pytest.mark.parametrize("branches", [(), ("mask",), ("depth",)])
def test_a_branch_can_be_left_out(single, branches):
    """Text alone then has the backbone's memory; what is left gives the numbers of the whole model."""
    whole, part = load(single), load(single, branches=branches)
    assert part.missing_branches == {"mask", "depth"} - set(branches)
    for name, weight in part.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name])
    assert hasattr(part, "mask_model") == ("mask" in branches) and hasattr(part, "depth_model") == (
        "depth" in branches
    )
    with pytest.raises(ValueError, match="half"):
        part.save_pretrained(single.parent / "half")


def test_an_unknown_branch_is_named(single):
    with pytest.raises(ValueError, match="sound"):
        load(single, branches=("sound",))


def test_an_extra_weight_is_refused(single):
    rewrite(single, lambda weights: {**weights, "depth_model.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"no place for \(depth_model\.extra\)"):
        load(single)


def test_nan_in_our_own_weights_is_refused(single):
    rewrite(single, lambda weights: weights["seg_projector.linear_1.weight"].fill_(torch.nan) is None)
    with pytest.raises(ValueError, match="NaN or infinite values in seg_projector.linear_1.weight"):
        load(single)


def test_whole_numbers_where_floats_are_due_are_refused(single):
    key = "model.language_model.norm.weight"
    rewrite(single, lambda weights: {**weights, key: weights[key].to(torch.int8)})
    with pytest.raises(ValueError, match=f"{key} in .* is of type I8"):
        load(single)


def test_another_codebook_is_refused(single):
    def other(weights):
        weights["depth_model.codebook"] += 1

    rewrite(single, other)
    with pytest.raises(ValueError, match="codebook .* has hash .* records"):
        load(single)


@pytest.mark.parametrize("shape", [(16, 16), (8, 32)])
def test_a_codebook_of_another_shape_is_refused(single, shape):
    rewrite(single, lambda weights: {**weights, "depth_model.codebook": torch.zeros(shape)})
    with pytest.raises(ValueError, match=rf"depth_model.codebook in shape \({shape[0]}, {shape[1]}\)"):
        load(single)


def test_a_plain_backbone_is_refused_with_the_way_to_assemble(tmp_path):
    config = tiny_config()
    backbone = InternVLForConditionalGeneration(config)
    backbone.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="perceptio assemble"):
        load(tmp_path)


def test_pickled_weights_are_never_read(single):
    """A pickle beside the good file is ignored; alone, it is no weight file; asked for, it is refused."""
    marker = single.parent / "executed"

    class Bomb:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    (single / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (single / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    load(single)
    with pytest.raises(ValueError, match="never reads pickled weights"):
        load(single, use_safetensors=False)
    (single / SINGLE_FILE).unlink()
    with pytest.raises(OSError, match="safetensors"):
        load(single)
    assert not marker.exists()


CONFIG_DAMAGE = {
    "an unknown key": ({"surprise": 1}, "no field 'surprise'"),
    "a newer version's field": ({"depth_config__temperature": 0.5}, "no field 'temperature'"),
    "grid against tokens": ({"depth_config__grid_size": 10}, "image_size` is 24"),
    "too many codes": ({"depth_config__num_codes": 9}, "counts 8 codes"),
    "a fetched kernel": ({"_attn_implementation_internal": "a/b"}, "_attn_implementation_internal"),
    "foreign code": ({"auto_map": {"AutoConfig": "owner/name--x.C"}}, "another repository"),
    "a list for a dict": ({"vision_config": [1]}, "vision_config"),
    "layers without end": ({"text_config__num_hidden_layers": 10**12}, "num_hidden_layers"),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_a_damaged_config_names_its_field(single, damage):
    changes, message = CONFIG_DAMAGE[damage]
    edit_config(single, **changes)
    with pytest.raises(Exception, match=message):
        load(single)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_config_that_is_no_json_object(single, text):
    (single / "config.json").write_text(text)
    with pytest.raises((OSError, ValueError, TypeError, AttributeError)):
        load(single)


def test_the_codebook_stays_exact_through_half_precision(single):
    """A rounded codebook has another hash, so a folder saved in bfloat16 could not be loaded in float32 again."""
    load(single, dtype=torch.bfloat16).save_pretrained(single.parent / "half")
    again = load(single.parent / "half", dtype=torch.float32)
    assert again.depth_model.codebook_hash() == load(single).depth_model.codebook_hash()


@pytest.mark.parametrize(
    "way", [{}, {"dtype": torch.bfloat16}, {"dtype": "auto"}, {"device_map": "cpu"}, {"device_map": "auto"}]
)
def test_ways_of_loading_agree(single, way):
    expected, model = load(single), load(single, **way)
    for (name, left), (_, right) in zip(expected.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(left.to(right.dtype), right), name
    if "dtype" in way:
        assert {p.dtype for p in model.model.parameters()} == {
            torch.bfloat16 if way["dtype"] != "auto" else torch.float32
        }


def test_non_persistent_buffers_are_rebuilt(single):
    """Remote code of peers returned garbage where buffers that are not saved were left on the meta device."""
    fresh = PerceptioForConditionalGeneration(load(single).config)
    loaded = dict(load(single, device_map="cpu").named_buffers())
    for name, buffer in fresh.named_buffers():
        assert loaded[name].device.type == "cpu" and loaded[name].shape == buffer.shape
        if name not in fresh.state_dict():
            assert torch.equal(loaded[name], buffer), name


@pytest.mark.parametrize("user", [None, ["extra"]])
def test_quantization_spares_masks_and_depth(user):
    as_object = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=user)
    as_dict = {"quant_method": "torchao", "modules_to_not_convert": user}
    _spare_branches(as_object)
    _spare_branches(as_dict)
    expected = {*NEVER_QUANTIZED, *(user or [])}
    assert set(as_object.llm_int8_skip_modules) == set(as_dict["modules_to_not_convert"]) == expected


def test_the_header_reader_agrees_with_the_library(single):
    header = read_header(single / SINGLE_FILE)
    assert header.keys() == load_file(single / SINGLE_FILE).keys()
    check_weight_files(single)
