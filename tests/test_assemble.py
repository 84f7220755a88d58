"""Folders put together from small random parts: the sources' numbers, whole or not at all."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Sam2Model,
)

from perceptio.configuration_perceptio import PerceptioConfig, PerceptioDepthConfig
from perceptio.hub import assemble as assembling
from perceptio.hub.assemble import GrowRows, add_parser, assemble, format_table, layout_blueprint, resolve
from perceptio.hub.convert_sam2 import VARIANTS, Variant
from perceptio.hub.layouts import LAYOUTS, internvl_config, internvl_shapes, sam2_shapes
from perceptio.hub.manifest import verify_manifest
from perceptio.hub.tiny import tiny_mask_config
from perceptio.modeling_depth_vqvae import DepthVQVAE
from perceptio.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio.processing_perceptio import PerceptioProcessor

CODES, PADDING_ROWS = 8, 7
ADDED = ["<|im_end|>", "<|endoftext|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"]
OLD_TOKENS = 256 + len(ADDED)
NEW_ROWS = CODES + 3


def save_tokenizer(folder):
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.add_special_tokens({"additional_special_tokens": ADDED})
    assert wrapped.convert_tokens_to_ids(ADDED) == list(range(256, OLD_TOKENS))
    wrapped.save_pretrained(folder)


def backbone_config(family, tied, rows=OLD_TOKENS):
    text = {
        "vocab_size": rows, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "image_size": 16, "patch_size": 4, "attention_bias": True,
    }  # fmt: skip
    return InternVLConfig(
        text_config={"qwen2": Qwen2Config, "llama": LlamaConfig}[family](**text),
        vision_config=vision, image_seq_length=4, image_token_id=OLD_TOKENS - 1, tie_word_embeddings=tied,
    )  # fmt: skip


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        value.data.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    return model.eval()


def save_backbone(folder, family="qwen2", tied=False, rows=OLD_TOKENS):
    model = randomise(InternVLForConditionalGeneration(backbone_config(family, tied, rows)), 1)
    model.save_pretrained(folder, max_shard_size="20KB")
    save_tokenizer(folder)
    return model


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders `qwen2`, `llama` and `tied` (backbones), `sam` and `depth`, with their models."""
    folder, found = tmp_path_factory.mktemp("parts"), {}
    found["qwen2"] = save_backbone(folder / "qwen2", "qwen2", rows=OLD_TOKENS + PADDING_ROWS)
    found["llama"] = save_backbone(folder / "llama", "llama")
    found["tied"] = save_backbone(folder / "tied", "qwen2", tied=True, rows=OLD_TOKENS + NEW_ROWS + 5)
    found["sam"] = randomise(Sam2Model(tiny_mask_config()), 2)
    found["sam"].save_pretrained(folder / "sam")
    config = PerceptioDepthConfig(
        image_size=24,
        grid_size=3,
        num_codes=CODES,
        code_dim=16,
        hidden_size=16,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_attention_heads=2,
    )
    found["depth"] = randomise(DepthVQVAE(config), 3)
    found["depth"].config.codebook_hash = found["depth"].codebook_hash()
    found["depth"].save_pretrained(folder / "depth")
    return folder, found


def build(parts, out, backbone="qwen2", **options):
    folder, _ = parts
    options = {"dtype": "float32", "depth": folder / "depth", **options}
    return assemble(folder / backbone, options.pop("sam", folder / "sam"), out, **options)


@pytest.fixture(scope="module")
def built(parts, tmp_path_factory):
    """Assembled folders of the three backbones, in shards."""
    root = tmp_path_factory.mktemp("built")
    return {name: build(parts, root / name, name, max_shard_size="100KB") for name in ("qwen2", "llama", "tied")}


