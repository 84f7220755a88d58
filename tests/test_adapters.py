"""What trains, what an adapter remembers of its base, and the folders that training ends in."""

import copy
import json
import os
import shutil
import subprocess
import sys
import textwrap

import peft
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from training_samples import build
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, pipeline

from perceptio import PerceptioForConditionalGeneration, PerceptioPipeline, PerceptioProcessor
from perceptio.adapters_perceptio import ADAPTER_FILE, PREFIX, RECORD, describe_base, pack_record, unpack_record
from perceptio.cli import main
from perceptio.hub.manifest import verify_manifest
from perceptio.losses_perceptio import Head
from perceptio.training.adapter_folders import (
    merged_weights,
    save_adapter_folder,
    save_merged_folder,
    stamp_adapter,
)
from perceptio.training.adapters import new_token_ids, peft_config, thaw, trainable_table

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
FAMILIES = ("qwen2", "qwen3", "llama")
IDS = torch.arange(1, 21)[None]
ROWS = "trainable_tokens_delta"
PARTS = {
    "LoRA": lambda name: ".lora_B." in name,
    "input rows": lambda name: ROWS in name and "embed_tokens" in name,
    "output rows": lambda name: ROWS in name and "lm_head" in name,
    "projector": lambda name: "multi_modal_projector.modules_to_save" in name,
    "seg projector": lambda name: "seg_projector.modules_to_save" in name,
    "mask decoder": lambda name: "mask_decoder.modules_to_save" in name,
}
WAYS = {
    "PeftModel": lambda base, folder, **kwargs: PeftModel.from_pretrained(load(base, **kwargs), folder),
    "load_adapter": lambda base, folder, **kwargs: with_adapter(load(base, **kwargs), folder),
    "class": lambda base, folder, **kwargs: load(based_on(folder, base), **kwargs),
    "Auto": lambda base, folder, **kwargs: AutoModelForImageTextToText.from_pretrained(
        based_on(folder, base), **kwargs
    ),
}


def load(folder, **kwargs):
    return PerceptioForConditionalGeneration.from_pretrained(folder, **kwargs).eval()


def with_adapter(model, folder):
    model.load_adapter(str(folder))
    return model


def based_on(folder, base):
    """The adapter's folder after its owner has written another base into it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    return folder


def wrap(model, **kwargs) -> PeftModel:
    return get_peft_model(model, peft_config(model, r=4, alpha=8, **kwargs)).eval()


def perturb(model, wanted=lambda name: True, seed: int = 1) -> int:
    generator, count = torch.Generator().manual_seed(seed), 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and wanted(name):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
            count += 1
    return count


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def seen_by(model) -> dict:
    """Logits with a picture and over the new tokens, and a decoded mask."""
    generator = torch.Generator().manual_seed(7)
    config = model.config
    ids = torch.tensor([[1, 2, *[config.image_token_id] * config.image_seq_length, 3, *new_token_ids(config)]])
    with torch.no_grad():
        tile = torch.randn(1, 3, 32, 32, generator=generator)
        logits = model(input_ids=ids, pixel_values=tile).logits
        features = model.encode_pictures(torch.randn(1, 3, 64, 64, generator=generator))
        states = torch.randn(1, config.text_config.hidden_size, generator=generator)
        masks = model.decode_masks(states, features, [0])
    return {"logits": logits, "masks": masks.mask_logits, "scores": masks.mask_scores}


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return build(tmp_path_factory.mktemp("untied") / "model")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_folder):
    """An adapter with every part trained, for the tied tiny model; and the logits that it gives."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = wrap(load(tiny_folder()))
    perturb(model)
    save_adapter_folder(model, PerceptioProcessor.from_pretrained(tiny_folder()), folder, tiny_folder())
    return folder, logits_of(model)


@pytest.fixture
def own_adapter(adapter, tmp_path):
    return shutil.copytree(adapter[0], tmp_path / "own")


