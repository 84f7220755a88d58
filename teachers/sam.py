"""Train a small SAM2 to segment what a point or a box shows.

    python -m perceptio.teachers.sam --config recipes/teachers/sam-tiny.yaml

Its image encoder is then frozen in a Perceptio, as the published ones are.  Scenes are rendered once into
`<output_dir>/scenes`.  A killed run goes on with the same command.  Writes `<output_dir>/model`, a folder for
`PerceptioMaskModel.from_pretrained`, with its figures on held-out scenes in `evaluation.json`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Sam2Config

from ..losses_perceptio import mask_iou, seg_bce_loss, seg_dice_loss, seg_object_loss
from ..modeling_convolutions import PerceptioMaskModel, PerceptioVisionModel
from .cells import NAMES, cell_loss, cell_truth, split_cells
from .convolutions import close_convolutions, open_convolutions, start_convolutions
from .freeze import load_part
from .scenes import SceneArguments, SceneDraws, SceneTrainer, as_pixels, cut_scene, main_of, train_part

POINT, ABSENT, TOP_LEFT, BOTTOM_RIGHT = 1, -1, 2, 3  # what SAM2 calls the points of a prompt
NOTHING = 255  # the number of no thing
SMALLEST = 0.002  # share of the picture from which a thing is asked for
MASK_WEIGHT, DICE_WEIGHT, IOU_WEIGHT, OBJECT_WEIGHT, GROUP_WEIGHT = 5.0, 1.0, 1.0, 0.5, 1.0
CELL = 4  # pixels
GROUP_PLACES, GROUP_WIDTH = 96, 64  # of a picture whose things are asked for, and numbers that tell things apart


@dataclass
class SamTrainingConfig(SceneArguments):
    """transformers' `TrainingArguments`, the scenes, and the size of the model."""

    side: int = field(default=192, metadata={"help": "of the pictures, a multiple of 64"})
    prompts: int = field(default=4, metadata={"help": "for each picture"})
    boxes: float = field(default=0.4, metadata={"help": "share of the prompts that are boxes"})
    width: int = field(default=48, metadata={"help": "of the encoder's first stage; it doubles from stage to stage"})
    blocks: list[int] = field(default_factory=lambda: [1, 2, 5, 2], metadata={"help": "of each stage"})
    convolutions: list[int] = field(
        default_factory=list, metadata={"help": "widths of four stages of convolutions; none: Hiera's blocks"}
    )
    encoder: str | None = field(
        default=None, metadata={"help": "folder of a vision tower whose convolutions the first stages are, unchanged"}
    )
    decoder_width: int = field(default=128, metadata={"help": "of the features and of the mask decoder"})
    label_names: list[str] | None = field(default_factory=lambda: ["masks"])

    def __post_init__(self):
        super().__post_init__()
        if self.side % 64 or self.side < 64:
            raise ValueError(f"`side` is {self.side}, expected a multiple of 64")
        if len(self.blocks) != 4 or min(self.blocks) < 1 or self.blocks[2] < 2:
            raise ValueError(f"`blocks` is {self.blocks}, expected four numbers from 1, the third at least 2")
        if self.convolutions and (len(self.convolutions) != 4 or min(self.convolutions) < 1):
            raise ValueError(f"`convolutions` is {self.convolutions}, expected four widths")
        if self.encoder is not None and not self.convolutions:
            raise ValueError(f"`encoder` is {self.encoder!r}, but without `convolutions` there are no stages to take")


def sam_config(
    side: int, width: int, blocks: list[int], decoder_width: int, convolutions: Sequence[int] = ()
) -> Sam2Config:
    grid = side // 4
    widths = list(convolutions) or [width, 2 * width, 4 * width, 8 * width]
    return Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "image_size": [side, side],
                "hidden_size": width,
                "num_attention_heads": 1,
                "blocks_per_stage": list(blocks),
                "embed_dim_per_stage": widths,
                "num_attention_heads_per_stage": [1, 2, 4, 8],
                "window_size_per_stage": [8, 4, 12, 6],
                "global_attention_blocks": [sum(blocks[:3]) - 1],
                "window_positional_embedding_background_size": [7, 7],
                "mlp_ratio": 4.0,
                **({"conv_depths": list(blocks)} if convolutions else {}),
            },
            "backbone_channel_list": widths[::-1],
            "backbone_feature_sizes": [[grid, grid], [grid // 2, grid // 2], [grid // 4, grid // 4]],
            "fpn_hidden_size": decoder_width,
        },
        prompt_encoder_config={"hidden_size": decoder_width, "image_size": side, "patch_size": 16},
        mask_decoder_config={
            "hidden_size": decoder_width,
            "mlp_dim": 4 * decoder_width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": decoder_width,
        },
    )


