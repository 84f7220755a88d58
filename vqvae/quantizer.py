"""The codebook while it is learned: vector-quantize-pytorch's, a moving average of what falls to each code.

The frozen tokenizer needs none of this.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..extras import extra
from ..modeling_depth_vqvae import DepthVQVAE

SHARPNESS = 4.0  # of the distances to the codes, when a cell is asked which code it is


class LearnedCodebook(nn.Module):
    """Latents float[B, D, h, w] → (quantised latents, ids int[B, h*w], commitment).

    It starts from k-means over the first latents that it sees.  A code that falls below `revive_below` cells a batch,
    averaged, is placed anew on a latent of the batch.
    """

    def __init__(self, num_codes: int, code_dim: int, *, decay: float, revive_below: float, processes: int = 1):
        super().__init__()
        with extra("depth", "training needs"):
            from vector_quantize_pytorch import VectorQuantize
        self.inner = VectorQuantize(
            code_dim,
            codebook_size=num_codes,
            decay=decay,
            kmeans_init=True,
            kmeans_iters=20,
            threshold_ema_dead_code=revive_below,
            rotation_trick=False,
            sync_codebook=processes > 1,
        )

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        side = latents.shape[-1]
        points = latents.float().flatten(2).transpose(1, 2)
        with torch.autocast(latents.device.type, enabled=False):
            quantised, ids, commitment = self.inner(points)
        return quantised.transpose(1, 2).unflatten(2, (side, side)), ids, commitment.sum()

    @property
    def codes(self) -> Tensor:
        """float32[K, D]"""
        return self.inner.codebook.detach().float()

    @property
    def started(self) -> bool:
        return bool(self.inner._codebook.initted)


class DepthTraining(nn.Module):
    """A tokenizer with the codebook that it learns, and the losses of a batch of maps."""

    def __init__(self, vqvae: DepthVQVAE, codebook: LearnedCodebook, loss: str = "l1"):
        super().__init__()
        self.vqvae, self.codebook, self.loss = vqvae, codebook, loss

    def forward(self, maps: Tensor, noise: Tensor | None, cycle: str | None) -> dict[str, Tensor]:
        """maps float[B, H, W] in [0, 1] at the tokenizer's resolution.

        noise: float[B, D, h, w] that is laid on the latents before there are codes, or None once there are.
        cycle: what the cycle trains, "encoder" or "both" (the decoder too); None for no cycle.

        Returns recon (mean absolute or squared error of log depth, as a share of its range), commitment (distance from
        the latents to their codes; before there are codes, how far their size is from 1), and once there are codes
        ids int[B, N], idle (how unevenly the codes are used) and, when asked for, cycle (cross entropy of the decoded
        map's codes against those it came from).
        """
        target = self.vqvae.warp(maps)
        latents = self.vqvae.encoder(target)
        if noise is not None:
            commitment = (latents.float().square().mean() - 1).abs()
            return {"recon": self._recon(latents + noise, target)[0], "commitment": commitment}
        quantised, ids, commitment = self.codebook(latents)
        recon, decoded = self._recon(quantised, target)
        losses = {"recon": recon, "commitment": commitment, "idle": self._idle(latents), "ids": ids}
        if cycle == "both":  # from the codes as they are: through the straight-through latents it would go astray
            decoded = self.vqvae.decoder(quantised.detach()).float()
        if cycle is not None:
            losses["cycle"] = self._cycle(decoded.detach() if cycle == "encoder" else decoded, ids)
        return losses

    def _recon(self, latents: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        decoded = self.vqvae.decoder(latents).float()
        error = (decoded - target) / 2
        return error.abs().mean() if self.loss == "l1" else error.square().mean(), decoded

    def _closeness(self, latents: Tensor) -> Tensor:
        """float[B*N, K], the larger the nearer."""
        points, codes = latents.float().flatten(2).transpose(1, 2).flatten(0, 1), self.codebook.codes
        return -SHARPNESS * (points.square().sum(1, keepdim=True) - 2 * points @ codes.T + codes.square().sum(1))

    def _idle(self, latents: Tensor) -> Tensor:
        """How far the codes are from being used alike: 0 when they are, log K when one does all the work."""
        share = self._closeness(latents).softmax(1).mean(0)
        return math.log(len(share)) + (share * share.clamp(min=1e-12).log()).sum()

    def _cycle(self, decoded: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(self._closeness(self.vqvae.encoder(decoded.clamp(-1, 1))), ids.flatten())
