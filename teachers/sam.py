"""Train a small SAM2 to segment what a point or a box shows.

    python -m perceptio.teachers.sam --config recipes/teachers/sam-tiny.yaml

Its image encoder is then frozen in a Perceptio, as the published ones are.  Scenes are rendered once into
`<output_dir>/scenes`.  A killed run goes on with the same command.  Writes `<output_dir>/model`, a folder for
`Sam2Model.from_pretrained`, with its figures on held-out scenes in `evaluation.json`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Sam2Config, Sam2Model, Trainer, TrainingArguments
from trl import TrlParser

from ..data.manifest import write_json
from ..losses_perceptio import mask_iou, seg_bce_loss, seg_dice_loss, seg_object_loss
from ..processing_perceptio import IMAGENET_MEAN, IMAGENET_STD
from ..training.checkpoints import EXIT_CODES, SafeCheckpoints, checkpoints
from ..training.guard import GuardedSteps, NoMemory
from ..world.instances import InstanceSet, write_instances

POINT, ABSENT, TOP_LEFT, BOTTOM_RIGHT = 1, -1, 2, 3  # what SAM2 calls the points of a prompt
NOTHING = 255  # the number of no thing
SMALLEST = 0.002  # share of the picture from which a thing is asked for
MASK_WEIGHT, DICE_WEIGHT, IOU_WEIGHT, OBJECT_WEIGHT = 5.0, 1.0, 1.0, 0.5


@dataclass
class SamTrainingConfig(TrainingArguments):
    """transformers' `TrainingArguments`, the scenes, and the size of the model."""

    scenes: int = field(default=12_000, metadata={"help": "to train on"})
    eval_scenes: int = field(default=300, metadata={"help": "held out"})
    side: int = field(default=192, metadata={"help": "of the pictures, a multiple of 64"})
    prompts: int = field(default=4, metadata={"help": "for each picture"})
    boxes: float = field(default=0.4, metadata={"help": "share of the prompts that are boxes"})
    width: int = field(default=48, metadata={"help": "of the encoder's first stage; it doubles from stage to stage"})
    blocks: list[int] = field(default_factory=lambda: [1, 2, 5, 2], metadata={"help": "of each stage"})
    decoder_width: int = field(default=128, metadata={"help": "of the features and of the mask decoder"})
    remove_unused_columns: bool = False
    label_names: list[str] | None = field(default_factory=lambda: ["masks"])

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        if self.side % 64 or self.side < 64:
            raise ValueError(f"`side` is {self.side}, expected a multiple of 64")
        if len(self.blocks) != 4 or min(self.blocks) < 1 or self.blocks[2] < 2:
            raise ValueError(f"`blocks` is {self.blocks}, expected four numbers from 1, the third at least 2")


def sam_config(side: int, width: int, blocks: list[int], decoder_width: int) -> Sam2Config:
    grid = side // 4
    widths = [width, 2 * width, 4 * width, 8 * width]
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


class Prompts(torch.utils.data.Dataset):
    """Scenes with prompts, all drawn from the seed and the place alone.  repeats: how often each scene comes."""

    def __init__(self, scenes: InstanceSet, args: SamTrainingConfig, repeats: int = 1, seed: int = 0):
        self.scenes, self.args, self.repeats, self.seed = scenes, args, repeats, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return len(self.scenes) * self.repeats

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        epoch, index = divmod(place, len(self.scenes))
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.scenes)))
        return draw_prompts(*self.scenes[int(self._order[1][index])], self.args, np.random.default_rng([place, 7]))


