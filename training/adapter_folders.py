"""What training ends in: a folder of the adapter, or a whole model with the adapter merged into it.

Both are written beside their place and moved there when they are whole, and both leave the live model as it was.
"""

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapters_perceptio import ADAPTER_FILE, PREFIX, RECORD, clean_name, describe_base, pack_record
from ..hub.assemble import _umask, put_in_place
from ..hub.manifest import write_manifest
from ..modeling_perceptio import PerceptioForConditionalGeneration

OWN_KEYS = (".lora_", ".modules_to_save.", ".trainable_tokens_")


def save_adapter_folder(model: nn.Module, processor, folder: str | os.PathLike, base: str | os.PathLike) -> Path:
    """Write the trained part of a model, with the record of its base and the processor, and return the folder.

    model: a Perceptio with one active adapter, a `PeftModel` or not.
    base: the folder or Hub id that the base is loaded from; it is written down as it is given.
    """
    from peft import get_peft_model_state_dict

    inner, label = _inner(model), _active(model)
    if any(getattr(module, "merged_adapters", None) for module in inner.modules()):
        raise ValueError("the adapter is merged into its base, expected it beside it: call `unmerge_adapter` first")
    weights = get_peft_model_state_dict(model, adapter_name=label, save_embedding_layers=False)
    weights = {
        PREFIX + key.removeprefix(PREFIX): tensor.detach().cpu().contiguous() for key, tensor in weights.items()
    }
    weights[PREFIX + RECORD] = pack_record(describe_base(inner, str(base)))
    config = copy.deepcopy(model.peft_config[label])
    config.base_model_name_or_path, config.revision, config.inference_mode = str(base), None, True
    owner = {"base_model_class": PerceptioForConditionalGeneration.__name__, "parent_library": "perceptio"}
    with _whole_folder(folder) as unfinished:
        save_file(weights, unfinished / ADAPTER_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(unfinished), auto_mapping_dict=owner)
        processor.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(_card(inner, config, str(base)), encoding="utf-8")
    return Path(folder)


def stamp_adapter(folder: str | os.PathLike, model: nn.Module, base: str | os.PathLike) -> None:
    """Add the record of its base to an adapter that peft wrote, as in a trainer's checkpoints."""
    from safetensors.torch import load_file

    path = Path(folder) / ADAPTER_FILE
    weights = load_file(path) | {PREFIX + RECORD: pack_record(describe_base(_inner(model), str(base)))}
    half_written = path.with_name(f".{ADAPTER_FILE}.incomplete")
    save_file(weights, half_written, metadata={"format": "pt"})
    os.replace(half_written, path)


def save_merged_folder(
    model: nn.Module, processor, folder: str | os.PathLike, base: str | os.PathLike, max_shard_size: int | str = "5GB"
) -> Path:
    """Write the whole model with the active adapter merged into it, and return the folder; it needs no peft.

    base: what the card says that it was trained from.

    Needs the memory of one more language model.  Raises for a quantized base: load it unquantized for this.
    """
    inner = _inner(model)
    if getattr(inner, "is_quantized", False) or hasattr(inner, "hf_quantizer"):
        raise ValueError(
            "the base is quantized, and merging would round the adapter with it: save the adapter, load the base "
            "unquantized with it, and merge then"
        )
    config = copy.deepcopy(inner.config)
    with torch.device("meta"):
        whole = type(inner)(config, branches=tuple({"mask", "depth"} - inner.missing_branches))
    whole.load_state_dict(merged_weights(inner), strict=True, assign=True)
    whole.tie_weights()
    whole.generation_config = copy.deepcopy(inner.generation_config)
    return save_whole_folder(whole, processor, folder, base, max_shard_size)


def save_whole_folder(model, processor, folder, base, max_shard_size: int | str = "5GB") -> Path:
    """Write a model without an adapter, and return the folder."""
    with _whole_folder(folder) as unfinished:
        model.save_pretrained(unfinished, max_shard_size=max_shard_size)
        processor.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(_whole_card(str(base)), encoding="utf-8")
    return Path(folder)


@torch.no_grad()
def merged_weights(inner: nn.Module) -> dict[str, Tensor]:
    """The state dict of a Perceptio as if its active adapter had been merged; untouched weights are not copied."""
    weights = {
        clean_name(key): tensor
        for key, tensor in inner.state_dict().items()
        if not any(own in f".{key}" for own in OWN_KEYS)
    }
    for name, module in inner.named_modules():
        if hasattr(module, "lora_A"):
            layer = copy.deepcopy(module)
            layer.merge(safe_merge=True)
            weights[f"{name}.weight"] = layer.get_base_layer().weight
        elif hasattr(module, "token_adapter"):
            weights[f"{name}.weight"] = module.weight
        elif hasattr(module, "modules_to_save") and module.active_adapters:
            trained = module.modules_to_save[module.active_adapters[0]].state_dict()
            weights |= {f"{name}.{key}": tensor for key, tensor in trained.items()}
    return weights


def _inner(model: nn.Module) -> nn.Module:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(inner, "missing_branches"):
        raise ValueError(f"`model` is a {type(inner).__name__}, expected a Perceptio, with or without peft around it")
    return inner


def _active(model: nn.Module) -> str:
    if not getattr(model, "peft_config", None):
        raise ValueError("the model has no adapter, so there is none to save: use `save_pretrained`")
    active = model.active_adapters
    active = active() if callable(active) else active
    if len(active) != 1:
        raise ValueError(f"the adapters {active} are active, expected one: call `set_adapter` with its name")
    return active[0]


@contextmanager
def _whole_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A folder to write into, which gets a manifest and its name only when everything is there."""
    out = Path(folder)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty, expected a new folder: choose another name, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.unfinished-", dir=out.parent))
    try:
        yield unfinished
        write_manifest(unfinished)
        os.chmod(unfinished, 0o777 & ~_umask())  # mkdtemp's folders are private
        put_in_place(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _origin(base: str) -> tuple[str, str]:
    """The line of the front matter that names the base, and its name in words, without the path of a folder."""
    is_local = Path(base).exists() or base.count("/") != 1
    return ("", Path(base).name) if is_local else (f"base_model: {base}\n", base)


def _whole_card(base: str) -> str:
    origin, name = _origin(base)
    return f"""---
library_name: transformers
{origin}pipeline_tag: image-text-to-text
tags: [perceptio]
---
# A Perceptio, fine-tuned

Trained from `{name}`. It writes a segmentation token and a span of depth codes before it answers.

```python
from transformers import pipeline
from perceptio import PerceptioPipeline

see = pipeline("perceptio", model=folder, pipeline_class=PerceptioPipeline)
see(image="photo.jpg", text="Which cup is closer?")
```
"""


def _card(model: nn.Module, config, base: str) -> str:
    origin, name = _origin(base)
    return f"""---
library_name: peft
{origin}pipeline_tag: image-text-to-text
tags: [perceptio, lora, transformers]
---
# An adapter of Perceptio

Trained on `{name}`; it remembers that base and refuses any other.

```python
from transformers import pipeline
from perceptio import PerceptioPipeline

see = pipeline("perceptio", model=folder, pipeline_class=PerceptioPipeline)
see(image="photo.jpg", text="Which cup is closer?")
```

- LoRA of rank {config.r} on the linear layers of the language model
- rows of the new tokens, multimodal projector, seg projector, mask decoder: trained in full
- codebook hash: `{model.config.depth_config.codebook_hash}`
"""