# What is trained


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_trains_its_parts_and_nothing_else(tiny_folder, family):
    model = load(tiny_folder(family))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    decoder = {name for name, _ in model.mask_model.mask_decoder.named_parameters()}
    wrapped = wrap(model)
    trained = {name.removeprefix(PREFIX) for name, p in wrapped.named_parameters() if p.requires_grad}
    lora = {name.split(".lora_")[0] for name in trained if ".lora_" in name}
    assert lora == {name for name in linear if name.startswith("model.language_model.")}
    assert f"model.language_model.embed_tokens.token_adapter.{ROWS}.default" in trained
    start = "mask_model.mask_decoder.modules_to_save.default."
    assert {name.removeprefix(start) for name in trained if name.startswith("mask_model.")} == decoder
    whole = ("model.multi_modal_projector.modules_to_save.", "seg_projector.modules_to_save.", start)
    assert {
        name for name in trained if ".lora_" not in name and ROWS not in name and not name.startswith(whole)
    } == set()


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_reach_every_trained_part(tmp_path, untied, tiny_folder, tied):
    model = wrap(load(tiny_folder() if tied else untied))
    perturb(model, lambda name: ".lora_B." in name)  # zero at first, so that no gradient passes to A
    ids = new_token_ids(model.config)
    assert len(ids) == len(set(ids)) == 11
    prompt = torch.tensor([[*[model.config.image_token_id] * model.config.image_seq_length, *ids]])
    output = model(input_ids=prompt, pixel_values=torch.randn(1, 3, 32, 32), labels=prompt)
    features = model.encode_pictures(torch.randn(1, 3, 64, 64))
    masks = model.decode_masks(output.last_hidden_state[0, -11:-10], features, [0])
    (output.loss + masks.mask_logits.square().mean() + masks.mask_scores.sum()).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for part, belongs in PARTS.items():
        if part != "output rows" or not tied:
            assert any(belongs(name) for name in reached), part
    assert all(p.requires_grad or p.grad is None for p in model.parameters())


def test_tied_ends_share_their_rows(tiny_folder):
    model = wrap(load(tiny_folder()))
    rows = [p for name, p in model.named_parameters() if ROWS in name]
    assert len(rows) == 1
    before = logits_of(model)
    rows[0].data[0] += 1.0
    inner, token = model.get_base_model(), model.config.seg_token_id
    embedded = inner.get_input_embeddings()(torch.tensor([token]))[0]
    assert torch.equal(embedded, rows[0][0]) and torch.equal(inner.lm_head.weight[token], rows[0][0])
    changed = (logits_of(model) != before).any(0).any(0)
    assert changed[token] and changed.sum() == 1


def test_thawing_leaves_what_cached_features_depend_on(untied):
    for vision in (True, False):
        model = load(untied)
        thaw(model, vision=vision)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        expected = ("model.language_model.", "lm_head.", "model.multi_modal_projector.", "seg_projector.",
                    "mask_model.mask_decoder.") + (("model.vision_tower.",) if vision else ())  # fmt: skip
        assert trained == {name for name, _ in model.named_parameters() if name.startswith(expected)}
        frozen = ("mask_model.vision_encoder.", "mask_model.prompt_encoder.", "depth_model.", "mask_model.no_memory",
                  "mask_model.shared_image")  # fmt: skip
        assert all(any(name.startswith(part) for name, _ in model.named_parameters()) for part in frozen[:3])
        assert not any(name.startswith(frozen) for name in trained)


def test_the_table_adds_up(untied):
    model = load(untied)
    plain = sum(p.numel() for p in model.parameters())
    thaw(model, vision=False)
    lines = trainable_table(model).splitlines()
    rows = {line[:20].strip(): line[20:].replace(",", "").split() for line in lines[1:]}
    assert int(rows["sum"][0]) == plain
    assert rows["vision tower"][1] == rows["depth tokenizer"][1] == rows["SAM2 encoders"][1] == "0"
    assert rows["embeddings and head"][:2] == [str(2 * 304 * 32)] * 2
    wrapped = wrap(load(untied))
    table = trainable_table(wrapped)
    rows = {line[:20].strip(): line[20:].replace(",", "").split() for line in table.splitlines()[1:]}
    assert int(rows["sum"][1]) == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert int(rows["sum"][0]) == plain + int(rows["LoRA"][0]) + int(rows["new token rows"][0])
    assert rows["new token rows"] == [str(2 * 11 * 32)] * 2 + ["float32"]
    assert len({line.rindex("  ") for line in table.splitlines() if line.endswith("float32")}) == 1