class Prompts(SceneDraws):
    """On scenes, and on parts of them."""

    def draw(self, scene: dict[str, Tensor], rng) -> dict[str, Tensor]:
        return draw_prompts(scene, self.args, rng)


class ScenePrompts(SceneDraws):
    """On whole scenes alone, to measure on."""

    def draw(self, scene: dict[str, Tensor], rng) -> dict[str, Tensor]:
        return draw_prompts(scene, self.args, rng, whole=True)


def draw_prompts(scene: dict[str, Tensor], args: SamTrainingConfig, rng, whole: bool = False) -> dict[str, Tensor]:
    """pixel_values float[3, S, S], points float[P, 2, 2] (x, y), labels int[P, 2], masks bool[P, S/4, S/4], and of
    every cell what `cell_truth` tells.

    Half of the pictures are mirrored.  A picture without a thing of some size asks for what is there, the largest.
    """
    image, things, depth, _ = cut_scene(scene, args.side, rng, whole)
    if rng.random() < 0.5:
        image, things, depth = image.flip(1), things.flip(1), depth.flip(1)
    counts = np.bincount(things.flatten().numpy(), minlength=2)
    counts[0] = 0
    large = np.flatnonzero(counts >= SMALLEST * things.numel())
    chosen = rng.choice(large if len(large) else [int(counts.argmax()) if counts.any() else NOTHING], args.prompts)
    points, labels, masks = [], [], []
    for number in chosen:
        mask = things == int(number)
        where = mask.nonzero()
        if not len(where):  # nothing at all is in the picture
            where = torch.tensor([[0, 0]])
        if rng.random() < args.boxes:
            low, high = where.amin(0).float(), where.amax(0).float()
            loose = torch.from_numpy(rng.uniform(-0.1, 0.1, (2, 2))).float() * (high - low)
            corners = torch.stack([low, high]) + loose
            points.append(corners.flip(1).clamp(0, args.side - 1))
            labels.append([TOP_LEFT, BOTTOM_RIGHT])
        else:
            place = where[int(rng.integers(len(where)))].float().flip(0)
            points.append(torch.stack([place, torch.zeros(2)]))
            labels.append([POINT, ABSENT])
        share = F.interpolate(mask[None, None].float(), size=(args.side // 4,) * 2, mode="area")[0, 0]
        masks.append(share >= 0.5)
    return {
        "pixel_values": as_pixels(image),
        "points": torch.stack(points),
        "labels": torch.tensor(labels),
        "masks": torch.stack(masks),
        "things": things[2::4, 2::4].long(),
        **cell_truth(things, depth, scene["names"], CELL),
    }


class PromptedSam(nn.Module):
    """SAM2 with its published losses: the best of three candidates learns the mask, all learn their IoU."""

    def __init__(self, config: Sam2Config):
        super().__init__()
        # the backward pass of written-out attention is the faster one on CPUs
        self.sam = PerceptioMaskModel._from_config(config, attn_implementation="eager")
        for module in self.sam.modules():  # the library's small start is for fine-tuning
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                module.reset_parameters()
        start_convolutions(self.sam)
        self.tell_places_alike()
        width = config.mask_decoder_config.hidden_size
        together = width // 8 + width // 4 + width  # of the three maps of features that the mask decoder reads
        self.heads = nn.Linear(together, 2 * GROUP_WIDTH + sum(NAMES.values()) + 1)
        self.group_bias = nn.Parameter(torch.tensor(-3.0))

    def tell_places_alike(self) -> None:
        """Places of prompts and of the picture in the same numbers, as published ones have them: the library draws
        those of a new model twice, and no attention then finds the place of a prompt."""
        self.sam.prompt_encoder.shared_embedding.load_state_dict(self.sam.shared_image_embedding.state_dict())

    def cells_loss(self, features: list[Tensor], things: Tensor, truth: dict[str, Tensor]) -> Tensor:
        """Many small questions a picture, from which the encoder learns what few prompts teach slowly: what every cell
        shows, and, from some places, which other places show the same thing."""
        side = things.shape[-1]
        wide = [F.interpolate(level, size=(side, side), mode="bilinear", align_corners=False) for level in features]
        groups, cells = self.heads(torch.cat(wide, 1).movedim(1, -1)).float().tensor_split([2 * GROUP_WIDTH], -1)
        told = cell_loss(split_cells(cells, NAMES), truth)
        return GROUP_WEIGHT * self._group_loss(*groups.flatten(1, 2).chunk(2, -1), things) + told

    def _group_loss(self, asked: Tensor, given: Tensor, things: Tensor) -> Tensor:
        flat = things.flatten(1)
        places = torch.multinomial((flat > 0).float() + 1e-3, GROUP_PLACES)
        asked = asked.gather(1, places[..., None].expand(-1, -1, GROUP_WIDTH))
        logits = (asked @ given.transpose(1, 2)).float() / GROUP_WIDTH**0.5 + self.group_bias
        truth = (flat.gather(1, places)[..., None] == flat[:, None]).float()
        return (MASK_WEIGHT * seg_bce_loss(logits, truth) + DICE_WEIGHT * seg_dice_loss(logits, truth)).mean()

    def forward(
        self, pixel_values: Tensor, points: Tensor, labels: Tensor, masks: Tensor, things: Tensor, **truth: Tensor
    ) -> dict[str, Tensor]:
        # not by `get_image_embeddings`, which has no gradient
        output = self.sam(pixel_values=pixel_values, input_points=points, input_labels=labels, multimask_output=True)
        features = output.image_embeddings
        logits = output.pred_masks.float().flatten(0, 1)  # [B * P, candidates, h, w]
        ious = output.iou_scores.float().flatten(0, 1)
        gold = masks.flatten(0, 1).float()
        flat, wanted = logits.flatten(2), gold.flatten(1)[:, None].expand(-1, logits.shape[1], -1)
        cost = MASK_WEIGHT * seg_bce_loss(flat, wanted) + DICE_WEIGHT * seg_dice_loss(flat, wanted)
        intersection, union = mask_iou(logits, gold[:, None])
        found = intersection / union.clamp(min=1)
        there = output.object_score_logits.float().flatten()
        objects = seg_object_loss(there, gold.flatten(1).any(-1)).mean()
        loss = cost.amin(-1).mean() + IOU_WEIGHT * (ious - found).square().mean() + OBJECT_WEIGHT * objects
        if self.training:
            loss = loss + self.cells_loss(features, things, truth)
        best = ious.argmax(-1, keepdim=True)
        shared, all_of_both = (area.gather(1, best)[:, 0].detach() for area in (intersection, union))
        return {"loss": loss, "shared": shared, "union": all_of_both, "is_box": (labels[..., 0] == TOP_LEFT).flatten()}


class SamTrainer(SceneTrainer):
    facts = ("side", "prompts", "boxes", "width", "blocks", "convolutions", "encoder", "decoder_width")
    draws, measured, part = Prompts, ScenePrompts, "sam"

    @staticmethod
    def finish(model: PromptedSam) -> None:
        close_convolutions(model.sam)

    @staticmethod
    def measure(rows: list[dict]) -> dict[str, float]:
        """Mean and cumulative IoU of the candidate that the model itself prefers, for points and for boxes."""
        shared, union, is_box = (torch.cat([row[name] for row in rows]) for name in ("shared", "union", "is_box"))
        figures = {}
        for name, kind in (("points", ~is_box), ("boxes", is_box)):
            figures[f"mean_iou_{name}"] = (shared[kind] / union[kind].clamp(min=1)).mean().item()
            figures[f"cumulative_iou_{name}"] = (shared[kind].sum() / union[kind].sum().clamp(min=1)).item()
        return figures


def take_stages(sam: PerceptioMaskModel, tower: PerceptioVisionModel) -> None:
    """Give the segmenter the tower's stages of convolutions as its first ones, and leave them as they are."""
    own, config = sam.vision_encoder.backbone.stages, tower.config
    given = tower.embeddings.patch_embeddings.stages.state_dict() if getattr(config, "conv_widths", None) else {}
    fits = {name: weight.shape for name, weight in own.state_dict().items()}
    if not given or any(fits.get(name) != weight.shape for name, weight in given.items()):
        backbone = sam.config.vision_config.backbone_config
        raise ValueError(
            f"`encoder` has stages of the widths {getattr(config, 'conv_widths', [])}, which do not begin "
            f"`convolutions` {backbone.embed_dim_per_stage} with `blocks` {backbone.conv_depths}"
        )
    own.load_state_dict({**own.state_dict(), **given})
    for name, weight in own.named_parameters():
        weight.requires_grad_(name not in given)


def train(args: SamTrainingConfig) -> int:
    torch.manual_seed(args.seed)
    model = PromptedSam(sam_config(args.side, args.width, args.blocks, args.decoder_width, args.convolutions))
    if args.start is not None:
        model.sam.load_state_dict(load_part(args.start).state_dict())
        model.tell_places_alike()
    if args.encoder is not None and args.start is None:
        take_stages(model.sam, load_part(args.encoder))
    open_convolutions(model.sam, norms=args.start is None)
    if args.process_index == 0:
        count, decoder = (sum(w.numel() for w in part.parameters()) for part in (model.sam, model.sam.mask_decoder))
        print(f"{count:,} parameters, {decoder:,} in the decoder")
    return train_part(SamTrainer, model, args, args.side)


def main(arguments: list[str] | None = None) -> int:
    return main_of(SamTrainingConfig, train, arguments)


if __name__ == "__main__":
    sys.exit(main())
