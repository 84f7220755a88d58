"""SAM2 weights, in transformers' layout or in Meta's, as the weights of transformers' `Sam2Model`.

Only what an image needs is taken: the parts that follow an object through a video are ignored by name.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Sam2Config

from .weights import Recipe, SafetensorsFolder

# Video memory: not part of Sam2Model. By prefix, in Meta's names and in transformers'.
IGNORED_META = (
    "memory_attention.", "memory_encoder.", "maskmem_tpos_enc", "mask_downsample.", "no_mem_pos_enc", "no_obj_ptr",
    "no_obj_embed_spatial", "obj_ptr_proj.", "obj_ptr_tpos_proj.",
)  # fmt: skip
IGNORED_TRANSFORMERS = (
    "memory_attention.", "memory_encoder.", "memory_temporal_positional_encoding", "mask_downsample.",
    "no_memory_positional_encoding", "no_object_pointer", "object_pointer_proj.",
    "occlusion_spatial_embedding_parameter", "temporal_positional_encoding_projection_layer.",
)  # fmt: skip


class Variant(NamedTuple):
    """A published size: width and heads of the first stage, then per stage the blocks and the side of a window, the
    blocks that look at the whole picture, and the side of the position table."""

    width: int
    heads: int
    blocks: tuple[int, ...]
    windows: tuple[int, ...]
    whole: tuple[int, ...]
    background: int


# Width of the first stage and number of blocks tell the four published sizes apart; windows and the blocks that look
# at the whole picture show in no tensor's shape.
VARIANTS = {
    "tiny": Variant(96, 1, (1, 2, 7, 2), (8, 4, 14, 7), (5, 7, 9), 7),
    "small": Variant(96, 1, (1, 2, 11, 2), (8, 4, 14, 7), (7, 10, 13), 7),
    "base-plus": Variant(112, 2, (2, 3, 16, 3), (8, 4, 14, 7), (12, 16, 20), 14),
    "large": Variant(144, 2, (2, 6, 36, 4), (8, 4, 16, 8), (23, 33, 43), 7),
}
SHARED_POSITION = "shared_image_embedding.positional_embedding"
PROMPT_POSITION = "prompt_encoder.shared_embedding.positional_embedding"
META_POSITION = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
META_POINTS = re.compile(r"sam_prompt_encoder\.point_embeddings\.(\d+)\.weight")
# Layers of a feed-forward head: the first and the last have names of their own, those between are counted from zero.
META_HEADS = re.compile(
    r"(?P<head>.*(?:\.mlp|hypernetworks_mlps\.\d+|iou_prediction_head|pred_obj_score_head))\.layers\.(?P<i>\d+)\."
)
META_NAMES = [
    (r"^image_encoder\.trunk\.patch_embed\.proj\.", "vision_encoder.backbone.patch_embed.projection."),
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"^sam_prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"^sam_prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"^sam_prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"^sam_prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"^sam_prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"^sam_prompt_encoder\.", "prompt_encoder."),
    (r"^sam_mask_decoder\.output_upscaling\.0\.", "mask_decoder.upscale_conv1."),
    (r"^sam_mask_decoder\.output_upscaling\.1\.", "mask_decoder.upscale_layer_norm."),
    (r"^sam_mask_decoder\.output_upscaling\.3\.", "mask_decoder.upscale_conv2."),
    (r"^sam_mask_decoder\.transformer\.norm_final_attn\.", "mask_decoder.transformer.layer_norm_final_attn."),
    (r"^sam_mask_decoder\.", "mask_decoder."),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
]


def is_meta_layout(keys: Iterable[str]) -> bool:
    return any(key.startswith("image_encoder.trunk.") for key in keys)


def plan_sam2(keys: Iterable[str]) -> tuple[dict[str, Recipe], set[str]]:
    """(recipes for the keys of `Sam2Model`, source keys that are ignored), for either layout."""
    keys = set(keys)
    meta = is_meta_layout(keys)
    ignored = {key for key in keys if key.startswith(IGNORED_META if meta else IGNORED_TRANSFORMERS)}
    plan = _plan_meta(keys - ignored) if meta else {key: Recipe((key,)) for key in keys - ignored}
    # One tensor in the model, which some versions of transformers save once.
    if SHARED_POSITION in plan:
        plan.setdefault(PROMPT_POSITION, plan[SHARED_POSITION])
    return plan, ignored


def _plan_meta(keys: set[str]) -> dict[str, Recipe]:
    deepest = {}
    for match in filter(None, map(META_HEADS.match, keys)):
        deepest[match["head"]] = max(deepest.get(match["head"], 0), int(match["i"]))
    points = sorted(
        (key for key in keys if META_POINTS.fullmatch(key)), key=lambda key: int(META_POINTS.match(key)[1])
    )
    plan = {_rename_meta(key, deepest): Recipe((key,)) for key in keys - {META_POSITION} - set(points)}
    if META_POSITION in keys:
        plan[SHARED_POSITION] = plan[PROMPT_POSITION] = Recipe((META_POSITION,))
    if points:
        plan["prompt_encoder.point_embed.weight"] = Recipe(tuple(points), lambda *rows: torch.cat(rows))
    return plan


def _rename_meta(key: str, deepest: Mapping[str, int]) -> str:
    match = META_HEADS.match(key)
    if match:
        i, last = int(match["i"]), deepest[match["head"]]
        layer = "proj_in" if i == 0 else "proj_out" if i == last else f"layers.{i - 1}"
        key = f"{match['head']}.{layer}.{key[match.end() :]}"
    for pattern, name in META_NAMES:
        key = re.sub(pattern, name, key)
    return key


def sam2_config(variant: str) -> Sam2Config:
    """The configuration of a published SAM2.1 size: tiny, small, base-plus or large."""
    if variant not in VARIANTS:
        raise ValueError(f"`variant` is {variant!r}, expected one of {tuple(VARIANTS)}")
    facts = VARIANTS[variant]
    widths = [facts.width * 2**i for i in range(4)]
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": facts.width,
        "num_attention_heads": facts.heads,
        "blocks_per_stage": list(facts.blocks),
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [facts.heads * 2**i for i in range(4)],
        "window_size_per_stage": list(facts.windows),
        "global_attention_blocks": list(facts.whole),
        "window_positional_embedding_background_size": [facts.background] * 2,
    }
    vision = {"backbone_config": backbone, "backbone_channel_list": widths[::-1]}
    return Sam2Config(vision_config=vision, prompt_encoder_config={}, mask_decoder_config={})


def config_of_meta(weights: Mapping[str, Tensor]) -> Sam2Config:
    """Which published size a Meta checkpoint is."""
    width = weights["image_encoder.trunk.patch_embed.proj.bias"].shape[0]
    blocks = len({key.split(".")[3] for key in weights if key.startswith("image_encoder.trunk.blocks.")})
    for variant, facts in VARIANTS.items():
        if (facts.width, sum(facts.blocks)) == (width, blocks):
            return sam2_config(variant)
    known = ", ".join(f"{name} ({facts.width}, {sum(facts.blocks)})" for name, facts in VARIANTS.items())
    raise ValueError(
        f"the SAM2 checkpoint has a first stage {width} wide and {blocks} blocks, expected one of {known}: windows "
        "cannot be read off the weights, so convert another size to transformers' layout with its configuration first"
    )


def load_meta_checkpoint(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of one of Meta's `.pt` files, read as tensors only and compared with `sha256` first where given."""
    if sha256 is not None:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        found = digest.hexdigest()
        if found != sha256.lower():
            raise ValueError(f"{path} has SHA-256 {found}, expected {sha256}: download it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a zip, pickle or I/O error, each of a type of its own
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors ({type(error).__name__}: {str(error)[:200]}): "
            "nothing else is ever unpickled"
        ) from error
    tensors = content.get("model") if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} holds no dict of tensors under 'model', which Meta's SAM2 checkpoints have")
    return tensors


