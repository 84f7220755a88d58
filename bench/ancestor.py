"""The depth tokenizer of the models before this one (AiT as AURORA sets it up), built from its published description.

320 × 320 pixels, 10 × 10 codes of 128 × 512; five strided convolutions, two residual blocks, transposed convolutions
back; squared error, commitment 0.25, codes by moving average 0.99 from a normal start; Adam 3e-4, times 0.98 every
500 steps, batches of 8.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, GRID, CODES, DIM = 320, 10, 128, 512
WIDTHS = (1, 16, 32, 64, 128, 256)
DECAY, EPSILON, COMMITMENT = 0.99, 1e-5, 0.25
BATCH, RATE, RATE_FACTOR, RATE_EVERY = 8, 3e-4, 0.98, 500


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Ancestor(nn.Module):
    """Maps float[B, 320, 320] in [0, 1] → ids int[B, 100] → maps."""

    def __init__(self):
        super().__init__()
        down = [
            layer
            for fine, coarse in zip(WIDTHS, WIDTHS[1:], strict=False)
            for layer in (nn.Conv2d(fine, coarse, 4, 2, 1), nn.ReLU())
        ]
        self.encoder = nn.Sequential(*down, Residual(256), Residual(256), nn.Conv2d(256, DIM, 1))
        widths = (256, 256, 128, 64, 32, 16)
        up = [
            layer
            for coarse, fine in zip(widths, widths[1:], strict=False)
            for layer in (nn.ConvTranspose2d(coarse, fine, 4, 2, 1), nn.ReLU())
        ]
        start = (nn.Conv2d(DIM, 256, 1), nn.ReLU(), Residual(256), Residual(256))
        self.decoder = nn.Sequential(*start, *up, nn.Conv2d(16, 1, 1))
        self.codebook = nn.Buffer(torch.randn(CODES, DIM))
        self.counts = nn.Buffer(torch.zeros(CODES))
        self.sums = nn.Buffer(self.codebook.clone())

    def nearest(self, latents: Tensor) -> Tensor:
        points = latents.float().permute(0, 2, 3, 1).flatten(0, 2)
        return (self.codebook.square().sum(1) - 2 * points @ self.codebook.T).argmin(1).view(len(latents), -1)

    def lookup(self, ids: Tensor) -> Tensor:
        return self.codebook[ids].transpose(1, 2).unflatten(2, (GRID, GRID))

    def encode(self, maps: Tensor) -> Tensor:
        return self.nearest(self.encoder(2 * maps[:, None] - 1))

    def decode_ids(self, ids: Tensor) -> Tensor:
        return ((self.decoder(self.lookup(ids))[:, 0].float() + 1) / 2).clamp(0, 1)

    def loss(self, maps: Tensor) -> Tensor:
        x = 2 * maps[:, None] - 1
        latents = self.encoder(x)
        ids = self.nearest(latents)
        self._average(latents.detach().float(), ids)
        codes = self.lookup(ids)
        decoded = self.decoder(latents + (codes - latents).detach())
        return F.mse_loss(decoded.float(), x) + COMMITMENT * F.mse_loss(latents.float(), codes.detach())

    @torch.no_grad()
    def _average(self, latents: Tensor, ids: Tensor) -> None:
        points, ids = latents.permute(0, 2, 3, 1).flatten(0, 2), ids.flatten()
        counts = torch.bincount(ids, minlength=CODES).float()
        sums = torch.zeros_like(self.sums).index_add_(0, ids, points)
        self.counts.lerp_(counts, 1 - DECAY)
        self.sums.lerp_(sums, 1 - DECAY)
        total = self.counts.sum()
        smooth = (self.counts + EPSILON) / (total + CODES * EPSILON) * total
        self.codebook.copy_(self.sums / smooth[:, None])
