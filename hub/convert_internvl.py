"""InternVL weights, in transformers' layout or in the original remote-code layout, as the weights of `InternVLModel`.

The original layout fuses queries, keys and values: InternViT stacks all queries, then all keys, then all values;
InternLM2 goes by groups, for each key/value head its query heads, then the key head, then the value head.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import InternVLConfig, InternVLVisionConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from .weights import Recipe, SafetensorsFolder, shape_of

HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
# Written by old versions of transformers; the positions are computed from the configuration.
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")

ARCHITECTURES = {
    "InternLM2ForCausalLM": LlamaConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "LlamaForCausalLM": LlamaConfig,
    "Qwen3ForCausalLM": Qwen3Config,
}
TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id", "head_dim", "attention_bias", "mlp_bias",
    "use_sliding_window", "sliding_window", "max_window_layers",
)  # fmt: skip
VISION_FIELDS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "hidden_act": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
    "norm_type": "norm_type",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "num_channels",
    "initializer_range": "initializer_range",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "attention_dropout": "attention_dropout",
    "dropout": "hidden_dropout_prob",
    "initializer_factor": "layer_scale_init_value",
}

TRANSFORMERS_NAMES = [  # of folders written before 4.53; newer ones have the target's own names
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
]
ORIGINAL_NAMES = [
    (r"^vision_model\.embeddings\.class_embedding$", "model.vision_tower.embeddings.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "model.vision_tower.embeddings.position_embeddings"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "model.vision_tower.embeddings.patch_embeddings.projection."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.ls(\d)$", r"model.vision_tower.encoder.layer.\1.lambda_\2"),
    (r"^vision_model\.encoder\.layers\.(\d+)\.norm1\.", r"model.vision_tower.encoder.layer.\1.layernorm_before."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.norm2\.", r"model.vision_tower.encoder.layer.\1.layernorm_after."),
    (
        r"^vision_model\.encoder\.layers\.(\d+)\.attn\.proj\.",
        r"model.vision_tower.encoder.layer.\1.attention.projection_layer.",
    ),
    (r"^vision_model\.encoder\.layers\.(\d+)\.attn\.", r"model.vision_tower.encoder.layer.\1.attention."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"model.vision_tower.encoder.layer.\1.mlp."),
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"^language_model\.(?:output|lm_head)\.", "lm_head."),
    (r"^language_model\.model\.tok_embeddings\.", "model.language_model.embed_tokens."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"(layers\.\d+)\.attention\.wqkv\.", r"\1.self_attn.qkv."),
    (r"(layers\.\d+)\.attention\.wo\.", r"\1.self_attn.o_proj."),
    (r"(layers\.\d+)\.feed_forward\.w1\.", r"\1.mlp.gate_proj."),
    (r"(layers\.\d+)\.feed_forward\.w2\.", r"\1.mlp.down_proj."),
    (r"(layers\.\d+)\.feed_forward\.w3\.", r"\1.mlp.up_proj."),
    (r"(layers\.\d+)\.attention_norm\.", r"\1.input_layernorm."),
    (r"(layers\.\d+)\.ffn_norm\.", r"\1.post_attention_layernorm."),
]


def is_original_layout(values: Mapping) -> bool:
    """Whether a `config.json` is that of the remote-code layout."""
    return "llm_config" in values


def read_config(folder: Path) -> tuple[InternVLConfig, bool]:
    """(configuration in transformers' terms, whether the weights are in the original layout). The image token's id and
    `tie_word_embeddings` are not settled here: the tokenizer and the weights know."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: name the folder of an InternVL model")
    values = json.loads(path.read_text(encoding="utf-8"))
    if is_original_layout(values):
        return convert_config(values), True
    if values.get("model_type") != "internvl":
        raise ValueError(
            f"{path} has `model_type` {values.get('model_type')!r}, expected 'internvl' (transformers' layout) or an "
            "`llm_config` (the original layout)"
        )
    return InternVLConfig.from_dict(values), False


