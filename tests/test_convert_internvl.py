"""The original InternVL layout against a small reference of its published network, written here from the layout."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import InternVLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

from perceptio.hub.convert_internvl import (
    EMBEDDING,
    HEAD,
    convert_config,
    convert_text_config,
    is_tied,
    plan_internvl,
    read_config,
)
from perceptio.hub.layouts import LAYOUTS, internvl_config, internvl_shapes
from perceptio.hub.weights import SafetensorsFolder, Shaped, check_plan

IMAGE_TOKEN = 90


def original_config(architecture="InternLM2ForCausalLM", **text):
    values = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "rope_scaling": None, "bias": False, "architectures": [architecture], **text,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "hidden_act": "gelu", "layer_norm_eps": 1e-6, "norm_type": "layer_norm", "image_size": 16, "patch_size": 4,
        "num_channels": 3, "qkv_bias": True, "qk_normalization": False,
    }  # fmt: skip
    return {**internvl_config("2b"), "vision_config": vision, "llm_config": values, "force_image_size": 16}


def random_weights(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) * 0.2 + (1.0 if "norm" in key else 0.0)
        for key, shape in internvl_shapes(config).items()
    }


def convert(values, weights):
    config = convert_config(values)
    plan, _ = plan_internvl(weights, config, original=True)
    config.tie_word_embeddings = is_tied(plan, weights)
    config.image_token_id = IMAGE_TOKEN
    model = InternVLForConditionalGeneration(config).eval()
    model.load_state_dict({key: recipe(weights) for key, recipe in plan.items()}, strict=True)
    return model


class Reference:
    """The original network as functions of its own keys: InternViT, `mlp1`, InternLM2 with fused `wqkv`."""

    def __init__(self, config, weights):
        self.vision, self.text, self.weights = config["vision_config"], config["llm_config"], weights

    def affine(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def layer_norm(self, name, x, eps):
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    def rms_norm(self, name, x):
        scale = (x.square().mean(-1, keepdim=True) + self.text["rms_norm_eps"]).rsqrt()
        return x * scale * self.weights[f"{name}.weight"]

    def look(self, pixels):
        """float[T, 3, H, W] → float[T, patches + 1, D]."""
        name, c = "vision_model.embeddings", self.vision
        weight, bias = self.weights[f"{name}.patch_embedding.weight"], self.weights[f"{name}.patch_embedding.bias"]
        patches = F.conv2d(pixels, weight, bias, stride=c["patch_size"]).flatten(2).transpose(1, 2)
        first = self.weights[f"{name}.class_embedding"].expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], dim=1) + self.weights[f"{name}.position_embedding"]
        b, n, d = x.shape
        for i in range(c["num_hidden_layers"]):
            layer = f"vision_model.encoder.layers.{i}"
            qkv = self.affine(f"{layer}.attn.qkv", self.layer_norm(f"{layer}.norm1", x, 1e-6))
            q, k, v = qkv.view(b, n, 3, c["num_attention_heads"], -1).permute(2, 0, 3, 1, 4)
            seen = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
            x = x + self.weights[f"{layer}.ls1"] * self.affine(
                f"{layer}.attn.proj", seen.transpose(1, 2).reshape(b, n, d)
            )
            inner = F.gelu(self.affine(f"{layer}.mlp.fc1", self.layer_norm(f"{layer}.norm2", x, 1e-6)))
            x = x + self.weights[f"{layer}.ls2"] * self.affine(f"{layer}.mlp.fc2", inner)
        return x

    def project(self, x):
        """float[T, patches + 1, D] → float[T, patches / 4, width]: four neighbours side by side, then `mlp1`."""
        x = x[:, 1:]
        side = math.isqrt(x.shape[1])
        # A merged patch holds its 2 x 2 neighbours row by row; the merged grid keeps rows and columns in place.
        x = x.view(len(x), side // 2, 2, side // 2, 2, -1).transpose(2, 3).reshape(len(x), (side // 2) ** 2, -1)
        x = self.affine("mlp1.1", self.layer_norm("mlp1.0", x, 1e-5))
        return self.affine("mlp1.3", F.gelu(x))

    def turn(self, x):
        """Rotary positions on float[B, heads, L, width]: the two halves of a head make the pairs."""
        length, width = x.shape[-2:]
        base, limit, scaling = self.text["rope_theta"], self.text["max_position_embeddings"], self.text["rope_scaling"]
        positions = torch.arange(length).float()
        if scaling and scaling["type"] == "linear":
            positions = positions / scaling["factor"]
        if scaling and scaling["type"] == "dynamic" and length > limit:
            factor = scaling["factor"]
            base = base * (factor * length / limit - (factor - 1)) ** (width / (width - 2))
        angles = torch.outer(positions, base ** -(torch.arange(0, width, 2) / width))
        first, second = x[..., : width // 2], x[..., width // 2 :]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def write(self, x):
        """Embedded tokens float[B, L, D] → logits float[B, L, V]."""
        c, name = self.text, "language_model.model"
        groups, width = c["num_key_value_heads"], c["hidden_size"] // c["num_attention_heads"]
        queries = c["num_attention_heads"] // groups
        b, n, d = x.shape
        mask = torch.full((n, n), -torch.inf).triu(1)
        for i in range(c["num_hidden_layers"]):
            layer = f"{name}.layers.{i}"
            fused = self.affine(f"{layer}.attention.wqkv", self.rms_norm(f"{layer}.attention_norm", x))
            fused = fused.view(b, n, groups, queries + 2, width)
            q = self.turn(fused[:, :, :, :queries].flatten(2, 3).transpose(1, 2))
            k = self.turn(fused[:, :, :, queries].transpose(1, 2)).repeat_interleave(queries, 1)
            v = fused[:, :, :, queries + 1].transpose(1, 2).repeat_interleave(queries, 1)
            seen = (q @ k.mT / math.sqrt(width) + mask).softmax(-1) @ v
            x = x + self.affine(f"{layer}.attention.wo", seen.transpose(1, 2).reshape(b, n, d))
            y = self.rms_norm(f"{layer}.ffn_norm", x)
            y = F.silu(self.affine(f"{layer}.feed_forward.w1", y)) * self.affine(f"{layer}.feed_forward.w3", y)
            x = x + self.affine(f"{layer}.feed_forward.w2", y)
        return self.affine("language_model.output", self.rms_norm(f"{name}.norm", x))

    def __call__(self, ids, pixels):
        x = self.weights["language_model.model.tok_embeddings.weight"][ids]
        x[ids == IMAGE_TOKEN] = self.project(self.look(pixels)).flatten(0, 1)
        return self.write(x)


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"bias": True},
        {"num_attention_heads": 8, "num_key_value_heads": 2},
        {"rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
    ],
    ids=["plain", "bias", "four-queries-a-group", "dynamic-ntk-beyond-its-length", "linear-scaling"],
)
@torch.no_grad()
def test_internlm2_with_pictures_equals_the_original_network(text):
    values = original_config(**text)
    weights = random_weights(values)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 80, (2, 20), generator=generator)
    ids[:, 3:7] = IMAGE_TOKEN
    pixels = torch.randn(2, 3, 16, 16, generator=generator)

    expected = Reference(values, weights)(ids, pixels)
    model = convert(values, weights)

    assert model.config.tie_word_embeddings is False
    found = model(input_ids=ids, pixel_values=pixels).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_qwen2_in_the_original_layout_equals_the_library():
    values = original_config("Qwen2ForCausalLM")
    weights = random_weights(values)
    text = {key: value for key, value in values["llm_config"].items() if key not in ("architectures", "bias")}
    theta = text.pop("rope_theta")
    text.pop("rope_scaling")
    rope = {"rope_type": "default", "rope_theta": theta}
    source = Qwen2ForCausalLM(Qwen2Config(**text, rope_parameters=rope, tie_word_embeddings=False)).eval()
    prefix = "language_model."
    source.load_state_dict(
        {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    )
    ids = torch.randint(0, 80, (2, 12), generator=torch.Generator().manual_seed(1))

    assert torch.equal(convert(values, weights)(input_ids=ids).logits, source(input_ids=ids).logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_sizes_have_a_target_for_every_key_and_the_public_parameter_count(layout):
    values = internvl_config(layout)
    shapes = internvl_shapes(values)
    config = convert_config(values)
    plan, ignored = plan_internvl(shapes, config, original=True)
    with torch.device("meta"):
        targets = InternVLForConditionalGeneration(config).state_dict()
    check_plan(layout, plan, shapes, targets, ignored)
    assert not ignored
    assert {key: recipe(Shaped(shapes)).shape for key, recipe in plan.items()} == {
        key: value.shape for key, value in targets.items()
    }

    def total(prefix=""):
        return sum(math.prod(shape) for key, shape in shapes.items() if key.startswith(prefix))

    assert round(total("vision_model") / 1e6, 2) == 304.01
    assert round(total() / 1e6) == {"1b": 938, "2b": 2206, "4b": 3713, "8b": 8075}[layout]
    if layout == "1b":  # Qwen2.5-0.5B has 494,032,768 numbers with 151,936 rows, tied
        head = total("language_model.lm_head")
        assert total("language_model") - head + (151_936 - 151_674) * 896 == 494_032_768


def test_dynamic_rope_scaling_is_kept():
    rope = convert_text_config(internvl_config("8b")["llm_config"]).rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("dynamic", 2.0, 1e6)


def test_equal_output_rows_are_tied_and_others_are_not():
    values = original_config("Qwen2ForCausalLM")
    weights = random_weights(values)
    plan, _ = plan_internvl(weights, convert_config(values), original=True)
    assert not is_tied(plan, weights)
    weights["language_model.lm_head.weight"] = weights["language_model.model.embed_tokens.weight"].clone()
    assert is_tied(plan, weights)
    del weights["language_model.lm_head.weight"]
    assert is_tied(plan_internvl(weights, convert_config(values), original=True)[0], weights)


@pytest.mark.parametrize("old_names", [False, True], ids=["today", "before-4.53"])
def test_transformers_layout_of_either_age(tmp_path, old_names):
    values = original_config()
    model = convert(values, random_weights(values))
    state = model.state_dict()
    if old_names:
        state = {_name_before_453(key): value for key, value in state.items()}
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)

    config, original = read_config(tmp_path)
    weights = SafetensorsFolder(tmp_path)
    plan, ignored = plan_internvl(weights, config, original)

    assert not original and not ignored
    check_plan("backbone", plan, weights, model.state_dict(), ignored)
    for key, value in model.state_dict().items():
        assert torch.equal(plan[key](weights), value)


def _name_before_453(key):
    if key == HEAD:
        return "language_model.lm_head.weight"
    key = key.removeprefix("model.")
    return key.replace("language_model.", "language_model.model.", 1) if key.startswith("language_model.") else key


def test_leftover_and_missing_keys_are_named():
    values = original_config()
    weights = random_weights(values)
    weights["language_model.model.layers.0.attention.surprise"] = torch.zeros(1)
    weights["language_model.model.layers.0.attention.rotary_emb.inv_freq"] = torch.zeros(4)
    del weights["mlp1.3.bias"]
    config = convert_config(values)
    plan, ignored = plan_internvl(weights, config, original=True)
    targets = InternVLForConditionalGeneration(config).state_dict()

    assert ignored == {"language_model.model.layers.0.attention.rotary_emb.inv_freq"}
    with pytest.raises(
        ValueError, match=r"left over.*attention\.surprise.*made by nothing.*projector\.linear_2\.bias"
    ):
        check_plan("backbone", plan, weights, targets, ignored)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architectures", ["Phi3ForCausalLM"], "Phi3ForCausalLM.*InternLM2ForCausalLM.*Qwen2ForCausalLM"),
        ("ps_version", "v1", "ps_version"),
        ("select_layer", -4, "select_layer"),
        ("force_image_size", 224, "force_image_size"),
    ],
)
def test_other_wiring_is_refused_by_name(field, value, message):
    values = copy.deepcopy(original_config())
    (values["llm_config"] if field == "architectures" else values)[field] = value
    with pytest.raises(ValueError, match=message):
        convert_config(values)


def test_fused_rows_of_another_size_are_refused():
    values = original_config()
    weights = random_weights(values)
    values["llm_config"]["num_key_value_heads"] = 4
    plan, _ = plan_internvl(weights, convert_config(values), original=True)
    with pytest.raises(ValueError, match="wqkv"):
        plan["model.language_model.layers.0.self_attn.q_proj.weight"](weights)


def test_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ValueError, match="llava"):
        read_config(tmp_path)
    assert EMBEDDING not in plan_internvl(["lm_head.weight"], None, original=False)[0]
