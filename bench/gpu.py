"""What only a CUDA device can show: one training step and one generation of the published 8B size with random weights.

    python bench/gpu.py [--layout 8b] [--tokens 128]

Plain InternVL and Perceptio hold the same shapes and run in the same process: seconds and peak memory, side by side.
Each finished part is written to bench/results/gpu.json at once and skipped when the script is run again, so that it
runs in chunks.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from perceptio.hub.assemble import layout_blueprint
from perceptio.modeling_perceptio import PerceptioForConditionalGeneration

RESULTS = Path(__file__).parent / "results" / "gpu.json"


def build(kind: str, config):
    """Random weights straight on the device, in bfloat16: nothing of this size passes through the host."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        if kind == "perceptio":
            model = PerceptioForConditionalGeneration(config)
        else:
            names = ("vision_config", "text_config", "image_token_id", "image_seq_length", "tie_word_embeddings")
            model = InternVLForConditionalGeneration(InternVLConfig(**{name: getattr(config, name) for name in names}))
    torch.set_default_dtype(torch.float32)
    return model


def prompt(config, opening: list[int], tiles: int = 7) -> dict:
    ids = [5, *[config.image_token_id] * (config.image_seq_length * tiles), *range(100, 132), *opening]
    side = config.vision_config.image_size[0]
    return {
        "input_ids": torch.tensor([ids], device="cuda"),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long, device="cuda"),
        "pixel_values": torch.zeros(tiles, 3, side, side, device="cuda", dtype=torch.bfloat16),
    }


def measured(run) -> dict:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def train_step(model, inputs: dict) -> None:
    """Forward and backward through the language model with frozen vision, as in fine-tuning."""
    model.train()
    model.model.vision_tower.requires_grad_(False)
    model.gradient_checkpointing_enable()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    model.zero_grad(set_to_none=True)
    model.eval()


def parts(kind: str, config, tokens: int) -> dict:
    model = build(kind, config).eval()
    plain = prompt(config, [])
    free = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(**plain, **{**free, "max_new_tokens": 4})
    found = {"generate": measured(lambda: model.generate(**plain, **free))}
    if kind == "perceptio":
        seeing = prompt(config, [config.seg_token_id, config.depth_start_token_id])
        side = config.mask_image_size
        seeing["sam_pixel_values"] = torch.zeros(1, 3, side, side, device="cuda", dtype=torch.bfloat16)
        found["perceive"] = measured(lambda: model.perceive(**seeing, **free))
    found["train_step"] = measured(lambda: train_step(model, plain))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", default="8b", choices=("1b", "2b", "4b", "8b"))
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/gpu.py needs a CUDA device, and this machine has none", file=sys.stderr)
        return 2
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    config = layout_blueprint(arguments.layout).config
    for kind in ("internvl", "perceptio"):
        key = f"{arguments.layout} {kind} {arguments.tokens}"
        if key not in results:
            torch.cuda.empty_cache()
            results[key] = {**parts(kind, config, arguments.tokens), "device": torch.cuda.get_device_name()}
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(key, json.dumps(results[key]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
