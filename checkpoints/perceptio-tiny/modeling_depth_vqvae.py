"""The depth tokenizer: a depth map becomes `grid_size ** 2` code ids, and comes back.  Needs torch alone.

Depth here is relative inverse depth in [0, 1]: 1 is the nearest point of the picture, 0 the farthest.

B batch, K codes of the codebook, D width of a code, H W pixels (`image_size`), h w the grid (N cells, row-major).
"""

import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_perceptio import PerceptioDepthConfig
from .files_perceptio import check_weight_files

LOADING_FAULTS = {
    "missing_keys": "lacks weights, which would be random",
    "unexpected_keys": "holds weights that a depth tokenizer has no place for",
    "mismatched_keys": "holds weights of other shapes than its config.json asks for",
}


def codebook_hash(codebook: Tensor) -> str:
    """Content hash of a codebook float[K, D]: equal for equal float32 values, whatever file or device held them."""
    values = codebook.detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(repr(tuple(values.shape)).encode() + values.numpy().tobytes()).hexdigest()[:16]


class GridLayer(nn.Module):
    """A transformer layer over the N cells.  The attention is written out: N is small, and then it is the fastest way
    to train it on a CPU too."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
        x = x + self.out((weights.to(v.dtype) @ v).transpose(1, 2).reshape(b, n, width))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


class GridTrunk(nn.Module):
    """Features float[B, N, in] of the cells → float[B, N, out], each cell aware of all others."""

    def __init__(self, config: PerceptioDepthConfig, size_in: int, size_out: int, layers: int):
        super().__init__()
        width = config.hidden_size
        self.enter = nn.Linear(size_in, width)
        self.places = nn.Parameter(torch.zeros(1, config.span_length, width))
        self.layers = nn.ModuleList(GridLayer(width, config.num_attention_heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, size_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.leave(self.norm(x))


class DepthEncoder(nn.Module):
    """Map float[B, H, W] in [-1, 1] → latents float[B, D, h, w]."""

    def __init__(self, config: PerceptioDepthConfig):
        super().__init__()
        self.grid = config.grid_size
        side = config.image_size // config.grid_size
        self.trunk = GridTrunk(config, side * side, config.code_dim, config.num_encoder_layers)

    def forward(self, x: Tensor) -> Tensor:
        cells = F.pixel_unshuffle(x[:, None], x.shape[-1] // self.grid).flatten(2).transpose(1, 2)
        return self.trunk(cells).transpose(1, 2).unflatten(2, (self.grid, self.grid))


class DepthDecoder(nn.Module):
    """Latents float[B, D, h, w] → map float[B, H, W], about [-1, 1] and not clamped.

    Each cell gives its own pixels; two small convolutions then mend the seams between them.
    """

    def __init__(self, config: PerceptioDepthConfig):
        super().__init__()
        self.side = config.image_size // config.grid_size
        self.trunk = GridTrunk(config, config.code_dim, self.side**2, config.num_decoder_layers)
        self.mend1 = nn.Conv2d(1, 16, 3, padding=1)
        self.mend2 = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        cells = self.trunk(latents.flatten(2).transpose(1, 2))
        x = F.pixel_shuffle(cells.transpose(1, 2).unflatten(2, latents.shape[-2:]), self.side)
        if x.device.type == "cpu" and not torch.is_grad_enabled():
            return torch.cat([self.mend(one) for one in x.split(1)])[:, 0]  # one map stays in the cache: twice as fast
        return self.mend(x)[:, 0]

    def mend(self, x: Tensor) -> Tensor:
        return x + self.mend2(F.relu(self.mend1(x)))


class DepthVQVAE(PreTrainedModel):
    """Encoder, codebook and decoder.  The codebook is a buffer: it is learned by averaging, never by a gradient."""

    config_class = PerceptioDepthConfig
    config: PerceptioDepthConfig
    base_model_prefix = "depth_model"
    main_input_name = "depth"
    # Its attention is its own, so whatever kernel the whole model is asked to use suits it.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: PerceptioDepthConfig):
        super().__init__(config)
        self.encoder = DepthEncoder(config)
        self.decoder = DepthDecoder(config)
        self.codebook = nn.Buffer(torch.randn(config.num_codes, config.code_dim))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DepthVQVAE):
            init.normal_(module.codebook, std=1.0)
        elif isinstance(module, GridTrunk):
            init.normal_(module.places, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in the library, but what the library only reports stops the loading: missing, unexpected or misshapen
        weights, numbers that are not finite, a codebook other than the recorded one."""
        name, wants_report = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        if name is not None and Path(name).is_dir():
            check_weight_files(name)
        kwargs |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        vqvae, report = super().from_pretrained(name, *model_args, **kwargs)
        for key, complaint in LOADING_FAULTS.items():
            if found := sorted(str(fault) for fault in report[key]):
                raise ValueError(f"{name} {complaint} ({found[0]}): fetch or save the depth tokenizer again")
        vqvae.check_loaded(name)
        return (vqvae, report) if wants_report else vqvae

    def check_loaded(self, name) -> None:
        """Finite numbers, and the codebook that the configuration records; `name` is where they come from."""
        for key, weight in self.state_dict(keep_vars=True).items():
            if weight.device.type != "meta" and not torch.isfinite(weight).all():
                raise ValueError(f"{name} holds NaN or infinite values in {key}: fetch or save the folder again")
        self.check_codebook(name)

    def check_codebook(self, name) -> None:
        recorded, codebook = self.config.codebook_hash, self.codebook
        if recorded is None or codebook.device.type == "meta" or codebook.dtype != torch.float32:
            return
        if (found := self.codebook_hash()) != recorded:
            raise ValueError(
                f"the codebook in {name} has hash {found}, but its config.json records {recorded}: weights and "
                "configuration belong to different depth tokenizers, so fetch or save the folder again"
            )

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As in the library; the configuration records the hash of the codebook."""
        self.config.codebook_hash = self.codebook_hash()
        super().save_pretrained(save_directory, *args, **kwargs)

    def codebook_hash(self) -> str:
        return codebook_hash(self.codebook)

    def prepare(self, depth: Tensor) -> Tensor:
        """Relative inverse depth float[B, H', W'] in [0, 1], any size → float[B, H, W], as the encoder takes it."""
        return self.warp(self.resize(depth)).to(self.codebook.dtype)

    def resize(self, depth: Tensor) -> Tensor:
        """Relative inverse depth float[B, H', W'] in [0, 1] → the same at the tokenizer's resolution, float32."""
        if depth.ndim != 3 or 0 in depth.shape:
            raise ValueError(
                f"`depth` has shape {tuple(depth.shape)}, expected [batch, height, width], none of them 0"
            )
        if not depth.is_floating_point():
            raise ValueError(
                f"`depth` is {depth.dtype}, expected floats in [0, 1]: divide whole numbers by their largest value"
            )
        if not torch.isfinite(depth).all():
            raise ValueError("`depth` holds NaN or infinite values: fill the holes, or leave the map out")
        low, high = depth.amin().item(), depth.amax().item()
        if low < -1e-4 or high > 1 + 1e-4:
            raise ValueError(
                f"`depth` ranges from {low:.4g} to {high:.4g}, expected relative inverse depth in [0, 1] "
                "(1 is nearest): normalise it per picture"
            )
        side = self.config.image_size
        maps = depth.to(self.codebook.device, torch.float32)
        if maps.shape[-2:] != (side, side):
            maps = F.interpolate(maps[:, None], size=(side, side), mode="bilinear", antialias=True)[:, 0]
        return maps.clamp(0, 1)

    def warp(self, depth: Tensor) -> Tensor:
        """[0, 1] → [-1, 1], by log(depth + o): equal steps are equal ratios, as far as o lets them."""
        offset = self.config.depth_offset
        return 2 * torch.log(depth / offset + 1) / math.log(1 / offset + 1) - 1

    def unwarp(self, x: Tensor) -> Tensor:
        """The inverse of `warp`."""
        offset = self.config.depth_offset
        return offset * torch.expm1((x + 1) / 2 * math.log(1 / offset + 1))

    def nearest(self, latents: Tensor) -> Tensor:
        """Latents float[B, D, h, w] → ids int[B, h, w] of the nearest code, in float32 whatever the weights are."""
        b, _, h, w = latents.shape
        points, codes = latents.permute(0, 2, 3, 1).reshape(b * h * w, -1).float(), self.codebook.float()
        distance = codes.square().sum(1) - 2 * points @ codes.T  # the point's own square changes no ranking
        return distance.argmin(1).view(b, h, w)

    def lookup(self, ids: Tensor) -> Tensor:
        """Ids int[B, h, w] or int[B, h*w] (row-major) → latents float[B, D, h, w]."""
        side = self.config.grid_size
        if ids.shape[1:].numel() != side * side or ids.is_floating_point():
            raise ValueError(
                f"`ids` is {ids.dtype} of shape {tuple(ids.shape)}, expected whole numbers [batch, {side * side}] or "
                f"[batch, {side}, {side}]"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.num_codes:
            raise ValueError(
                f"`ids` range from {int(ids.min())} to {int(ids.max())}, but the codebook has {self.config.num_codes} "
                "codes: these ids belong to another codebook"
            )
        return self.codebook[ids.to(self.codebook.device).view(-1, side, side)].permute(0, 3, 1, 2)

    def soft_merge(self, logits: Tensor) -> Tensor:
        """Logits float[B, N, K] over the codes → expected latents float[B, D, h, w]; differentiable."""
        side = self.config.grid_size
        if logits.shape[1:] != (side * side, self.config.num_codes):
            raise ValueError(
                f"`logits` has shape {tuple(logits.shape)}, expected [batch, {side * side}, {self.config.num_codes}]"
            )
        kind = torch.promote_types(logits.dtype, torch.float32)
        merged = logits.to(kind).softmax(-1) @ self.codebook.to(kind)  # [B, N, D]
        return merged.to(self.codebook.dtype).unflatten(1, (side, side)).permute(0, 3, 1, 2)

    def encode(self, depth: Tensor) -> Tensor:
        """Relative inverse depth float[B, H', W'] in [0, 1], of any size → ids int[B, h, w]."""
        return self.nearest(self.encoder(self.prepare(depth)))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents float[B, D, h, w] → relative inverse depth float[B, H, W], not clamped: it can be trained."""
        decoded = self.decoder(latents)
        return self.unwarp(decoded.to(torch.promote_types(decoded.dtype, torch.float32)))

    def decode_ids(self, ids: Tensor) -> Tensor:
        """Ids int[B, h, w] or int[B, h*w] → relative inverse depth float32[B, H, W] in [0, 1], larger is nearer."""
        return self.decode(self.lookup(ids)).float().clamp(0, 1)

    def forward(self, depth: Tensor) -> Tensor:
        """Depth there and back: float[B, H', W'] in [0, 1] → float32[B, H, W] in [0, 1]."""
        return self.decode_ids(self.encode(depth))


__all__ = ["DepthVQVAE", "codebook_hash"]
