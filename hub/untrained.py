"""A complete Perceptio folder with random weights: it loads, it runs, and it knows nothing."""

import argparse

import torch
from transformers import GenerationConfig

from ..configuration_perceptio import PerceptioConfig
from ..modeling_perceptio import PerceptioForConditionalGeneration
from ..processing_perceptio import add_perception_tokens
from .manifest import write_manifest
from .tiny import tiny_config
from .tiny_text import tiny_processor


def build_untrained(folder, family: str = "qwen2", seed: int = 0, grid_size: int = 3, num_codes: int = 8) -> None:
    """Write the folder for one family of text models ("qwen2", "llama", "qwen3")."""
    torch.manual_seed(seed)
    processor = tiny_processor(family, grid_size=grid_size, num_codes=num_codes)
    tokenizer = processor.tokenizer
    ids = add_perception_tokens(tokenizer, num_codes)
    config = tiny_config(
        family,
        vocab_size=len(tokenizer),
        grid_size=grid_size,
        num_codes=num_codes,
        image_token_id=processor.image_token_id,
        **ids,
    )
    model = PerceptioForConditionalGeneration(config)
    config.depth_config.codebook_hash = model.depth_model.codebook_hash()
    model.generation_config = generation_defaults(config, tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_manifest(folder)


def generation_defaults(config: PerceptioConfig, tokenizer, answer_tokens: int = 512) -> GenerationConfig:
    """Greedy, with room for a whole depth span and an answer after it."""
    return GenerationConfig(
        max_new_tokens=config.span_length + 1 + answer_tokens,
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="folder to write")
    parser.add_argument("--family", default="qwen2", choices=("qwen2", "llama", "qwen3"), help="text model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    build_untrained(options.folder, options.family, options.seed, grid_size=10, num_codes=128)


if __name__ == "__main__":
    main()