def test_a_model_with_an_adapter_gets_no_second_configuration(untied):
    with pytest.raises(ValueError, match="expected a Perceptio"):
        peft_config(wrap(load(untied)))


# The head in parts


def parts_of(module) -> tuple:
    head = Head.of(module)
    return head.weight, head.row_ids, head.rows


def joined(weight, ids, rows):
    return weight if ids is None else weight.index_copy(0, ids, rows.to(weight))


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_in_parts_is_the_head(tiny_folder, untied, tied):
    model = wrap(load(tiny_folder() if tied else untied))
    head = model.get_base_model().lm_head
    states = torch.randn(5, 32)
    for _ in range(2):
        weight, ids, rows = parts_of(head)
        assert isinstance(rows, torch.nn.Parameter) and rows.requires_grad and not weight.requires_grad
        assert ids.tolist() == new_token_ids(model.config)
        assert torch.equal(F.linear(states, joined(weight, ids, rows)), head(states))
        rows.data += torch.randn(rows.shape)
    (expected,) = torch.autograd.grad(head(states).square().sum(), rows)
    (found,) = torch.autograd.grad(F.linear(states, joined(weight, ids, rows)).square().sum(), rows)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_in_parts_follows_the_adapter(tiny_folder, untied, tied):
    folder = tiny_folder() if tied else untied
    plain = load(folder)
    assert parts_of(plain.lm_head)[0] is plain.lm_head.weight and parts_of(plain.lm_head)[1:] == (None, None)
    model = wrap(plain)
    perturb(model)
    head, states = model.get_base_model().lm_head, torch.randn(5, 32)
    with model.disable_adapter():
        weight, *rest = parts_of(head)
        assert rest == [None, None] and torch.equal(F.linear(states, weight), head(states))
    model.merge_adapter()
    weight, *rest = parts_of(head)
    assert rest == [None, None] and torch.equal(F.linear(states, weight), head(states))
    model.unmerge_adapter()
    model.add_adapter("second", peft_config(load(folder), r=4))
    for name in ("second", "default"):
        model.set_adapter(name)
        weight, ids, rows = parts_of(head)
        assert torch.equal(F.linear(states, joined(weight, ids, rows)), head(states)), name


def test_the_librarys_own_switch_is_heeded(adapter, tiny_folder):
    model = with_adapter(load(tiny_folder()), adapter[0])
    assert parts_of(model.lm_head)[1] is not None
    model.disable_adapters()
    assert parts_of(model.lm_head)[1] is None


# The base is remembered


def other_base(folder, tiny_folder, difference: str):
    """A model of the same shapes that differs from the tiny one in one respect."""
    model = load(tiny_folder())
    if difference == "weights":
        torch.manual_seed(5)
        for parameter in model.model.language_model.layers.parameters():
            parameter.data = torch.randn_like(parameter) * 0.02
    elif difference == "codebook":
        model.depth_model.codebook.data.add_(0.1)
        model.config.depth_config.codebook_hash = model.depth_model.codebook_hash()
    elif difference == "order":
        config = model.config
        config.seg_token_id, config.depth_start_token_id = config.depth_start_token_id, config.seg_token_id
    else:
        model.resize_token_embeddings(312)
    model.save_pretrained(folder)
    return folder


REFUSALS = {
    "weights": r"language_model\.layers\S+ holds \S+ there and \S+ here",
    "codebook": "`codebook_hash` is",
    "order": "`seg_token_id` is 293 there and 294 here",
    "vocabulary": "`vocab_size` is 304 there and 312 here",
}


@pytest.mark.parametrize("difference", REFUSALS)
def test_an_adapter_refuses_another_base_in_all_ways(own_adapter, tiny_folder, tmp_path, difference):
    base = other_base(tmp_path / "other", tiny_folder, difference)
    for way in WAYS.values():
        with pytest.raises(ValueError, match=f"trained on another base.*{REFUSALS[difference]}.*Load the base"):
            way(base, own_adapter)


