"""Adapters remember the base they were trained on, and no other model takes them.

PEFT checks shapes alone: an adapter for another backbone of the same size, or for another codebook, loads without a
word.  So the weights of an adapter hold one more tensor, a record of its base as JSON in bytes, which the model reads
before it takes the rest.  Needs torch and transformers; peft only where an adapter is loaded.
"""

import inspect
import json
import re
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file, is_peft_available

RECORD = "perceptio_base"  # the name of the tensor, below peft's prefix
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROWS = "token_adapter.trainable_tokens_delta"
EMBEDDING, HEAD = "model.language_model.embed_tokens", "lm_head"
# Trained in full beside LoRA; a model that was loaded without its mask branch has only the first.
WHOLE_PARTS = ("model.multi_modal_projector", "seg_projector", "mask_model.mask_decoder")
PREFIX = "base_model.model."  # of every weight in a file that peft reads
LARGEST_RECORD = 1_000_000
SAMPLED = ("model.language_model.", "lm_head.", "model.vision_tower.", "mask_model.vision_encoder.")
MOST_MATRICES, SAMPLES = 64, 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
ADVICE = "load the base that the adapter was trained on, or train an adapter for this one"


def clean_name(name: str) -> str:
    """The name of a weight as it was before peft wrapped the model; adapters' own weights keep their ending."""
    name = name.removeprefix(PREFIX)
    name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)
    return re.sub(r"\.(token_adapter|base_layer|original_module)(?=\.)", "", name)


# The record


def describe_base(model: nn.Module, name: str) -> dict:
    """The record of a Perceptio, with or without an (unmerged) adapter on it; `name` is what the messages call it.

    Of the weights it keeps a few numbers of each of a few matrices: enough to tell two models apart, through whatever
    precision they are loaded in.
    """
    matrices = _base_matrices(model)
    spread = {i * len(matrices) // MOST_MATRICES for i in range(MOST_MATRICES)} if matrices else ()
    # The ends are never quantized, so that something can be compared in every case.
    names = [name for i, name in enumerate(matrices) if i in spread or name.startswith((EMBEDDING, HEAD))]
    samples = {
        key: {
            "shape": list(matrices[key].shape),
            "dtype": str(matrices[key].dtype).removeprefix("torch."),
            "values": _sample(matrices[key]).tolist(),
        }
        for key in names
    }
    return {"base": str(name), **_facts(model), "untrained": bool(model.config.untrained), "samples": samples}


def _facts(model: nn.Module) -> dict:
    config = model.config
    codebook = getattr(getattr(model, "depth_model", None), "codebook", None)
    exact = codebook is not None and codebook.device.type != "meta" and codebook.dtype == torch.float32
    return {
        "vocab_size": config.text_config.vocab_size,
        "seg_token_id": config.seg_token_id,
        "depth_start_token_id": config.depth_start_token_id,
        "depth_end_token_id": config.depth_end_token_id,
        "depth_code_token_ids": list(config.depth_code_token_ids),
        "codebook_hash": model.depth_model.codebook_hash() if exact else config.depth_config.codebook_hash,
    }


def _base_matrices(model: nn.Module) -> dict[str, Tensor]:
    """The frozen matrices by name, without those whose numbers are not at hand: packed, partitioned, or on meta."""
    found = {}
    for name, weight in model.named_parameters():
        own = re.search(r"\.(lora_|modules_to_save\.|trainable_tokens_)", name)
        there = weight.is_floating_point() and weight.device.type != "meta" and not hasattr(weight, "device_mesh")
        if not own and there and weight.ndim > 1 and weight.numel() and weight.dtype in DTYPES.values():
            found[clean_name(name)] = weight
    return {name: weight for name, weight in found.items() if name.startswith(SAMPLED)}


def _sample(weight: Tensor) -> Tensor:
    places = [(2 * i + 1) * weight.numel() // (2 * SAMPLES) for i in range(SAMPLES)]
    return weight.detach().flatten()[torch.tensor(places, device=weight.device)].cpu().float()


def pack_record(record: dict) -> Tensor:
    """The record as a tensor for a weight file: JSON in UTF-8, uint8[bytes]."""
    return torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)


def unpack_record(tensor: Tensor) -> dict:
    try:
        if tensor.dtype != torch.uint8 or tensor.numel() > LARGEST_RECORD:
            raise ValueError(f"{tensor.dtype} of {tensor.numel()} values")
        record = json.loads(bytes(tensor.cpu().tolist()))
        for sample in record["samples"].values():
            if sample["dtype"] not in DTYPES or torch.tensor(sample["values"]).shape != (SAMPLES,):
                raise ValueError(f"a sample of type {sample['dtype']!r} with {len(sample['values'])} values")
            sample["shape"] = [int(size) for size in sample["shape"]]
        return {**record, "base": str(record["base"])}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"the adapter's record of its base ({RECORD}) cannot be read ({error}): fetch or save the adapter again"
        ) from error


