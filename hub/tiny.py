"""The configuration of a Perceptio of a few hundred thousand weights, for tests and for the untrained demo."""

from transformers import AutoConfig, Sam2Config

from ..configuration_perceptio import PerceptioConfig


def tiny_mask_config(image_size: int = 64) -> Sam2Config:
    grid = image_size // 4
    return Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "image_size": [image_size, image_size],
                "hidden_size": 8,
                "num_attention_heads": 1,
                "blocks_per_stage": [1, 2, 2, 1],
                "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 2, 4, 8],
                "window_size_per_stage": [4, 2, 2, 2],
                "global_attention_blocks": [4],
                "window_positional_embedding_background_size": [2, 2],
                "mlp_ratio": 2.0,
            },
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[grid, grid], [grid // 2, grid // 2], [grid // 4, grid // 4]],
            "fpn_hidden_size": 32,
        },
        prompt_encoder_config={
            "hidden_size": 32,
            "image_size": image_size,
            "patch_size": 16,
            "mask_input_channels": 8,
        },
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 32,
        },
    )


def tiny_config(family: str = "qwen2", vocab_size: int = 512, grid_size: int = 3, num_codes: int = 8, **overrides):
    """PerceptioConfig of 2 layers of width 32, tiles of 32 pixels (16 tokens each), SAM2 at 64 pixels, depth at 24."""
    text = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 4,
    }
    values = {
        "vision_config": vision,
        "text_config": AutoConfig.for_model(family, **text),
        "mask_config": tiny_mask_config(),
        "depth_config": {
            "image_size": grid_size * 8,
            "grid_size": grid_size,
            "num_codes": num_codes,
            "code_dim": 16,
            "hidden_size": 16,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "num_attention_heads": 2,
        },
        "image_token_id": vocab_size - num_codes - 4,
        "image_seq_length": 16,
        "untrained": True,
    }
    return PerceptioConfig(**{**values, **overrides})