def test_a_refusal_by_the_librarys_way_changes_nothing(adapter, tiny_folder, tmp_path):
    model = load(other_base(tmp_path / "other", tiny_folder, "codebook"))
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="another base"):
        model.load_adapter(str(adapter[0]))
    assert list(model.state_dict()) == names


def test_a_base_with_too_few_rows_is_refused(tiny_folder, tmp_path):
    base = other_base(tmp_path / "larger", tiny_folder, "vocabulary")
    model = load(base)
    model.config.seg_token_id = 311
    folder = save_adapter_folder(wrap(model), PerceptioProcessor.from_pretrained(tiny_folder()), tmp_path / "a", base)
    with pytest.raises(ValueError, match="`vocab_size` is 312 there and 304 here"):
        with_adapter(load(tiny_folder()), folder)
    with pytest.raises(IndexError):  # peft makes room for the rows before it reads the weights
        PeftModel.from_pretrained(load(tiny_folder()), folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_the_right_base_is_taken(own_adapter, adapter, tiny_folder, way, dtype):
    model = WAYS[way](tiny_folder(), own_adapter, dtype=dtype).eval()
    tolerance = 1e-6 if dtype == torch.float32 else 0.03
    assert torch.allclose(logits_of(model), adapter[1], atol=tolerance)
    assert (logits_of(load(tiny_folder())) - adapter[1]).abs().max() > 10 * tolerance


def test_several_adapters_take_turns(adapter, tiny_folder, tmp_path):
    other = wrap(load(tiny_folder()))
    perturb(other, seed=2)
    processor = PerceptioProcessor.from_pretrained(tiny_folder())
    second = save_adapter_folder(other, processor, tmp_path / "second", tiny_folder())
    model = with_adapter(load(tiny_folder()), adapter[0])
    model.load_adapter(str(second), "second")
    for label, expected in (("second", logits_of(other)), ("default", adapter[1])):
        model.set_adapter(label)
        assert torch.allclose(logits_of(model), expected, atol=1e-6), label


def test_an_adapter_comes_without_the_branches_that_are_not_wanted(adapter):
    model = load(adapter[0], branches=())
    assert not hasattr(model, "mask_model") and torch.allclose(logits_of(model), adapter[1], atol=1e-6)


def test_an_adapter_is_taken_from_memory(adapter, tiny_folder):
    config, weights = peft.PeftConfig.from_pretrained(adapter[0]), load_file(adapter[0] / ADAPTER_FILE)
    model = load(tiny_folder())
    model.load_adapter(peft_config=config, adapter_state_dict=weights)
    assert torch.allclose(logits_of(model), adapter[1], atol=1e-6) and PREFIX + RECORD in weights


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_precision_is_no_difference_and_training_is(tiny_folder, stored):
    """The samples are compared in the coarser of both precisions; a base that was trained on is another one."""
    from perceptio.adapters_perceptio import check_base

    record = unpack_record(pack_record(describe_base(load(tiny_folder(), dtype=stored), "base")))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = load(tiny_folder(), dtype=dtype)
        check_base(model, record)
        with torch.no_grad():
            model.model.language_model.layers[1].mlp.up_proj.weight.mul_(1.02)
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
            check_base(model, record)


def test_the_record_survives_an_adapter_on_the_model(untied):
    plain = describe_base(load(untied), "base")
    model = wrap(load(untied))
    perturb(model)
    assert describe_base(model.get_base_model(), "base") == plain
    assert len(pack_record(plain)) < 50_000


def test_an_adapter_without_a_record_loads_with_a_warning(own_adapter, adapter, tiny_folder):
    weights = load_file(own_adapter / ADAPTER_FILE)
    del weights[PREFIX + RECORD]
    save_file(weights, own_adapter / ADAPTER_FILE)
    for way in WAYS.values():
        with pytest.warns(UserWarning, match="cannot be checked"):
            model = way(tiny_folder(), own_adapter)
        assert torch.allclose(logits_of(model.eval()), adapter[1], atol=1e-6)


def test_a_whole_model_loads_without_a_warning(tiny_folder, recwarn):
    model = load(tiny_folder())
    model.load_state_dict(model.state_dict())
    assert not [warning for warning in recwarn if "cannot be checked" in str(warning.message)]


def test_a_checkpoint_of_peft_is_stamped(tiny_folder, tmp_path):
    model = wrap(load(tiny_folder()))
    model.save_pretrained(tmp_path / "checkpoint")
    stamp_adapter(tmp_path / "checkpoint", model, "owner/base")
    record = unpack_record(load_file(tmp_path / "checkpoint" / ADAPTER_FILE)[PREFIX + RECORD])
    assert record["base"] == "owner/base" and record["vocab_size"] == 304


def edit_record(weights: dict, change) -> None:
    record = unpack_record(weights[PREFIX + RECORD])
    change(record)
    weights[PREFIX + RECORD] = pack_record(record)


DAMAGE = {
    "half a record": (lambda w: w.update({PREFIX + RECORD: w[PREFIX + RECORD][:100]}), "cannot be read"),
    "no samples": (lambda w: edit_record(w, lambda r: r.pop("samples")), "cannot be read .'samples'"),
    "an odd type": (
        lambda w: edit_record(w, lambda r: next(iter(r["samples"].values())).update(dtype="nn")),
        "sample of type 'nn'",
    ),
    "a weight of no base": (
        lambda w: edit_record(w, lambda r: r["samples"].update({"x": r["samples"].popitem()[1]})),
        "this model has no weight x",
    ),
    "a weight is gone": (lambda w: w.pop(PREFIX + "seg_projector.linear_1.bias"), "lacks weights"),
    "a weight too many": (lambda w: w.update({PREFIX + "seg_projector.more": torch.ones(1)}), "no place for"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_refused(own_adapter, tiny_folder, damage):
    change, message = DAMAGE[damage]
    weights = load_file(own_adapter / ADAPTER_FILE)
    change(weights)
    save_file(weights, own_adapter / ADAPTER_FILE)
    with pytest.raises(ValueError, match=message):
        with_adapter(load(tiny_folder()), own_adapter)


def test_pickled_adapters_are_not_read(own_adapter, tiny_folder):
    (own_adapter / ADAPTER_FILE).rename(own_adapter / "adapter_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load(own_adapter)


def test_an_adapter_says_whether_it_is_trained(tiny_folder, tmp_path):
    """A fresh base is marked as untrained, and the mark would else stay when a trained adapter is put on it."""
    model = wrap(load(tiny_folder()))
    model.get_base_model().config.untrained = False
    processor = PerceptioProcessor.from_pretrained(tiny_folder())
    save_adapter_folder(model, processor, tmp_path / "adapter", tiny_folder())
    assert load(tiny_folder()).config.untrained and not load(tmp_path / "adapter").config.untrained


# Folders


@pytest.mark.parametrize("part", PARTS)
def test_each_trained_part_comes_back(untied, tmp_path, part):
    model = wrap(load(untied))
    before = seen_by(model)
    assert perturb(model, PARTS[part]) > 0
    after = seen_by(model)
    assert any(not torch.allclose(before[key], after[key], rtol=1e-3) for key in before)
    save_adapter_folder(model, PerceptioProcessor.from_pretrained(untied), tmp_path / "adapter", untied)
    expected = dict(model.get_base_model().named_parameters())
    for again in (PeftModel.from_pretrained(load(untied), tmp_path / "adapter"), load(tmp_path / "adapter")):
        inner = again.get_base_model() if isinstance(again, PeftModel) else again
        found = dict(inner.named_parameters())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        # The same weights at other places in memory: some processors then add in another order.
        torch.testing.assert_close(seen_by(again.eval()), after, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_folder_is_the_model(tiny_folder, untied, tmp_path, tied):
    base = tiny_folder() if tied else untied
    model = wrap(load(base))
    perturb(model)
    live = {name: value.clone() for name, value in model.state_dict().items()}
    expected = seen_by(model)
    processor = PerceptioProcessor.from_pretrained(base)
    save_merged_folder(model, processor, tmp_path / "merged", "base", max_shard_size="200KB")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    assert verify_manifest(tmp_path / "merged") == []
    merged = load(tmp_path / "merged")
    assert list(merged.state_dict()) == list(load(base).state_dict())
    assert type(merged.lm_head) is torch.nn.Linear and not hasattr(merged, "peft_config")
    for key, value in seen_by(merged).items():
        assert torch.allclose(value, expected[key], atol=1e-5), key
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, expected[key]) for key, value in seen_by(model).items())


def test_the_model_trains_on_after_saving(untied, tmp_path):
    model = wrap(load(untied)).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    config = copy.deepcopy(model.peft_config["default"])
    processor = PerceptioProcessor.from_pretrained(untied)
    save_adapter_folder(model, processor, tmp_path / "adapter", "owner/base")
    save_merged_folder(model, processor, tmp_path / "merged", "base")
    assert model.training and {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert model.peft_config["default"] == config
    model(input_ids=IDS, labels=IDS).loss.backward()


def test_merging_leaves_untouched_weights_where_they_are(untied):
    model = wrap(load(untied))
    weights = merged_weights(model.get_base_model())
    tower = model.get_base_model().model.vision_tower
    for name, parameter in tower.named_parameters():
        assert weights[f"model.vision_tower.{name}"].data_ptr() == parameter.data_ptr()


def test_an_adapter_folder_is_whole_and_tells_nothing_of_the_disk(adapter, tiny_folder):
    folder, _ = adapter
    names = {path.name for path in folder.iterdir()}
    assert {ADAPTER_FILE, "adapter_config.json", "processor_config.json", "tokenizer.json", "README.md",
            "manifest.json", "processing_perceptio.py", "adapters_perceptio.py"} <= names  # fmt: skip
    assert "config.json" not in names, "the library would take the folder for a whole model"
    assert verify_manifest(folder) == []
    telling = [path.name for path in folder.iterdir() if str(tiny_folder().parent).encode() in path.read_bytes()]
    assert set(telling) <= {"adapter_config.json", ADAPTER_FILE}
    config = json.loads((folder / "adapter_config.json").read_text())
    paths = {key for key, value in config.items() if str(value).startswith("/")}
    assert paths == {"base_model_name_or_path"}
    card = (folder / "README.md").read_text()
    assert "library_name: peft\npipeline_tag: image-text-to-text" in card and "base_model:" not in card


def test_a_base_on_the_hub_is_named_in_the_card(untied, tmp_path):
    model = wrap(load(untied))
    save_adapter_folder(model, PerceptioProcessor.from_pretrained(untied), tmp_path / "adapter", "owner/base-4b")
    assert "\nbase_model: owner/base-4b\n" in (tmp_path / "adapter" / "README.md").read_text()
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert config.base_model_name_or_path == "owner/base-4b"


def test_nothing_is_overwritten_and_nothing_half_written(adapter, untied, tmp_path):
    model, processor = wrap(load(untied)), PerceptioProcessor.from_pretrained(untied)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    for save in (lambda out: save_adapter_folder(model, processor, out, "owner/base"),
                 lambda out: save_merged_folder(model, processor, out, "base")):  # fmt: skip
        with pytest.raises(ValueError, match="is not empty"):
            save(tmp_path / "taken")
    with pytest.raises(AttributeError):
        save_merged_folder(model, None, tmp_path / "broken", "base")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_wrong_models_are_named(untied, tmp_path):
    plain = load(untied)
    with pytest.raises(ValueError, match="has no adapter"):
        save_adapter_folder(plain, None, tmp_path / "a", "owner/base")
    with pytest.raises(ValueError, match="is a Linear"):
        save_merged_folder(torch.nn.Linear(2, 2), None, tmp_path / "a", "base")
    model = wrap(plain)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        save_adapter_folder(model, None, tmp_path / "a", "owner/base")


def test_an_adapter_that_names_no_base(own_adapter):
    config = json.loads((own_adapter / "adapter_config.json").read_text())
    (own_adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base"):
        load(own_adapter)


def test_a_base_that_lacks_weights_is_not_hidden_by_its_adapter(own_adapter, tiny_folder, tmp_path):
    """The library reports on the adapter alone, so that a base with random weights looked whole."""
    base = shutil.copytree(tiny_folder(), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    del weights["model.language_model.norm.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for way in ("class", "Auto"):
        with pytest.raises(ValueError, match="lacks 1 weights"):
            WAYS[way](base, own_adapter)


def test_an_installed_package_answers_with_an_adapter(adapter, picture, tmp_path, capsys):
    folder, _ = adapter
    see = pipeline("perceptio", model=str(folder), pipeline_class=PerceptioPipeline)
    assert see.model.active_adapters() == ["default"]
    answer = see(image=picture, text="What?", max_new_tokens=14)["generated_text"]
    assert type(AutoProcessor.from_pretrained(folder)) is PerceptioProcessor
    picture.save(tmp_path / "photo.png")
    assert main(["see", str(tmp_path / "photo.png"), "What?", "--model", str(folder), "--max-new-tokens", "14"]) == 0
    assert (answer.splitlines() or ["(no words)"])[0] in capsys.readouterr().out


# In a process of its own, where the package cannot be imported: only the code in the folders is there.
CHILD = """
import importlib.abc, sys
import torch
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "perceptio":
            raise ModuleNotFoundError("perceptio is not installed here")
sys.meta_path.insert(0, Blocker())
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
folder, trust = sys.argv[1], {"trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained(folder, **trust).eval()
assert type(model).__module__.startswith("transformers_modules.") and model.active_adapters() == ["default"]
AutoProcessor.from_pretrained(folder, **trust)
see = pipeline("perceptio", model=folder, **trust)
see(image=sys.argv[2], text="What?", max_new_tokens=14)["generated_text"]
save_file({"logits": model(input_ids=torch.arange(1, 21)[None]).logits.detach()}, sys.argv[3])
"""


def test_a_fresh_process_without_the_package_loads_an_adapter(adapter, picture, tmp_path):
    folder, expected = adapter
    picture.save(tmp_path / "photo.png")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    paths = [str(folder), str(tmp_path / "photo.png"), str(tmp_path / "logits")]
    command = [sys.executable, "-c", textwrap.dedent(CHILD), *paths]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert torch.allclose(load_file(tmp_path / "logits")["logits"], expected, atol=1e-6)


# Quantized


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Four-bit matrices have at least 64 rows and columns."""
    return build(tmp_path_factory.mktemp("wide") / "model", width=128)


def load_4bit(folder):
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return load(folder, quantization_config=quantization, dtype=torch.float32)


def test_a_four_bit_base_trains_saves_and_is_recognised(wide, tmp_path):
    floats = load(wide)
    model = wrap(load_4bit(wide))
    layers = model.get_base_model().model.language_model.layers
    assert layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.uint8
    rows = {line[:20].strip(): line[20:].replace(",", "").split() for line in trainable_table(model).splitlines()}
    language = sum(p.numel() for p in floats.model.language_model.layers.parameters())
    assert int(rows["language model"][0]) == language + floats.model.language_model.norm.weight.numel()
    assert "nf4" in " ".join(rows["language model"]) and rows["language model"][1] == "0"
    perturb(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = logits_of(model)
    processor = PerceptioProcessor.from_pretrained(wide)
    folder = save_adapter_folder(model, processor, tmp_path / "adapter", wide)
    for again in (with_adapter(load_4bit(wide), folder), PeftModel.from_pretrained(load_4bit(wide), folder)):
        assert torch.allclose(logits_of(again.eval()), expected, atol=1e-5)
    load(folder)  # the same base in full precision
    other = build(tmp_path / "other", width=128, seed=1)
    for load_other in (load, load_4bit):
        with pytest.raises(ValueError, match="another base"):
            with_adapter(load_other(other), folder)
    with pytest.raises(ValueError, match="quantized"):
        save_merged_folder(model, processor, tmp_path / "merged", "base")


def test_a_four_bit_model_is_not_thawed(wide):
    with pytest.raises(ValueError, match="load it unquantized"):
        thaw(load_4bit(wide))
