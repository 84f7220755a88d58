"""Depth teachers: models that see depth in a picture.  A depth tokenizer is trained on their maps of the very pictures
that the language model is tuned on.

A teacher is any callable from a list of PIL pictures to a list of maps float[H, W] of the whole picture, at any size
and scale; its attribute `kind` says whether they are "inverse" depth (the default) or "metres".
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

# Depth Anything V2 by the size of its backbone, with the licence of its weights.
KNOWN = {
    "small": ("depth-anything/Depth-Anything-V2-Small-hf", "Apache-2.0"),
    "base": ("depth-anything/Depth-Anything-V2-Base-hf", "CC-BY-NC-4.0"),
    "large": ("depth-anything/Depth-Anything-V2-Large-hf", "CC-BY-NC-4.0"),
}


def full_name(name: str) -> str:
    """ "small" → its id on the Hub; every other name is one already."""
    return KNOWN[name][0] if name in KNOWN else name


def licence_of(name: str) -> str | None:
    """The licence of a known teacher's weights: what is labelled with them inherits its conditions."""
    return dict(KNOWN.values()).get(full_name(name))


class DepthTeacher:
    """A depth-estimation model of transformers (Depth Anything V2, DPT, …) as a teacher.

    name: small, base or large (Depth Anything V2), a folder, or an id on the Hub.  Maps are float32 on any device.
    dtype: what a CUDA device computes in, as torch.bfloat16: faster, and less exact; float32 where it is None.
    """

    def __init__(self, name: str, device: str = "cpu", dtype: torch.dtype | None = None):
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        if dtype is not None and torch.device(device).type != "cuda":
            raise ValueError(f"`dtype` is {dtype} on {device}, expected a CUDA device: leave it out elsewhere")
        self.dtype = dtype
        try:
            self.processor = AutoImageProcessor.from_pretrained(full_name(name))
            self.model = AutoModelForDepthEstimation.from_pretrained(full_name(name), use_safetensors=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"the teacher {name!r} cannot be loaded ({' '.join(str(error).split())[:200]}): expected small, base, "
                "large, or the folder or Hub id of a depth-estimation model"
            ) from error
        self.model = self.model.to(device).eval()
        metric = getattr(self.model.config, "depth_estimation_type", "relative") == "metric"
        self.kind = "metres" if metric else "inverse"

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image]) -> list[np.ndarray]:
        maps: dict[int, np.ndarray] = {}
        for size in sorted({picture.size for picture in pictures}):  # only equal pictures make one tensor
            chosen = [index for index, picture in enumerate(pictures) if picture.size == size]
            inputs = self.processor(images=[pictures[index] for index in chosen], return_tensors="pt")
            values = inputs["pixel_values"].to(self.model.device)
            with torch.autocast(values.device.type, self.dtype, enabled=self.dtype is not None):
                found = self.model(values).predicted_depth
            maps.update(zip(chosen, found.float().cpu().numpy(), strict=True))
        return [maps[index] for index in range(len(pictures))]


def teacher_from(name: str, device: str = "cpu") -> Callable | None:
    """ "none", or the name of a `DepthTeacher`."""
    return None if name == "none" else DepthTeacher(name, device)


def ask(teacher: Callable, pictures: list[Image.Image]) -> list:
    """The teacher's map of each picture.  Where it fails on a batch it is asked for each: a map, or the error."""
    if not pictures:
        return []
    try:
        maps = list(teacher(pictures))
    except (ValueError, RuntimeError) as error:  # out of memory is one
        if len(pictures) == 1:
            return [error]
        middle = len(pictures) // 2
        return ask(teacher, pictures[:middle]) + ask(teacher, pictures[middle:])
    if len(maps) != len(pictures):
        raise TypeError(f"the teacher gave {len(maps)} maps for {len(pictures)} pictures, expected one for each")
    return maps