def convert_config(values: Mapping) -> InternVLConfig:
    """The original layout's `config.json` in transformers' terms."""
    for field, expected in (("ps_version", "v2"), ("select_layer", -1)):
        if values.get(field, expected) != expected:
            raise ValueError(f"`{field}` is {values[field]!r}, expected {expected!r}: another wiring is not supported")
    vision = {
        new: values["vision_config"][old] for old, new in VISION_FIELDS.items() if old in values["vision_config"]
    }
    size, patch = values["vision_config"]["image_size"], values["vision_config"]["patch_size"]
    if values.get("force_image_size", size) not in (size, None):
        raise ValueError(
            f"`force_image_size` is {values['force_image_size']}, but the position embeddings are for "
            f"`vision_config.image_size` {size}: the two must agree"
        )
    ratio = values.get("downsample_ratio", 0.5)
    return InternVLConfig(
        vision_config=InternVLVisionConfig(**vision),
        text_config=convert_text_config(values["llm_config"]),
        downsample_ratio=ratio,
        image_seq_length=int((size // patch * ratio) ** 2),
        tie_word_embeddings=False,
    )


def convert_text_config(values: Mapping) -> PreTrainedConfig:
    """`llm_config` as the configuration of the same network in transformers."""
    architecture = (values.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"`llm_config.architectures` names {architecture!r}, expected one of {tuple(ARCHITECTURES)}: other "
            "language models are not supported"
        )
    fields = {name: values[name] for name in TEXT_FIELDS if values.get(name) is not None}
    if architecture == "InternLM2ForCausalLM":
        fields["attention_bias"] = values.get("bias", True)  # the published default of that configuration
    scaling = dict(values.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or scaling.pop("rope_type", None) or "default"
    scaling.pop("rope_type", None)
    rope = {"rope_type": kind, "rope_theta": float(values.get("rope_theta", 10000.0)), **scaling}
    return ARCHITECTURES[architecture](rope_parameters=rope, tie_word_embeddings=False, **fields)


def plan_internvl(keys: Iterable[str], config: InternVLConfig, original: bool) -> tuple[dict[str, Recipe], set[str]]:
    """(recipes for the keys of an InternVL model for generation, source keys that are ignored)."""
    ignored = {key for key in keys if IGNORED.fullmatch(key)}
    plan = {}
    for key in set(keys) - ignored:
        target = key
        for pattern, name in ORIGINAL_NAMES if original else TRANSFORMERS_NAMES:
            target = re.sub(pattern, name, target)
        if original and ".attention.qkv." in target:
            plan.update(_split(key, target, _split_vision))
        elif original and ".self_attn.qkv." in target:
            plan.update(_split(key, target, _SplitGroups(config.text_config)))
        else:
            plan[target] = Recipe((key,))
    return plan, ignored


def _split(key: str, target: str, split) -> dict[str, Recipe]:
    before, after = target.split(".qkv.")
    return {
        f"{before}.{name}_proj.{after}": Recipe((key,), lambda fused, i=i: split(fused)[i])
        for i, name in enumerate("qkv")
    }


def _split_vision(fused: Tensor) -> tuple[Tensor, ...]:
    return fused.chunk(3)


class _SplitGroups:
    """InternLM2's fused rows [g*(q + 2)*d, …] → queries [g*q*d, …], keys [g*d, …], values [g*d, …]."""

    def __init__(self, config: PreTrainedConfig):
        self.groups = config.num_key_value_heads
        self.queries = config.num_attention_heads // config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def __call__(self, fused: Tensor) -> tuple[Tensor, ...]:
        rows = self.groups * (self.queries + 2) * self.width
        if fused.shape[0] != rows:
            raise ValueError(
                f"a fused `wqkv` has {fused.shape[0]} rows, but {self.groups} groups of {self.queries} query heads, a "
                f"key and a value of width {self.width} make {rows}: the configuration belongs to other weights"
            )
        grouped = fused.unflatten(0, (self.groups, self.queries + 2, self.width))
        return grouped[:, :-2].flatten(0, 2), grouped[:, -2].flatten(0, 1), grouped[:, -1].flatten(0, 1)


def is_tied(plan: Mapping[str, Recipe], weights: Mapping[str, Tensor]) -> bool:
    """Whether the output rows are the input rows: absent or equal means tied. The tensors decide, because
    configurations of both layouts are known to say otherwise."""
    if HEAD not in plan:
        return True
    head, rows = plan[HEAD].sources[0], plan[EMBEDDING].sources[0]
    if shape_of(weights, head) != shape_of(weights, rows):
        return False
    return torch.equal(weights[head], weights[rows])


def open_internvl(folder: Path) -> tuple[InternVLConfig, bool, SafetensorsFolder]:
    config, original = read_config(folder)
    return config, original, SafetensorsFolder(folder)