def draw_prompts(image: Tensor, things: Tensor, args: SamTrainingConfig, rng) -> dict[str, Tensor]:
    """pixel_values float[3, S, S], points float[P, 2, 2] (x, y), labels int[P, 2], masks bool[P, S/4, S/4].

    Half of the pictures are mirrored.  A picture without a thing of some size asks for what is there, the largest.
    """
    if rng.random() < 0.5:
        image, things = image.flip(1), things.flip(1)
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
    pixels = (image.float() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    return {
        "pixel_values": pixels.permute(2, 0, 1).contiguous(),
        "points": torch.stack(points),
        "labels": torch.tensor(labels),
        "masks": torch.stack(masks),
    }


class PromptedSam(nn.Module):
    """SAM2 with its published losses: the best of three candidates learns the mask, all learn their IoU."""

    def __init__(self, config: Sam2Config):
        super().__init__()
        self.sam = Sam2Model(config)
        for module in self.sam.modules():  # the library's small start is for fine-tuning
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                module.reset_parameters()

    def forward(self, pixel_values: Tensor, points: Tensor, labels: Tensor, masks: Tensor) -> dict[str, Tensor]:
        output = self.sam(pixel_values=pixel_values, input_points=points, input_labels=labels, multimask_output=True)
        logits = output.pred_masks.float().flatten(0, 1)  # [B * P, candidates, h, w]
        ious = output.iou_scores.float().flatten(0, 1)
        gold = masks.flatten(0, 1).float()
        flat, truth = logits.flatten(2), gold.flatten(1)[:, None].expand(-1, logits.shape[1], -1)
        cost = MASK_WEIGHT * seg_bce_loss(flat, truth) + DICE_WEIGHT * seg_dice_loss(flat, truth)
        intersection, union = mask_iou(logits, gold[:, None])
        found = intersection / union.clamp(min=1)
        there = output.object_score_logits.float().flatten()
        objects = seg_object_loss(there, gold.flatten(1).any(-1)).mean()
        loss = cost.amin(-1).mean() + IOU_WEIGHT * (ious - found).square().mean() + OBJECT_WEIGHT * objects
        chosen = found.gather(1, ious.argmax(-1, keepdim=True))[:, 0]
        return {"loss": loss, "iou": chosen.detach(), "is_box": (labels[..., 0] == TOP_LEFT).flatten()}


class SamTrainer(SafeCheckpoints, GuardedSteps, Trainer):
    def run_facts(self) -> dict:
        names = ("scenes", "side", "prompts", "boxes", "width", "blocks", "decoder_width", "learning_rate", "seed")
        return {name: str(getattr(self.args, name)) for name in (*names, "max_steps", "per_device_train_batch_size")}


def train(args: SamTrainingConfig) -> int:
    out = Path(args.output_dir)
    scenes = write_instances(out / "scenes" / "train", count=args.scenes, side=args.side, seed=args.seed)
    held_out = write_instances(
        out / "scenes" / "validation", split="validation", count=args.eval_scenes, side=args.side, seed=args.seed
    )
    needed = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    repeats = max(1, -(-needed // len(scenes)))
    torch.manual_seed(args.seed)
    model = PromptedSam(sam_config(args.side, args.width, args.blocks, args.decoder_width))
    trainer = SamTrainer(
        model, args, train_dataset=Prompts(scenes, args, repeats, args.seed), eval_dataset=Prompts(held_out, args)
    )
    if trainer.is_world_process_zero():
        count = sum(weight.numel() for weight in model.parameters())
        print(f"{count:,} parameters, {sum(w.numel() for w in model.sam.mask_decoder.parameters()):,} in the decoder")
    trainer.train(resume_from_checkpoint=bool(checkpoints(out)) or None)
    if trainer.interrupted is not None:
        return EXIT_CODES[trainer.interrupted]
    if trainer.is_world_process_zero():
        model.sam.save_pretrained(out / "model")
        figures = evaluate(model, Prompts(held_out, args), args.device)
        write_json(out / "model" / "evaluation.json", figures)
        print(figures)
    return 0


@torch.no_grad()
def evaluate(model: PromptedSam, prompts: Prompts, device, batch_size: int = 16) -> dict[str, float]:
    """Mean IoU of the candidate that the model itself prefers, for points and for boxes."""
    model.eval()
    loader = torch.utils.data.DataLoader(prompts, batch_size)
    rows = [model(**{name: tensor.to(device) for name, tensor in batch.items()}) for batch in loader]
    iou, is_box = (torch.cat([row[name] for row in rows]) for name in ("iou", "is_box"))
    return {
        "scenes": len(prompts),
        "mean_iou_points": iou[~is_box].mean().item(),
        "mean_iou_boxes": iou[is_box].mean().item(),
    }


def main(arguments: list[str] | None = None) -> int:
    try:
        (args,) = TrlParser((SamTrainingConfig,)).parse_args_and_config(arguments)
        return train(args)
    except (ValueError, OSError, ImportError, FloatingPointError, NoMemory) as error:
        print(f"perceptio: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
