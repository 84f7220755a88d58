"""What a bug report needs: versions, devices, and which optional parts this machine has."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

import torch

PACKAGES = (
    "perceptio", "transformers", "torch", "numpy", "pillow", "safetensors", "huggingface-hub", "accelerate", "peft",
    "trl", "datasets", "torchvision", "torchao", "bitsandbytes", "pycocotools", "ray", "gradio", "flash-attn",
)  # fmt: skip


def report() -> list[tuple[str, str]]:
    """(what, value) pairs, in the order in which they are printed.  Nothing is fetched and nothing is loaded."""
    lines = [("python", f"{sys.version.split()[0]} on {platform.platform()}")]
    lines += [(name, _version(name)) for name in PACKAGES]
    lines += [("device", _device()), ("threads", str(torch.get_num_threads())), ("memory", _memory())]
    lines += [("pictures", _image_backend()), ("attention", _attention()), ("offline", _offline())]
    lines.append(("default model", _default_model()))
    return lines


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return f"{torch.cuda.device_count()} CUDA ({', '.join(sorted(names))})"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _memory() -> str:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    return "unknown"


def _image_backend() -> str:
    if importlib.util.find_spec("torchvision") is None:
        return "PIL"
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # a build for another torch raises whatever it likes
        return f"torchvision is broken ({type(error).__name__}: {error}): uninstall it, PIL serves as well"
    return "torchvision"


def _attention() -> str:
    kernels = ["eager", "sdpa"]
    if importlib.util.find_spec("flash_attn") is not None and torch.cuda.is_available():
        kernels.append("flash_attention_2")
    return ", ".join(kernels)


def _offline() -> str:
    return (
        "yes (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON") else "no"
    )


def _default_model() -> str:
    from perceptio import DEFAULT_MODEL

    there = (Path(DEFAULT_MODEL) / "config.json").is_file()
    return str(DEFAULT_MODEL) if there else f"missing from {DEFAULT_MODEL}: install perceptio again"
