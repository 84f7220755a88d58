"""Records, folders of shards and small models for the tests of shards, streams, labels and jobs."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from perceptio.configuration_perceptio import PerceptioDepthConfig
from perceptio.data.depths import encode_depth
from perceptio.data.masks import encode_mask
from perceptio.data.record import assistant, make_record, user
from perceptio.data.shards import write_shards
from perceptio.modeling_depth_vqvae import DepthVQVAE

WIDTH, HEIGHT = 64, 48
CODEBOOK = "0123456789abcdef"


def picture_bytes(number: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=80)
    return file.getvalue()


def ramp(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    return np.tile(np.linspace(0, 1, width, dtype=np.float32), (height, 1))


def sample(number: int, codes: bool = True, mapped: bool = True, **changes) -> dict:
    """A good record; `codes` are of no real codebook."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[8:24, 8 + number % 8 : 40] = True
    values = {
        "id": f"row-{number:04d}",
        "image": picture_bytes(number),
        "messages": [user(f"Where is thing {number}?"), assistant("There.", "seg+depth")],
        "masks": [encode_mask(mask)],
        "depth": encode_depth(ramp()) if mapped else None,
        "depth_codes": [number % 8] * 9 if codes else None,
        "depth_codebook": CODEBOOK if codes else None,
        "source": "own",
        "licence": "CC-BY-4.0",
    }
    return make_record(**{**values, **changes})


def samples(count: int, **changes):
    return (sample(number, **changes) for number in range(count))


def folder_of(path: Path, count: int, rows_per_shard: int = 20, rows_per_group: int = 7, **changes) -> Path:
    write_shards(samples(count, **changes), path, rows_per_shard=rows_per_shard, rows_per_group=rows_per_group)
    return path


def tiny_vqvae(seed: int = 0) -> DepthVQVAE:
    torch.manual_seed(seed)
    sizes = {"image_size": 24, "grid_size": 3, "num_codes": 8, "code_dim": 16, "hidden_size": 16}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1, "num_attention_heads": 2}
    return DepthVQVAE(PerceptioDepthConfig(**sizes, **layers)).eval()
