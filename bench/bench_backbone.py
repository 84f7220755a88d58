"""What Perceptio costs where nothing is perceived, and what its grammar costs where something is.

    python bench/bench_backbone.py [--rounds 9] [--tokens 96]

Plain InternVL and Perceptio hold the same weights and write the same number of tokens, in turn, in one process; the
figures are medians of the ratios of neighbouring rounds, so that a machine whose speed drifts does not matter.  Peak
memory is that of two fresh processes.  Writes bench/results/backbone.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, InternVLConfig, InternVLForConditionalGeneration

from perceptio.hub.tiny import tiny_config
from perceptio.modeling_perceptio import PerceptioForConditionalGeneration

VOCAB, PROMPT_WORDS = 32_000, 32


def middle_config():
    """Large enough that a decoding step is arithmetic and not Python: about 100 M parameters, a span of 100 codes."""
    config = tiny_config(vocab_size=VOCAB)
    text = AutoConfig.for_model(
        "qwen2", vocab_size=VOCAB, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=4096,
    )  # fmt: skip
    depth = {"image_size": 320, "grid_size": 10, "num_codes": 128, "code_dim": 64}
    return type(config)(
        vision_config=config.vision_config,
        text_config=text,
        mask_config=config.mask_config,
        depth_config=depth,
        image_token_id=VOCAB - 135,
        image_seq_length=config.image_seq_length,
    )


def prompt(config, opening: list[int]) -> dict:
    picture = [config.image_token_id] * config.image_seq_length
    ids = [5, *picture, *range(100, 100 + PROMPT_WORDS), *opening]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": torch.zeros(1, 3, *config.vision_config.image_size),
    }


def seconds(generate, inputs: dict, tokens: int) -> float:
    start = time.perf_counter()
    output = generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    elapsed = time.perf_counter() - start
    if output.shape[1] != inputs["input_ids"].shape[1] + tokens:
        raise RuntimeError(f"wrote {output.shape[1] - inputs['input_ids'].shape[1]} tokens, expected {tokens}")
    return elapsed


def paired(ours, peer, inputs: dict, tokens: int, rounds: int) -> dict:
    """Median time of each and of the ratio, pair by pair; the order within a pair alternates."""
    seconds(ours, inputs, tokens), seconds(peer, inputs, tokens)
    times = []
    for number in range(rounds):
        order = (ours, peer) if number % 2 else (peer, ours)
        measured = {id(run): seconds(run, inputs, tokens) for run in order}
        times.append((measured[id(ours)], measured[id(peer)]))
    ratios = sorted(a / b for a, b in times)
    return {
        "ours_seconds": statistics.median(a for a, _ in times),
        "peer_seconds": statistics.median(b for _, b in times),
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
        "rounds": rounds,
        "tokens": tokens,
    }


def without_grammar(model):
    """The same model, decoding freely: what the library would do without our processor."""

    def generate(**kwargs):
        own = type(model)._get_logits_processor
        type(model)._get_logits_processor = InternVLForConditionalGeneration._get_logits_processor
        try:
            return model.generate(**kwargs)
        finally:
            type(model)._get_logits_processor = own

    return generate


def peak_of(kind: str, folder: str) -> int:
    """Peak resident bytes of a fresh process that loads and writes 64 tokens."""
    command = [sys.executable, __file__, "--peak", kind, "--folder", folder]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(run.stdout.strip().splitlines()[-1])


def print_peak(kind: str, folder: str) -> None:
    if kind == "perceptio":
        model = PerceptioForConditionalGeneration.from_pretrained(folder, branches=())
    else:
        model = InternVLForConditionalGeneration.from_pretrained(folder)
    seconds(model.eval().generate, prompt(middle_config(), []), 64)
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))))


def backbone_of(model: PerceptioForConditionalGeneration) -> InternVLForConditionalGeneration:
    config = model.config
    plain = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=config.vision_config,
            text_config=config.text_config,
            image_token_id=config.image_token_id,
            image_seq_length=config.image_seq_length,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    ).eval()
    # The very same tensors: copies lie elsewhere in memory, and that alone moves a matrix product by some percent.
    mine = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        parameter.data = mine[name].data
    return plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--peak", choices=("perceptio", "internvl"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        return print_peak(arguments.peak, arguments.folder)
    torch.manual_seed(0)
    config = middle_config()
    model = PerceptioForConditionalGeneration(config).eval()
    plain = backbone_of(model)
    results = {"threads": torch.get_num_threads(), "parameters": sum(p.numel() for p in model.model.parameters())}
    print(f"{results['parameters'] / 1e6:.0f} M parameters, {results['threads']} threads", flush=True)
    results["mode_none"] = paired(
        model.generate, plain.generate, prompt(config, []), arguments.tokens, arguments.rounds
    )
    print(f"mode none against InternVL: time ratio {results['mode_none']['ratio']:.4f}", flush=True)
    opening = [config.seg_token_id, config.depth_start_token_id]
    results["grammar"] = paired(
        model.generate, without_grammar(model), prompt(config, opening), config.span_length + 1 + 20, arguments.rounds
    )
    print(f"grammar against free decoding: time ratio {results['grammar']['ratio']:.4f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(os.path.join(folder, "perceptio"))
        plain.save_pretrained(os.path.join(folder, "internvl"))
        peaks = {kind: peak_of(kind, os.path.join(folder, kind)) for kind in ("perceptio", "internvl")}
    results["peak_memory"] = {**peaks, "ratio": peaks["perceptio"] / peaks["internvl"]}
    print(f"peak memory against InternVL: ratio {results['peak_memory']['ratio']:.4f}", flush=True)
    target = Path(__file__).parent / "results" / "backbone.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
