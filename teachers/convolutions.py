"""How encoders of convolutions are trained: with norms behind them, which are folded into them at the end."""

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from ..modeling_convolutions import ConvBlock, ConvPatches, ConvStages

COLOURS = 3  # of a picture
BESIDE = 0.3  # at the start: what a block of convolutions adds to what it got


def convolutions(module: nn.Module) -> list[nn.Sequential]:
    """Each with its place for a norm."""
    parts = [part for part in module.modules() if isinstance(part, ConvPatches | ConvStages | ConvBlock)]
    found = [pair for part in parts for pair in part.children() if isinstance(pair, nn.Sequential)]
    return [pair for pair in found if isinstance(pair[0], nn.Conv2d)]


def start_convolutions(model: nn.Module) -> None:
    for conv, _ in convolutions(model):
        nn.init.kaiming_normal_(conv.weight)
        nn.init.zeros_(conv.bias)


def open_convolutions(model: nn.Module, norms: bool) -> None:
    """Make those ready that are trained: their filters are matrices, for Muon, and `norms` stand behind them."""
    second = {id(part.second) for part in model.modules() if isinstance(part, ConvBlock)}
    for pair in convolutions(model):
        if not pair[0].weight.requires_grad:
            continue
        if pair[0].weight.shape[1] > COLOURS:  # what reads the picture itself is no hidden layer
            register_parametrization(pair[0], "weight", Filters(pair[0].weight.shape[1:]))
        if norms:
            pair[0].bias.requires_grad_(False)  # the norm has its own
            pair[1] = nn.BatchNorm2d(pair[0].out_channels)
            if id(pair) in second:
                nn.init.constant_(pair[1].weight, BESIDE)


def close_convolutions(model: nn.Module) -> None:
    """Make them plain again: they do what they did with their norms in evaluation."""
    for pair in convolutions(model):
        conv, norm = pair
        if hasattr(conv, "parametrizations"):
            remove_parametrizations(conv, "weight")
        if isinstance(norm, nn.BatchNorm2d):
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            pair[1] = nn.Identity()


class Filters(nn.Module):
    """A convolution's weight, kept as a matrix."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape = shape  # of one filter

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(1, self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)
