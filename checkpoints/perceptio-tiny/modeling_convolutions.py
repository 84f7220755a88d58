"""Encoders that read pictures by convolutions, for a small Perceptio.

From few pictures a convolutional network learns shapes and edges much sooner than what the published towers begin
with: one linear map for each patch, or SAM2's Hiera.  Real configurations have neither `conv_widths` nor
`conv_depths`, and keep the library's own encoders.

B batch, C channels of a picture, S its side, N its patches (row-major), D width of the tower, h w a map of features.
"""

import torch
from torch import Tensor, nn
from transformers import InternVLVisionModel, Sam2Model
from transformers.models.sam2.modeling_sam2 import Sam2HieraDetModelOutput

from .configuration_perceptio import first_pixels


def convolution(given: int, width: int, side: int, stride: int = 1) -> nn.Sequential:
    """A convolution and what a training puts behind it."""
    return nn.Sequential(nn.Conv2d(given, width, side, stride, 1 if side == 3 else 0), nn.Identity())


class ConvBlock(nn.Module):
    """Two convolutions of 3 × 3 beside a shortcut."""

    def __init__(self, given: int, width: int, stride: int):
        super().__init__()
        self.first, self.second = convolution(given, width, 3, stride), convolution(width, width, 3)
        alike = stride == 1 and given == width
        self.shortcut = nn.Identity() if alike else convolution(given, width, stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(self.first(x).relu()) + self.shortcut(x)).relu()


class ConvStages(nn.Module):
    """float[B, C, S, S] → float[B, width, h, w] of each stage.

    pixels: along a side that the first convolution takes together.  Each later stage halves the side once more.
    """

    def __init__(self, channels: int, pixels: int, widths: list[int], depths: list[int]):
        super().__init__()
        self.first, given = convolution(channels, widths[0], pixels, pixels), widths[0]
        self.blocks = nn.ModuleList()
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            wider = ConvBlock(given, width, 2 if stage else 1)
            self.blocks.append(nn.Sequential(wider, *[ConvBlock(width, width, 1) for _ in range(depth - 1)]))
            given = width

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        pixels = pixel_values.to(self.first[0].bias.dtype).contiguous(memory_format=torch.channels_last)
        states = [self.first(pixels).relu()]
        for stage in self.blocks:
            states.append(stage(states[-1]))
        return states[1:]


class ConvPatches(nn.Module):
    """float[B, C, S, S] → float[B, N, D].

    `conv_widths` of the configuration are the widths of the stages, each of half the side of the one before;
    `conv_depths` count the blocks of each.
    """

    def __init__(self, config):
        super().__init__()
        self.stages = ConvStages(config.num_channels, first_pixels(config), config.conv_widths, config.conv_depths)
        self.last = convolution(config.conv_widths[-1], config.hidden_size, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.last(self.stages(pixel_values)[-1]).flatten(2).transpose(1, 2)


class ConvBackbone(nn.Module):
    """What SAM2's Hiera gives, from as many stages of its `embed_dim_per_stage`; `conv_depths` of its configuration
    count the blocks of each."""

    def __init__(self, config):
        super().__init__()
        widths, pixels = config.embed_dim_per_stage, config.patch_stride[0]
        self.stages = ConvStages(config.num_channels, pixels, widths, config.conv_depths)

    def get_input_embeddings(self) -> nn.Module:
        return self.stages.first

    def forward(self, pixel_values: Tensor, **kwargs) -> Sam2HieraDetModelOutput:
        states = tuple(state.movedim(1, -1) for state in self.stages(pixel_values))
        return Sam2HieraDetModelOutput(last_hidden_state=states[-1], intermediate_hidden_states=states)


def use_convolutions(model: InternVLVisionModel | Sam2Model) -> None:
    """Give the model the encoder of its configuration."""
    if isinstance(model, Sam2Model):
        backbone = model.config.vision_config.backbone_config
        if getattr(backbone, "conv_depths", None):
            model.vision_encoder.backbone = ConvBackbone(backbone)
    elif getattr(model.config, "conv_widths", None):
        model.embeddings.patch_embeddings = ConvPatches(model.config)


class PerceptioVisionModel(InternVLVisionModel):
    """InternVL's vision tower, whose patches may be read by convolutions."""

    def __init__(self, config):
        super().__init__(config)
        use_convolutions(self)


class PerceptioMaskModel(Sam2Model):
    """SAM2, whose backbone may be one of convolutions."""

    def __init__(self, config):
        super().__init__(config)
        use_convolutions(self)