# The check


def check_base(model: nn.Module, record: dict) -> None:
    """Raise, naming what differs, unless `model` is the base that the record describes."""
    for field, found in _facts(model).items():
        expected = record.get(field)
        if expected != found and None not in (expected, found):
            _refuse(record, f"`{field}` is {expected} there and {found} here")
    matrices = _base_matrices(model)
    present = {clean_name(name) for name, _ in model.named_parameters()}
    for name, sample in record["samples"].items():
        if name in matrices:
            _compare(record, name, sample, matrices[name])
        elif name not in present and not _left_out(model, name):
            _refuse(record, f"this model has no weight {name}")


def _compare(record: dict, name: str, sample: dict, weight: Tensor) -> None:
    shape, values = list(weight.shape), sample["values"]
    if sample["shape"] != shape:
        _refuse(record, f"{name} has shape {sample['shape']} there and {shape} here")
    there = DTYPES[sample["dtype"]]
    found = _sample(weight).to(there).to(weight.dtype).float()
    expected = torch.tensor(values).to(weight.dtype).to(there).to(weight.dtype).float()
    # Through both precisions equal numbers stay equal, but for a few that two kinds of half precision round apart.
    differs = found != expected
    if differs.sum() > SAMPLES // 2:
        first = int(differs.nonzero()[0])
        _refuse(record, f"{name} holds {values[first]:.6g} there and {_sample(weight)[first].item():.6g} here")


def _refuse(record: dict, difference: str) -> None:
    raise ValueError(f"the adapter was trained on another base, {record['base']}: {difference}. {ADVICE.capitalize()}")


def _left_out(model: nn.Module, name: str) -> bool:
    return name.startswith(("mask_model.", "seg_projector.")) and "mask" in model.missing_branches


def accept_record(model: nn.Module, tensor: Tensor | None, source: str) -> None:
    """Check the record of an adapter from `source`; warn where there is none."""
    if tensor is None:
        warnings.warn(
            f"{source} does not say which base it was trained on, so it cannot be checked: make sure that it belongs "
            "to this model, or write it with `perceptio.training.adapter_folders.save_adapter_folder`",
            stacklevel=4,
        )
        return
    record = unpack_record(tensor)
    check_base(model, record)
    model.config.untrained = bool(record.get("untrained", False))


# Where adapters come in


def take_record(model: nn.Module, state_dict: dict, prefix: str) -> None:
    """For `_load_from_state_dict`, the way of `PeftModel`: take the record out of what is loaded, and check it."""
    tensor = state_dict.pop(prefix + RECORD, None)
    whole = any(
        key.endswith(("embed_tokens.weight", "embed_tokens.token_adapter.base_layer.weight")) for key in state_dict
    )
    if tensor is not None or (not whole and any(".lora_" in key for key in state_dict)):
        accept_record(model, tensor, "the adapter")


def read_adapter(model: nn.Module, adapter, weights: dict | None, label: str, options: dict) -> dict | None:
    """For `load_adapter`, the library's way: the weights to take, read and checked before anything is changed.

    adapter: folder or Hub id, of which only safetensors are read;  weights: or the adapter's state dict.
    """
    if weights is None and adapter is None:
        return None
    source = "the adapter" if adapter is None else str(adapter)
    if weights is None:
        weights = load_file(cached_file(source, ADAPTER_FILE, **options))
    own = [key for key in weights if key.rpartition(".")[2] == RECORD]
    accept_record(model, weights[own[0]] if own else None, source)
    taken = {key: w for key, w in weights.items() if key not in own and not _left_out(model, key.removeprefix(PREFIX))}
    return _for_the_library(model, taken, label)


