"""`--dry_run`: one batch through everything, and what the whole run will take."""

import resource
import time

import torch

from ..hub.assemble import layout_blueprint
from ..losses_perceptio import COUNTS
from .estimate import RunFacts, report
from .models import is_sharded

LOOKED_AT = 32  # records, spread over the run
LAYOUT = "layout:"  # in the place of a model: a published size, of which no file is needed
USUAL_RUN = 1_000_000  # records


def rehearse(trainer, gpu: str) -> str:
    """Forward and backward of one batch, without a step; then the estimate for the run's own lengths."""
    args, size = trainer.args, trainer.args.per_device_train_batch_size
    seconds, losses = _one_batch(trainer, size)
    steps = args.max_steps if args.max_steps > 0 else None
    length = {"steps": steps, "samples": None if steps else len(trainer.train_dataset)}
    packed = bool(getattr(trainer.accelerator.unwrap_model(trainer.model), "is_loaded_in_4bit", False))
    facts = RunFacts(**_run(args, gpu), **length, **_averages(trainer), base_4bit=packed)
    lines = [f"one batch of {size} went through in {seconds:.2f} s on {args.device} ({_peak(args.device)})"]
    lines += [f"  {name:<20}{value:>10.4f}" for name, value in losses.items()]
    config = trainer.accelerator.unwrap_model(trainer.model).config
    return "\n".join([*lines, "", report(config, facts)])


def rehearse_layout(layout: str, args, gpu: str, gpus: int, samples: int | None) -> str:
    """The estimate for a published size ("4b", "8b") with the lengths of a usual run, without weights and data."""
    steps = args.max_steps if args.max_steps > 0 else None
    facts = RunFacts(
        **{**_run(args, gpu), "world_size": gpus, "steps": steps, "samples": None if steps else samples or USUAL_RUN}
    )
    return report(layout_blueprint(layout).config, facts)


def _one_batch(trainer, size: int) -> tuple[float, dict[str, float]]:
    records = [trainer.train_dataset[index] for index in range(min(size, len(trainer.train_dataset)))]
    batch = trainer.data_collator(records)
    batches, count = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    trainer.create_optimizer()
    model = trainer.accelerator.prepare(trainer.model)
    model.train()
    start = time.perf_counter()
    trainer.training_step(model, batches[0], count)
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds, trainer.figures("train")


def _run(args, gpu: str) -> dict:
    return {
        "world_size": args.world_size,
        "batch_size": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "lora_r": None if args.full else args.lora_r,
        "train_vision": args.full and args.train_vision,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "checkpointing": args.gradient_checkpointing,
        "sharding": "none" if not is_sharded(args) else "zero3" if args.deepspeed_plugin is not None else "fsdp2",
        "sam_cached": args.sam_cache is not None,
        "gpu": gpu,
    }


def _averages(trainer) -> dict:
    """What an average sample holds, from some of them."""
    data, processor = trainer.train_dataset, trainer.processing_class
    picked = sorted({index * len(data) // LOOKED_AT for index in range(LOOKED_AT)})
    samples = [trainer.data_collator([data[index]]) for index in picked]
    counts = torch.stack([sample["targets"]["counts"] for sample in samples]).mean(0)
    mean = dict(zip(COUNTS, counts.tolist(), strict=True))
    tiles = [len(sample.get("pixel_values", ())) for sample in samples]
    span = processor.span_length + 2
    lengths = [int(sample["attention_mask"].sum()) for sample in samples]
    spans = [len(sample["targets"]["depth_positions"]) for sample in samples]
    texts = [
        length - count * processor.image_seq_length - there * span
        for length, count, there in zip(lengths, tiles, spans, strict=True)
    ]
    with_masks = [len(sample["targets"]["mask_labels"]) for sample in samples if len(sample["targets"]["mask_labels"])]
    text = max(sum(texts) / len(texts), 1.0)
    return {
        "tiles": sum(tiles) / len(tiles),
        "max_tiles": max(tiles),
        "text_tokens": text,
        "max_text_tokens": max(texts),
        "answer_tokens": min(max(mean["tokens"] - mean["spans"] * span, 1.0), text),
        "mask_share": len(with_masks) / len(samples),
        "masks": sum(with_masks) / len(with_masks) if with_masks else 1.0,
        "depth_share": sum(there > 0 for there in spans) / len(spans),
    }


def _peak(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB of its memory at most"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of memory at most"