@pytest.mark.parametrize("backbone", ["qwen2", "llama", "tied"])
@torch.no_grad()
def test_text_and_pictures_give_the_backbones_own_logits(parts, built, backbone):
    source = parts[1][backbone]
    model = PerceptioForConditionalGeneration.from_pretrained(built[backbone], dtype="float32").eval()
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 256, (2, 12), generator=generator)
    ids[:, 2:6] = OLD_TOKENS - 1
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    expected = source(input_ids=ids, pixel_values=pixels).logits[..., :OLD_TOKENS]
    assert torch.equal(model(input_ids=ids, pixel_values=pixels).logits[..., :OLD_TOKENS], expected)
    assert model.config.tie_word_embeddings == (backbone == "tied")


@torch.no_grad()
def test_masks_and_depth_come_from_their_sources(parts, built):
    _, sources = parts
    model = PerceptioForConditionalGeneration.from_pretrained(built["qwen2"], dtype="float32").eval()
    for branch, source in ((model.mask_model, sources["sam"]), (model.depth_model, sources["depth"])):
        expected = source.state_dict()
        found = branch.state_dict()
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    depth = torch.rand(1, 24, 24, generator=torch.Generator().manual_seed(5))
    assert torch.equal(model.depth_model(depth), sources["depth"](depth))


