"""The depth tokenizer: a depth map becomes `grid_size ** 2` code ids, and comes back.  Needs torch alone.

Depth here is relative inverse depth in [0, 1]: 1 is the nearest point of the picture, 0 the farthest.

B batch, K codes of the codebook, D width of a code, H W pixels (`image_size`), h w the grid (flat: row-major).
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_perceptio import PerceptioDepthConfig


def codebook_hash(codebook: Tensor) -> str:
    """Content hash of a codebook float[K, D]: equal for equal float32 values, whatever file or device held them."""
    values = codebook.detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(repr(tuple(values.shape)).encode() + values.numpy().tobytes()).hexdigest()[:16]


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv3(F.relu(self.conv2(F.relu(self.conv1(F.relu(x))))))


class DepthEncoder(nn.Module):
    """Map float[B, 1, H, W] in [-1, 1] → latents float[B, D, h, w]."""

    def __init__(self, config: PerceptioDepthConfig):
        super().__init__()
        widths = [1, *config.channels]
        self.stages = nn.ModuleList(
            nn.Conv2d(fine, coarse, 4, stride=2, padding=1) for fine, coarse in zip(widths, widths[1:], strict=False)
        )
        self.blocks = nn.ModuleList(ResidualBlock(widths[-1]) for _ in range(config.num_residual_blocks))
        self.project = nn.Conv2d(widths[-1], config.code_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = F.relu(stage(x))
        for block in self.blocks:
            x = block(x)
        return self.project(x)


class DepthDecoder(nn.Module):
    """Latents float[B, D, h, w] → map float[B, 1, H, W], about [-1, 1] and not clamped.

    Each stage enlarges and then convolves: faster on a CPU than a transposed convolution, and without checkerboards.
    """

    def __init__(self, config: PerceptioDepthConfig):
        super().__init__()
        widths = [*reversed(config.channels)]
        self.project = nn.Conv2d(config.code_dim, widths[0], 1)
        self.blocks = nn.ModuleList(ResidualBlock(widths[0]) for _ in range(config.num_residual_blocks))
        self.stages = nn.ModuleList(
            nn.Conv2d(coarse, fine, 3, padding=1)
            for coarse, fine in zip(widths, [*widths[1:], widths[-1]], strict=True)
        )
        self.head = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.project(latents)
        for block in self.blocks:
            x = block(x)
        for stage in self.stages:
            x = F.relu(stage(F.interpolate(x, scale_factor=2, mode="nearest")))
        return self.head(x)


class DepthVQVAE(PreTrainedModel):
    """Encoder, codebook and decoder.  The codebook is a buffer: it is learned by averaging, never by a gradient."""

    config_class = PerceptioDepthConfig
    config: PerceptioDepthConfig
    base_model_prefix = "depth_model"
    main_input_name = "depth"
    # It has no attention, so whatever kernel the whole model is asked to use suits it.
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

    def codebook_hash(self) -> str:
        return codebook_hash(self.codebook)

    def _prepare(self, depth: Tensor) -> Tensor:
        """Relative inverse depth float[B, H', W'] in [0, 1], any size → float[B, 1, H, W] in [-1, 1]."""
        if depth.ndim != 3:
            raise ValueError(f"`depth` has shape {tuple(depth.shape)}, expected [batch, height, width]")
        if not torch.isfinite(depth).all():
            raise ValueError("`depth` holds NaN or infinite values: fill the holes, or leave the map out")
        low, high = depth.amin().item(), depth.amax().item()
        if low < -1e-4 or high > 1 + 1e-4:
            raise ValueError(
                f"`depth` ranges from {low:.4g} to {high:.4g}, expected relative inverse depth in [0, 1] "
                "(1 is nearest): normalise it per picture"
            )
        side = self.config.image_size
        maps = depth[:, None].to(self.codebook.device, self.codebook.dtype)
        if maps.shape[-2:] != (side, side):
            maps = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        return 2 * maps - 1

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
        merged = logits.float().softmax(-1) @ self.codebook.float()  # [B, N, D]
        return merged.to(self.codebook.dtype).unflatten(1, (side, side)).permute(0, 3, 1, 2)

    def encode(self, depth: Tensor) -> Tensor:
        """Relative inverse depth float[B, H', W'] in [0, 1], of any size → ids int[B, h, w]."""
        return self.nearest(self.encoder(self._prepare(depth)))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents float[B, D, h, w] → relative inverse depth float[B, H, W], not clamped: it can be trained."""
        return (self.decoder(latents)[:, 0] + 1) / 2

    def decode_ids(self, ids: Tensor) -> Tensor:
        """Ids int[B, h, w] or int[B, h*w] → relative inverse depth float32[B, H, W] in [0, 1], larger is nearer."""
        return self.decode(self.lookup(ids)).float().clamp(0, 1)

    def forward(self, depth: Tensor) -> Tensor:
        """Depth there and back: float[B, H', W'] in [0, 1] → float32[B, H, W] in [0, 1]."""
        return self.decode_ids(self.encode(depth))


__all__ = ["DepthVQVAE", "codebook_hash"]
