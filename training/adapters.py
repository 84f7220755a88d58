"""What is trained: LoRA with the new token rows and the small parts, or everything that may be.

Trained with an adapter: LoRA on the language model, the rows of the new tokens (input and output), the multimodal
projector, the seg projector, the SAM2 mask decoder. Frozen in every case: SAM2's image and prompt encoders and the
depth tokenizer, because features and codes are computed ahead of training and would no longer fit.
"""

import math
import re

from torch import Tensor, nn

from ..adapters_perceptio import EMBEDDING, HEAD, WHOLE_PARTS, clean_name

LANGUAGE = "model.language_model"
VISION = "model.vision_tower"
# The first part that fits the cleaned name of a parameter; the table has its rows in this order.
PARTS = {
    "LoRA": r".*\.lora_.*",
    "new token rows": r".*\.trainable_tokens_delta.*",
    "embeddings and head": r"(model\.language_model\.embed_tokens|lm_head)\..*",
    "language model": r"model\.language_model\..*",
    "vision tower": r"model\.vision_tower\..*",
    "projector": r"model\.multi_modal_projector\..*",
    "seg projector": r"seg_projector\..*",
    "mask decoder": r"mask_model\.mask_decoder\..*",
    "SAM2 encoders": r"mask_model\..*",
    "depth tokenizer": r"depth_model\..*",
    "other": r".*",
}


def peft_config(model: nn.Module, r: int = 128, alpha: int = 256, dropout: float = 0.05):
    """The `peft.LoraConfig` of a Perceptio, for `get_peft_model` or a trainer; the model may be quantized.

    LoRA sits on every linear layer of the language model and nowhere else.  The rows of the control tokens are trained
    at both ends, or once where the ends are tied: peft then lets the head follow the embedding.
    """
    from peft import LoraConfig

    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    kinds = sorted({name.rpartition(".")[2] for name in linear if name.startswith(f"{LANGUAGE}.")})
    if not kinds:
        raise ValueError(
            f"{type(model).__name__} has no linear layers under {LANGUAGE}, expected a Perceptio without an adapter: "
            "pass the model as it was loaded"
        )
    rows = new_token_ids(model.config)
    ends = [EMBEDDING] if model.config.tie_word_embeddings else [EMBEDDING, HEAD]
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=rf"{re.escape(LANGUAGE)}\..*\.({'|'.join(kinds)})",
        modules_to_save=[name for name in WHOLE_PARTS if name in modules],
        trainable_token_indices={name: list(rows) for name in ends},
    )


def new_token_ids(config) -> list[int]:
    """The ids of `[SEG]`, of the two depth markers and of all depth codes."""
    first, count = config.depth_code_token_ids
    return [config.seg_token_id, config.depth_start_token_id, config.depth_end_token_id, *range(first, first + count)]


def thaw(model: nn.Module, vision: bool = True) -> None:
    """Full training without an adapter: everything but SAM2's encoders, the depth tokenizer and, unless `vision`, the
    vision tower.  Raises for a quantized model, whose weights take no gradient."""
    parts = (LANGUAGE, HEAD, *WHOLE_PARTS, *([VISION] if vision else []))
    trained = [parameter for name, parameter in model.named_parameters() if name.startswith(tuple(parts))]
    fixed = [parameter for parameter in trained if not parameter.is_floating_point()]
    if fixed:
        raise ValueError(
            f"the model holds {len(fixed)} weights of type {fixed[0].dtype}, expected floats: load it unquantized, or "
            "train an adapter"
        )
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)


def trainable_table(model: nn.Module) -> str:
    """One line per part: its parameters, how many of them are trained, and their type; the sum comes last."""
    counts: dict[str, list] = {part: [0, 0, set()] for part in PARTS}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:  # the untouched copy of a part that is trained in full
            continue
        name = clean_name(name)
        count, dtype = _size(parameter), _dtype(parameter)
        entry = counts[next(part for part, pattern in PARTS.items() if re.fullmatch(pattern, name))]
        entry[0] += count
        entry[1] += count if parameter.requires_grad else 0
        entry[2].add(dtype)
    rows = [(part, total, trained, ", ".join(sorted(dtypes))) for part, (total, trained, dtypes) in counts.items()]
    rows = [row for row in rows if row[1]]
    rows.append(("sum", sum(row[1] for row in rows), sum(row[2] for row in rows), ""))
    lines = [f"{'part':<20}{'parameters':>16}{'trained':>16}  type"]
    lines += [f"{part:<20}{total:>16,}{trained:>16,}  {dtypes}" for part, total, trained, dtypes in rows]
    return "\n".join(line.rstrip() for line in lines)


def _size(parameter: Tensor) -> int:
    """Numbers that a parameter stands for: packed ones count two a byte, partitioned ones count whole."""
    state = getattr(parameter, "quant_state", None)
    if state is not None and getattr(state, "shape", None) is not None:
        return math.prod(state.shape)
    return getattr(parameter, "ds_numel", parameter.numel())


def _dtype(parameter: Tensor) -> str:
    state = getattr(parameter, "quant_state", None)
    return getattr(state, "quant_type", None) or str(parameter.dtype).removeprefix("torch.")