def test_untrained_folder_sees(built):
    """The processor, the template and the generation settings of the folder fit its model."""
    model = PerceptioForConditionalGeneration.from_pretrained(built["llama"], dtype="float32").eval()
    processor = PerceptioProcessor.from_pretrained(built["llama"])
    turn = {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (30, 20), "red")},
                                        {"type": "text", "text": "What is it?"}]}  # fmt: skip
    inputs = processor.apply_chat_template(
        [turn],
        perception="seg+depth",
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.perceive(**inputs, max_new_tokens=20)
    assert output.mask_logits.shape == (1, 16, 16) and output.depth.shape == (1, 24, 24)
    assert output.depth_codes.shape == (1, 9)
    assert processor.parse(output.sequences)[0].valid


def test_original_layouts_from_file_to_folder(parts, tmp_path, monkeypatch):
    """InternLM2 with fused rows, and Meta's `.pt`: what the converters' own tests compare arrives in the folder."""
    monkeypatch.setitem(VARIANTS, "test", Variant(8, 1, (1, 2, 2, 1), (4, 2, 2, 2), (4,), 2))
    values, generator = internvl_config("2b"), torch.Generator().manual_seed(6)
    values["vision_config"] = {
        **values["vision_config"], "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 24, "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    values["llm_config"] = {
        **values["llm_config"], "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": OLD_TOKENS,
    }  # fmt: skip
    values["force_image_size"] = 16

    def random(shapes):
        return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}

    backbone, checkpoint = tmp_path / "backbone", tmp_path / "sam.pt"
    backbone.mkdir()
    weights, masks = random(internvl_shapes(values)), random(sam2_shapes("test"))
    save_file(weights, backbone / "model.safetensors")
    (backbone / "config.json").write_text(json.dumps(values))
    save_tokenizer(backbone)
    torch.save({"model": masks}, checkpoint)

    folder = assemble(backbone, checkpoint, tmp_path / "out", parts[0] / "depth", dtype="float32")
    model = PerceptioForConditionalGeneration.from_pretrained(folder, dtype="float32")

    fused = weights["language_model.model.layers.0.attention.wqkv.weight"].view(2, 4, 8, 32)
    attention = model.model.language_model.layers[0].self_attn
    assert torch.equal(attention.q_proj.weight, fused[:, :2].reshape(32, 32))
    assert torch.equal(attention.v_proj.weight, fused[:, 3].reshape(16, 32))
    assert torch.equal(model.model.multi_modal_projector.linear_2.weight, weights["mlp1.3.weight"])
    points = [masks[f"sam_prompt_encoder.point_embeddings.{i}.weight"] for i in range(4)]
    assert torch.equal(model.mask_model.prompt_encoder.point_embed.weight, torch.cat(points))
    assert model.config.text_config.rope_parameters["rope_type"] == "dynamic"
    assert not model.config.tie_word_embeddings
    assert command(["--dry-run", "--backbone", str(backbone), "--sam", str(checkpoint)]) == 0


@pytest.mark.parametrize(
    ("backbone", "rows"),
    [
        ("qwen2", OLD_TOKENS + NEW_ROWS),  # the table had seven rows to spare
        ("llama", OLD_TOKENS + NEW_ROWS),
        ("tied", OLD_TOKENS + NEW_ROWS + 5),  # more than enough: the table keeps its length
    ],
)
def test_new_rows_start_near_the_mean(parts, built, backbone, rows):
    model = PerceptioForConditionalGeneration.from_pretrained(built[backbone], dtype="float32")
    assert model.config.text_config.vocab_size == rows
    for get in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(parts[1][backbone], get)().weight[:OLD_TOKENS], getattr(model, get)().weight
        assert new.shape[0] == rows
        assert torch.equal(new[:OLD_TOKENS], old)
        fresh = new[OLD_TOKENS:]
        assert (fresh - old.mean(0)).abs().max() < 0.1 * old.std(0).min()
        assert len(fresh.unique(dim=0)) == len(fresh)


def test_padding_rows_count_for_nothing_in_the_mean():
    old = torch.cat([torch.ones(4, 3), torch.full((2, 3), 1e6)])
    grown = GrowRows(old_tokens=4, rows=9, seed=0)(old)
    assert torch.equal(grown, torch.ones(9, 3))


def test_output_and_input_rows_get_noise_of_their_own(built):
    model = PerceptioForConditionalGeneration.from_pretrained(built["qwen2"], dtype="float32")
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert not torch.allclose(
        inputs[OLD_TOKENS:] - inputs[:OLD_TOKENS].mean(0), outputs[OLD_TOKENS:] - outputs[:OLD_TOKENS].mean(0)
    )


def test_same_seed_same_bytes(parts, built, tmp_path):
    again = build(parts, tmp_path / "again", "qwen2", max_shard_size="100KB")
    for path in sorted(built["qwen2"].glob("*.safetensors")):
        assert (again / path.name).read_bytes() == path.read_bytes()
    other = build(parts, tmp_path / "other", "qwen2", seed=1)
    assert not torch.equal(*(_tensor(folder, "seg_projector.linear_1.weight") for folder in (again, other)))


def _tensor(folder, key):
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if key in file.keys():
                return file.get_tensor(key)
    raise KeyError(key)


def test_folder_is_complete(parts, built):
    folder = built["llama"]
    assert verify_manifest(folder) == []
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    config = PerceptioConfig.from_pretrained(folder)
    assert config.untrained and config.architectures == ["PerceptioForConditionalGeneration"]
    assert config.seg_token_id == OLD_TOKENS and config.depth_code_token_ids == [OLD_TOKENS + 3, CODES]
    assert config.depth_config.codebook_hash == parts[1]["depth"].codebook_hash()
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.max_new_tokens == 9 + 2 + 512 and generation.eos_token_id == [256] and not generation.do_sample
    assert generation.pad_token_id == 257
    card = (folder / "README.md").read_text()
    assert "not trained" in card and str(parts[0]) not in card
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_folder_loads_in_a_fresh_process_without_the_package(built, tmp_path):
    """As the Hub serves it: code from the folder, nothing of ours installed."""
    code = """
import sys, torch
sys.modules["perceptio"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="float32").eval()
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model(input_ids=torch.arange(12)[None]).logits.detach().sum().item(), type(processor).__name__)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(built["qwen2"])],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    total, name = done.stdout.split()
    model = PerceptioForConditionalGeneration.from_pretrained(built["qwen2"], dtype="float32").eval()
    assert float(total) == pytest.approx(model(input_ids=torch.arange(12)[None]).logits.sum().item(), rel=1e-5)
    assert name == "PerceptioProcessor"


def test_half_precision_keeps_the_codebook(parts, tmp_path):
    """The recorded hash is of the float32 codebook, so rounding it would make the folder refuse itself."""
    folder = build(parts, tmp_path / "half", dtype="bfloat16")
    weights = load_file(folder / "model.safetensors")
    assert {value.dtype for key, value in weights.items() if key.startswith("depth_model.")} == {torch.float32}
    assert {value.dtype for key, value in weights.items() if not key.startswith("depth_model.")} == {torch.bfloat16}
    assert PerceptioForConditionalGeneration.from_pretrained(folder).dtype == torch.bfloat16
    again = PerceptioForConditionalGeneration.from_pretrained(folder, dtype="float32")
    assert again.depth_model.codebook_hash() == parts[1]["depth"].codebook_hash()


def test_without_depth_a_random_one_is_made_and_said_so(parts, tmp_path, capsys):
    folder, _ = parts
    arguments = ["--backbone", str(folder / "qwen2"), "--sam", str(folder / "sam"), "--out", str(tmp_path / "out"),
                 "--num-codes", "6"]  # fmt: skip
    assert command(arguments) == 0
    assert "random" in capsys.readouterr().out
    assert "random" in (tmp_path / "out" / "README.md").read_text()
    model = PerceptioForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="float32")
    assert model.depth_model.codebook.shape[0] == 6 and model.config.depth_config.codebook_hash


def command(arguments):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["assemble", *arguments])
    return args.run(args)


def test_existing_folder_is_kept_unless_told_otherwise(parts, tmp_path):
    out = build(parts, tmp_path / "out")
    before = (out / "config.json").read_bytes()
    with pytest.raises(ValueError, match="--overwrite"):
        build(parts, out, "llama")
    assert (out / "config.json").read_bytes() == before
    assert build(parts, out, "llama", overwrite=True) == out
    assert PerceptioConfig.from_pretrained(out).text_config.model_type == "llama"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="no Perceptio model"):
        build(parts, mine, overwrite=True)
    assert (mine / "thesis.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_failure_leaves_nothing_and_keeps_the_old_folder(parts, tmp_path, monkeypatch):
    out = build(parts, tmp_path / "out")

    def full_disk(folder, *args, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assembling, "write_shards", full_disk)
    with pytest.raises(OSError, match="No space left"):
        build(parts, out, overwrite=True)
    with pytest.raises(OSError, match="No space left"):
        build(parts, tmp_path / "new")
    assert verify_manifest(out) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_foreign_keys_and_shapes_stop_before_anything_is_written(parts, tmp_path):
    source = parts[1]["sam"].state_dict()
    for change, message in (
        ({"mask_decoder.surprise": torch.zeros(1)}, r"SAM2.*left over.*surprise"),
        ({"mask_decoder.iou_token.weight": torch.zeros(2, 32)}, r"iou_token.*\(2, 32\).*expected \(1, 32\)"),
        ({"no_memory_embedding": None}, r"SAM2.*made by nothing.*no_memory_embedding"),
    ):
        sam = tmp_path / "sam"
        parts[1]["sam"].config.save_pretrained(sam)
        changed = {key: value.clone() for key, value in {**source, **change}.items() if value is not None}
        save_file(changed, sam / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            build(parts, tmp_path / "out", sam=sam)
    assert not (tmp_path / "out").exists()


def test_damaged_sources_are_named(parts, tmp_path):
    shard = tmp_path / "broken"
    parts[1]["llama"].save_pretrained(shard, max_shard_size="20KB")
    save_tokenizer(shard)
    victim = sorted(shard.glob("model-*.safetensors"))[1]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=victim.name):
        assemble(shard, parts[0] / "sam", tmp_path / "out")
    victim.unlink()
    with pytest.raises(OSError, match=victim.name):
        assemble(shard, parts[0] / "sam", tmp_path / "out")


def test_codebook_other_than_the_recorded_one_is_refused(parts, tmp_path):
    depth = tmp_path / "depth"
    config = PerceptioDepthConfig(**{**_fields(parts[1]["depth"].config), "codebook_hash": "0" * 16})
    config.save_pretrained(depth)
    save_file(parts[1]["depth"].state_dict(), depth / "model.safetensors")
    with pytest.raises(ValueError, match="0{16}.*different depth tokenizers"):
        build(parts, tmp_path / "out", depth=depth)
    with pytest.raises(ValueError, match="num_codes.*16.*has 8"):
        build(parts, tmp_path / "out", num_codes=16)


def _fields(config):
    names = (
        "image_size", "grid_size", "num_codes", "code_dim", "hidden_size", "num_encoder_layers", "num_decoder_layers",
        "num_attention_heads",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "x", "--out", "y"], "--sam not given"),
        (["--backbone", "/nowhere", "--sam", "/nowhere", "--out", "y"], "/nowhere.*does not exist"),
        (["--dry-run", "--layout", "1b", "--backbone", "x", "--sam", "y"], "--layout, or both"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(arguments) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert re.search(message, text)


def test_hub_id_fetches_data_only_and_says_when_it_cannot(tmp_path, monkeypatch):
    asked = {}

    def fetch(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert resolve("owner/name", "--backbone") == tmp_path
    names = ("modeling.py", "weights.bin", "weights.pt", "model.safetensors", "config.json", "tokenizer.model")
    kept = [name for name in names if any(Path(name).match(pattern) for pattern in asked["owner/name"])]
    assert kept == ["model.safetensors", "config.json", "tokenizer.model"]

    def offline(name, allow_patterns):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match="--backbone.*owner/name.*no network"):
        resolve("owner/name", "--backbone")
    with pytest.raises(ValueError, match="does not exist"):
        resolve("./owner/name", "--backbone")


def test_tokenizer_without_picture_tokens_is_refused(parts, tmp_path):
    backbone = tmp_path / "backbone"
    parts[1]["llama"].save_pretrained(backbone)
    save_tokenizer(backbone)
    for path in backbone.glob("tokenizer*.json"):
        path.write_text(path.read_text().replace("<IMG_CONTEXT>", "<OTHER>"))
    with pytest.raises(ValueError, match="no token <IMG_CONTEXT>"):
        assemble(backbone, parts[0] / "sam", tmp_path / "out")


def test_code_of_a_tokenizer_is_never_run(parts, tmp_path):
    backbone = tmp_path / "backbone"
    parts[1]["llama"].save_pretrained(backbone)
    (backbone / "tokenization_mine.py").write_text("raise SystemExit('the code was run')\n")
    values = {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}, "tokenizer_class": "Mine"}
    (backbone / "tokenizer_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="without running its code.*tokenizer.json"):
        assemble(backbone, parts[0] / "sam", tmp_path / "out")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dry_run_accounts_for_every_key_of_the_published_sizes(layout, capsys):
    assert command(["--dry-run", "--layout", layout]) == 0
    text = capsys.readouterr().out
    assert "none is left over, none is missing" in text
    counts = layout_blueprint(layout).parameters()
    assert f"{sum(counts.values()):,}" in text
    assert round(counts["vision encoder"] / 1e6, 2) == 304.01
    assert round((counts["SAM2 encoder"] + counts["SAM2 decoder"]) / 1e6, 1) == 216.9
    width = LAYOUTS[layout]["hidden_size"]
    assert counts["new token rows"] == 2 * 131 * width
    assert counts["language model"] // 10**6 == {"1b": 629, "2b": 1889, "4b": 3396, "8b": 7737}[layout]


def test_table_has_both_precisions():
    total = format_table(layout_blueprint("1b")).splitlines()[-1].split()
    count = int(total[1].replace(",", ""))
    assert (float(total[2]), float(total[3])) == (round(count * 2 / 2**30, 3), round(count * 4 / 2**30, 3))
