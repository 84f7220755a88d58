"""The published sizes as facts: every key and shape of the original InternVL2.5 layout and of Meta's SAM2.1 layout.

Nothing is read from a file, so a conversion can be checked key by key before anything is downloaded.
"""

from collections.abc import Mapping

from .convert_sam2 import VARIANTS, Variant

Shapes = dict[str, tuple[int, ...]]

VISION = {
    "architectures": ["InternVisionModel"], "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "norm_type": "layer_norm",
    "image_size": 448, "patch_size": 14, "num_channels": 3, "initializer_range": 0.02, "initializer_factor": 1.0,
    "qkv_bias": True, "qk_normalization": False, "attention_dropout": 0.0, "dropout": 0.0,
}  # fmt: skip
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151674, "hidden_act": "silu",
    "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rope_scaling": None, "rms_norm_eps": 1e-6,
    "use_sliding_window": False, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
INTERNLM = {
    "architectures": ["InternLM2ForCausalLM"], "vocab_size": 92553, "hidden_act": "silu",
    "max_position_embeddings": 32768, "rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rms_norm_eps": 1e-5, "bias": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip


def _language_model(family: dict, width: int, inner: int, layers: int, heads: int, groups: int) -> dict:
    return {
        **family,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }


LAYOUTS = {
    "1b": _language_model(QWEN, 896, 4864, 24, 14, 2),
    "2b": _language_model(INTERNLM, 2048, 8192, 24, 16, 8),
    "4b": _language_model(QWEN, 2048, 11008, 36, 16, 2),
    "8b": _language_model(INTERNLM, 4096, 14336, 32, 32, 8),
}
NAMES = {size: f"InternVL2.5-{size.upper()}" for size in LAYOUTS}


def internvl_config(layout: str) -> dict:
    """The original layout's `config.json`, as far as the network depends on it."""
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` is {layout!r}, expected one of {tuple(LAYOUTS)}")
    return {
        "model_type": "internvl_chat", "vision_config": VISION, "llm_config": LAYOUTS[layout], "downsample_ratio": 0.5,
        "ps_version": "v2", "select_layer": -1, "force_image_size": 448,
    }  # fmt: skip


def internvl_shapes(config: Mapping) -> Shapes:
    """Every key of a model in the original layout, from its `config.json`."""
    vision, text = config["vision_config"], config["llm_config"]
    merged = int(vision["hidden_size"] * (1 / config["downsample_ratio"]) ** 2)
    width = text["hidden_size"]
    shapes = _vision_shapes(vision)
    shapes |= _affine("mlp1.0", merged) | _affine("mlp1.1", width, merged) | _affine("mlp1.3", width, width)
    fused = text["architectures"][0] == "InternLM2ForCausalLM"
    return shapes | (_internlm2_shapes(text) if fused else _qwen2_shapes(text))


def _affine(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _vision_shapes(c: Mapping) -> Shapes:
    d, patches = c["hidden_size"], (c["image_size"] // c["patch_size"]) ** 2
    name = "vision_model.embeddings"
    shapes = {f"{name}.class_embedding": (1, 1, d), f"{name}.position_embedding": (1, patches + 1, d)}
    shapes |= _affine(f"{name}.patch_embedding", d, c["num_channels"], c["patch_size"], c["patch_size"])
    for i in range(c["num_hidden_layers"]):
        name = f"vision_model.encoder.layers.{i}"
        shapes |= {f"{name}.ls1": (d,), f"{name}.ls2": (d,)}
        shapes |= _affine(f"{name}.norm1", d) | _affine(f"{name}.norm2", d)
        shapes |= _affine(f"{name}.attn.qkv", 3 * d, d) | _affine(f"{name}.attn.proj", d, d)
        shapes |= _affine(f"{name}.mlp.fc1", c["intermediate_size"], d) | _affine(
            f"{name}.mlp.fc2", d, c["intermediate_size"]
        )
    return shapes


def _internlm2_shapes(c: Mapping) -> Shapes:
    d, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    rows = (heads + 2 * c["num_key_value_heads"]) * (d // heads)
    name = "language_model.model"
    shapes = {f"{name}.tok_embeddings.weight": (c["vocab_size"], d), f"{name}.norm.weight": (d,)}
    shapes["language_model.output.weight"] = (c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        layer = f"{name}.layers.{i}"
        shapes |= {f"{layer}.attention.wqkv.weight": (rows, d), f"{layer}.attention.wo.weight": (d, d)}
        shapes |= {f"{layer}.feed_forward.{w}.weight": (inner, d) for w in ("w1", "w3")}
        shapes[f"{layer}.feed_forward.w2.weight"] = (d, inner)
        shapes |= {f"{layer}.{norm}.weight": (d,) for norm in ("attention_norm", "ffn_norm")}
        if c["bias"]:
            shapes |= {f"{layer}.attention.wqkv.bias": (rows,), f"{layer}.attention.wo.bias": (d,)}
    return shapes


def _qwen2_shapes(c: Mapping) -> Shapes:
    d, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    shared = c["num_key_value_heads"] * (d // heads)
    name = "language_model.model"
    shapes = {f"{name}.embed_tokens.weight": (c["vocab_size"], d), f"{name}.norm.weight": (d,)}
    shapes["language_model.lm_head.weight"] = (c["vocab_size"], d)
    for i in range(c["num_hidden_layers"]):
        layer = f"{name}.layers.{i}"
        shapes |= _affine(f"{layer}.self_attn.q_proj", d, d)
        shapes |= _affine(f"{layer}.self_attn.k_proj", shared, d) | _affine(f"{layer}.self_attn.v_proj", shared, d)
        shapes |= {f"{layer}.self_attn.o_proj.weight": (d, d), f"{layer}.mlp.down_proj.weight": (d, inner)}
        shapes |= {f"{layer}.mlp.{name_}.weight": (inner, d) for name_ in ("gate_proj", "up_proj")}
        shapes |= {f"{layer}.{norm}.weight": (d,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return shapes


def sam2_shapes(variant: str = "large") -> Shapes:
    """Every key of one of Meta's SAM2.1 checkpoints."""
    facts, d = VARIANTS[variant], 256
    widths = [facts.width * 2**i for i in range(4)]
    return _hiera_shapes(facts, widths, d) | _prompt_shapes(d) | _mask_decoder_shapes(d) | _memory_shapes(d)


def _hiera_shapes(facts: Variant, widths: list[int], d: int) -> Shapes:
    name, first, side, window = "image_encoder.trunk", widths[0], facts.background, facts.windows[0]
    shapes = {f"{name}.pos_embed": (1, first, side, side), f"{name}.pos_embed_window": (1, first, window, window)}
    shapes |= _affine(f"{name}.patch_embed.proj", first, 3, 7, 7)
    i, before = 0, first
    for width, count in zip(widths, facts.blocks, strict=True):
        for _ in range(count):
            block = f"{name}.blocks.{i}"
            shapes |= _affine(f"{block}.norm1", before) | _affine(f"{block}.norm2", width)
            shapes |= _affine(f"{block}.attn.qkv", 3 * width, before) | _affine(f"{block}.attn.proj", width, width)
            shapes |= _affine(f"{block}.mlp.layers.0", 4 * width, width) | _affine(
                f"{block}.mlp.layers.1", width, 4 * width
            )
            if width != before:
                shapes |= _affine(f"{block}.proj", width, before)
            i, before = i + 1, width
    for i, width in enumerate(reversed(widths)):
        shapes |= _affine(f"image_encoder.neck.convs.{i}.conv", d, width, 1, 1)
    return shapes


def _prompt_shapes(d: int) -> Shapes:
    name = "sam_prompt_encoder"
    shapes = {f"{name}.pe_layer.positional_encoding_gaussian_matrix": (2, d // 2)}
    shapes |= {f"{name}.point_embeddings.{i}.weight": (1, d) for i in range(4)}
    shapes |= {f"{name}.{token}.weight": (1, d) for token in ("not_a_point_embed", "no_mask_embed")}
    shapes |= _affine(f"{name}.mask_downscaling.0", 4, 1, 2, 2) | _affine(f"{name}.mask_downscaling.1", 4)
    shapes |= _affine(f"{name}.mask_downscaling.3", 16, 4, 2, 2) | _affine(f"{name}.mask_downscaling.4", 16)
    return shapes | _affine(f"{name}.mask_downscaling.6", d, 16, 1, 1)


def _mask_decoder_shapes(d: int) -> Shapes:
    name = "sam_mask_decoder"
    shapes = {
        f"{name}.iou_token.weight": (1, d),
        f"{name}.obj_score_token.weight": (1, d),
        f"{name}.mask_tokens.weight": (4, d),
    }
    for i in range(2):
        layer = f"{name}.transformer.layers.{i}"
        shapes |= _attention_shapes(f"{layer}.self_attn", d, d, d)
        shapes |= _attention_shapes(f"{layer}.cross_attn_token_to_image", d, d // 2, d)
        shapes |= _attention_shapes(f"{layer}.cross_attn_image_to_token", d, d // 2, d)
        shapes |= _affine(f"{layer}.mlp.layers.0", 2048, d) | _affine(f"{layer}.mlp.layers.1", d, 2048)
        for k in range(1, 5):
            shapes |= _affine(f"{layer}.norm{k}", d)
    shapes |= _attention_shapes(f"{name}.transformer.final_attn_token_to_image", d, d // 2, d)
    shapes |= _affine(f"{name}.transformer.norm_final_attn", d)
    # Transposed convolutions: the first axis is the input, so the bias has the length of the second.
    shapes |= {f"{name}.output_upscaling.0.weight": (d, d // 4, 2, 2), f"{name}.output_upscaling.0.bias": (d // 4,)}
    shapes |= {
        f"{name}.output_upscaling.3.weight": (d // 4, d // 8, 2, 2),
        f"{name}.output_upscaling.3.bias": (d // 8,),
    }
    shapes |= _affine(f"{name}.output_upscaling.1", d // 4)
    shapes |= _affine(f"{name}.conv_s0", d // 8, d, 1, 1) | _affine(f"{name}.conv_s1", d // 4, d, 1, 1)
    for i in range(4):
        shapes |= _head_shapes(f"{name}.output_hypernetworks_mlps.{i}", d, d // 8)
    return (
        shapes | _head_shapes(f"{name}.iou_prediction_head", d, 4) | _head_shapes(f"{name}.pred_obj_score_head", d, 1)
    )


def _head_shapes(name: str, d: int, out: int) -> Shapes:
    return _affine(f"{name}.layers.0", d, d) | _affine(f"{name}.layers.1", d, d) | _affine(f"{name}.layers.2", out, d)


def _attention_shapes(name: str, d: int, inner: int, keys: int) -> Shapes:
    shapes = _affine(f"{name}.q_proj", inner, d) | _affine(f"{name}.out_proj", d, inner)
    return shapes | _affine(f"{name}.k_proj", inner, keys) | _affine(f"{name}.v_proj", inner, keys)


def _memory_shapes(d: int, memory: int = 64) -> Shapes:
    """What follows an object through a video: listed to be recognised, never used."""
    shapes = {"maskmem_tpos_enc": (7, 1, 1, memory), "no_mem_embed": (1, 1, d), "no_mem_pos_enc": (1, 1, d)}
    shapes |= {"no_obj_ptr": (1, d), "no_obj_embed_spatial": (1, memory)}
    for i in range(4):
        layer = f"memory_attention.layers.{i}"
        shapes |= _attention_shapes(f"{layer}.self_attn", d, d, d)
        shapes |= _attention_shapes(f"{layer}.cross_attn_image", d, d, memory)
        shapes |= _affine(f"{layer}.linear1", 2048, d) | _affine(f"{layer}.linear2", d, 2048)
        for k in range(1, 4):
            shapes |= _affine(f"{layer}.norm{k}", d)
    shapes |= _affine("memory_attention.norm", d)
    before = 1
    for i, width in enumerate((4, 16, 64, 256)):  # each a convolution, its norm and an activation without weights
        name = "memory_encoder.mask_downsampler.encoder"
        shapes |= _affine(f"{name}.{3 * i}", width, before, 3, 3) | _affine(f"{name}.{3 * i + 1}", width)
        before = width
    shapes |= _affine("memory_encoder.mask_downsampler.encoder.12", d, before, 1, 1)
    shapes |= _affine("memory_encoder.pix_feat_proj", d, d, 1, 1) | _affine("memory_encoder.out_proj", memory, d, 1, 1)
    for i in range(2):
        name = f"memory_encoder.fuser.layers.{i}"
        shapes |= {f"{name}.gamma": (d,)} | _affine(f"{name}.dwconv", d, 1, 7, 7) | _affine(f"{name}.norm", d)
        shapes |= _affine(f"{name}.pwconv1", 4 * d, d) | _affine(f"{name}.pwconv2", d, 4 * d)
    shapes |= _affine("mask_downsample", 1, 1, 4, 4) | _affine("obj_ptr_tpos_proj", memory, d)
    return shapes | _head_shapes("obj_ptr_proj", d, d)