def _for_the_library(model: nn.Module, weights: dict, label: str) -> dict:
    """The weights under the names that `PreTrainedModel.load_adapter` puts right, or as the model has them."""
    prefix = PREFIX if any(key.startswith(PREFIX) for key in weights) else ""
    embedding = f"{prefix}{EMBEDDING}.{ROWS}"
    tied = {}
    if model.config.tie_word_embeddings and embedding in weights:
        tied = {f"{prefix}{HEAD}.{ROWS}.{label}": weights[embedding]}  # shared, and asked for under both names
    # Earlier versions of transformers leave all but LoRA as it started, and say so in a log.
    if "adapter_state_dict_load_map" not in inspect.unwrap(PreTrainedModel.load_adapter).__code__.co_names:
        for part in WHOLE_PARTS:
            old, new = f"{prefix}{part}.", f"{prefix}{part}.modules_to_save.{label}."
            weights = {new + key.removeprefix(old) if key.startswith(old) else key: w for key, w in weights.items()}
        weights = {f"{key}.{label}" if key.endswith(ROWS) else key: tensor for key, tensor in weights.items()}
    return weights | tied


def check_adapter_report(report, source, label: str) -> None:
    """Raise for what the library only reports: weights of an adapter that are missing, unexpected or misshapen."""
    missing = [key for key in report.missing_keys if f".{label}." in f"{key}."]  # not those of other adapters
    for faults, complaint in (
        (missing, "lacks weights"),
        (report.unexpected_keys, "holds weights that this model has no place for"),
        (report.mismatched_keys, "holds weights in other shapes than this model's"),
    ):
        if found := sorted(str(fault) for fault in faults):
            raise ValueError(
                f"{source or 'the adapter'} {complaint}, {len(found)} of them ({found[0]}): fetch or save the adapter "
                "again, and load it into a fresh model"
            )


def split_adapter(name, kwargs: dict) -> tuple[str, dict | None]:
    """For `from_pretrained`: the name of the model, and the arguments of `load_adapter` where `name` is an adapter.

    Takes from `kwargs` what belongs to the adapter.  The library would load both at once and report on one of them.
    """
    options = dict(kwargs.pop("adapter_kwargs", None) or {})
    label = kwargs.pop("adapter_name", "default")
    adapter = options.pop("_adapter_model_path", None)
    hub = {key: kwargs[key] for key in HUB_OPTIONS if kwargs.get(key) is not None} | options
    if adapter is not None:  # an Auto class has looked already, and `name` is the base
        return name, {"peft_model_id": str(adapter), "adapter_name": label, "adapter_kwargs": hub}
    config = find_adapter_config(name, hub)
    if config is None:
        return name, None
    values = json.loads(Path(config).read_text(encoding="utf-8"))
    base = values.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{config} names no base (`base_model_name_or_path`): write the folder or Hub id of the model that the "
            "adapter was trained on, or load that model and call `load_adapter`"
        )
    for key in ("revision", "subfolder"):  # these are of the adapter's repository
        kwargs.pop(key, None)
    if values.get("revision"):
        kwargs["revision"] = values["revision"]
    return base, {"peft_model_id": str(name), "adapter_name": label, "adapter_kwargs": hub}


def find_adapter_config(name, options: dict) -> str | None:
    """The path of `adapter_config.json` where `name` is an adapter and not a whole model."""
    if name is None or (Path(name) / "config.json").is_file():
        return None
    if (Path(name) / ADAPTER_CONFIG).is_file() and not is_peft_available():
        raise ImportError(f"{name} is an adapter, and loading one needs peft: pip install peft")
    return find_adapter_config_file(str(name), **options) if is_peft_available() else None


__all__ = [
    "accept_record",
    "check_adapter_report",
    "check_base",
    "clean_name",
    "describe_base",
    "pack_record",
    "read_adapter",
    "split_adapter",
    "take_record",
    "unpack_record",
]
