"""The model of a run: loaded for training, with what is trained thawed and in float32."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..modeling_depth_vqvae import DepthVQVAE
from ..modeling_perceptio import PerceptioForConditionalGeneration
from .adapters import peft_config as default_peft_config
from .adapters import thaw


def load_model(name, args, qlora: bool = False) -> PerceptioForConditionalGeneration:
    """For training with `args`.  qlora: the language model in 4 bits."""
    kwargs = dict(args.model_init_kwargs or {})
    kwargs.setdefault("dtype", weight_type(args))
    kwargs.setdefault("attn_implementation", cpu_attention(args) if args.device.type == "cpu" else "sdpa")
    if qlora:
        from transformers import BitsAndBytesConfig

        if args.full:
            raise ValueError("`qlora` is set beside `full`, but 4-bit weights cannot be trained: take one of them out")
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return PerceptioForConditionalGeneration.from_pretrained(name, **kwargs)


def cpu_attention(args) -> dict[str, str]:
    """The faster one for each part, in bfloat16: torch's fused attention takes less than half the time over the length
    of a chat, unless that is compiled, and as much as ten times the time backward over SAM2's windows."""
    return {
        "": "eager",
        "text_config": "eager" if args.compiled else "sdpa",
        "vision_config": "eager" if args.train_vision else "sdpa",
        "mask_config": "eager",
    }


def weight_type(args) -> torch.dtype:
    """Frozen weights in what is computed in; all in float32 where they are trained or cut over several devices."""
    if args.full or is_sharded(args) or args.device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def is_sharded(args) -> bool:
    """Whether the weights are cut over the processes (FSDP, or DeepSpeed's third stage)."""
    fsdp = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return fsdp or (args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3)


@contextmanager
def ends_in_root(model: nn.Module) -> Iterator[None]:
    """Embeddings and head are cut with the model's root, not by themselves.

    The losses read the head's weight within the root's forward, where it then is whole; and peft's wrappers hide from
    accelerate that tied ends are one.
    """
    names = ("get_input_embeddings", "get_output_embeddings")
    for name in names:
        setattr(model, name, lambda: None)
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)


def prepare_training(model: nn.Module, args, peft_config=None):
    """Freeze and thaw; returns the configuration that the trainer wraps the model with, or None."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return None
    if args.full:
        if peft_config is not None:
            raise ValueError("`full` is set and a `peft_config` was passed, expected one of them")
        thaw(model, vision=args.train_vision)
        return None
    return peft_config or default_peft_config(model, args.lora_r, args.lora_alpha, args.lora_dropout)


def cast_trained(model: nn.Module) -> None:
    """What is trained is kept in float32: steps of a small learning rate are lost in fewer bits."""
    for weight in model.parameters():
        if weight.requires_grad and weight.is_floating_point():
            weight.data = weight.data.float()


def depth_tokenizer(model: PerceptioForConditionalGeneration) -> DepthVQVAE | None:
    """A copy of the model's depth tokenizer for the data, on the CPU."""
    if "depth" in model.missing_branches:
        return None
    return copy.deepcopy(model.depth_model).to("cpu", torch.float32).eval().requires_grad_(False)
