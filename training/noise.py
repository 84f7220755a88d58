"""Wrong codes among those that are read while the right ones are learned."""

import torch
from torch import Tensor

from ..configuration_perceptio import PerceptioConfig


def with_code_noise(input_ids: Tensor, spans: Tensor, config: PerceptioConfig, share: float) -> Tensor:
    """`input_ids` int[B, L] with some codes of these spans replaced by random ones; the labels keep what is learned.

    Most codes are like the one before, so that a model which reads true codes alone learns to repeat them, and goes on
    repeating its own mistakes when it writes.  Where codes cannot be trusted, the picture has to tell the next one.

    spans: int[R, 2], row and column of the start marker;  share: of the codes, on average; each span has its own, from
    none to twice as many.
    """
    if not share or not len(spans):
        return input_ids
    (first, codes), n = config.depth_code_token_ids, config.span_length
    rows, starts = spans.unbind(-1)
    rows, columns = rows[:, None], starts[:, None] + 1 + torch.arange(n, device=spans.device)  # [R, 1], [R, N]
    wrong = torch.rand(columns.shape, device=spans.device) < 2 * share * torch.rand(len(spans), 1, device=spans.device)
    noise = torch.randint(first, first + codes, columns.shape, device=spans.device)
    noisy = input_ids.clone()
    noisy[rows, columns] = torch.where(wrong, noise, input_ids[rows, columns])
    return noisy