def open_sam2(
    source: Path, config: Sam2Config | None = None, sha256: str | None = None
) -> tuple[Sam2Config, Mapping[str, Tensor]]:
    """(configuration, tensors) of a transformers folder, or of one of Meta's `.pt` files (then `config` counts)."""
    if source.is_file():
        weights = load_meta_checkpoint(source, sha256)
        if not is_meta_layout(weights):
            raise ValueError(f"{source} has no key image_encoder.trunk.*, which Meta's SAM2 checkpoints have")
        return config or config_of_meta(weights), weights
    return read_sam2_config(source / "config.json"), SafetensorsFolder(source)


def read_sam2_config(path: Path) -> Sam2Config:
    """The image part of a `sam2` or `sam2_video` configuration (the published folders say the latter)."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: name a folder in transformers' layout, or Meta's .pt file itself")
    values = json.loads(path.read_text(encoding="utf-8"))
    kind = values.get("model_type")
    if kind not in ("sam2", "sam2_video"):
        raise ValueError(f"{path} has `model_type` {kind!r}, expected 'sam2' or 'sam2_video'")
    parts = {}
    for name in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
        part = dict(values.get(name) or {})
        if name != "vision_config":
            part.pop("model_type", None)
        parts[name] = part
    return Sam2Config(**parts)
