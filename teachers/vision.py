"""Train a small InternViT to tell what every part of a picture shows.

    python -m perceptio.teachers.vision --config recipes/teachers/vision-tiny.yaml

The vision towers of real backbones come trained; this is the small one's training.  Every cell of 7 pixels is asked
for the thing that it shows (noun, colour, pattern), how near it is, and whether a marked point is in it, by linear
heads that are thrown away afterwards.  Scenes are rendered once into `<output_dir>/scenes`.  A killed run goes on with
the same command.  Writes `<output_dir>/model`, a folder for `InternVLVisionModel.from_pretrained`, with its figures on
held-out scenes in `evaluation.json`.
"""

import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import InternVLVisionConfig, InternVLVisionModel

from ..world.marks import LETTERS, draw_points, drawn_larger
from .cells import NAMES, POINT, cell_figures, cell_loss, cell_truth, split_cells
from .freeze import load_part
from .scenes import SceneArguments, SceneDraws, SceneTrainer, as_pixels, main_of, train_part

CELLS = 2  # along each side of a patch
CLASSES = {**NAMES, "point": POINT}
POSITIONS, ALIKE, PASSED = 0.5, 0.4, 0.4  # at the start: size of the positions; of what is compared, and of its values
MARKED = 0.6  # share of the pictures that have marked points


@dataclass
class VisionTrainingConfig(SceneArguments):
    """transformers' `TrainingArguments`, the scenes, and the size of the tower."""

    side: int = field(default=224, metadata={"help": "of the pictures, a multiple of twice the patch"})
    patch: int = field(default=14, metadata={"help": "side of a patch"})
    width: int = field(default=256, metadata={"help": "of the tower"})
    layers: int = field(default=8, metadata={"help": "of the tower"})
    heads: int = field(default=4, metadata={"help": "of its attention"})
    label_names: list[str] | None = field(default_factory=lambda: ["noun"])

    def __post_init__(self):
        super().__post_init__()
        if self.side % (2 * self.patch):
            raise ValueError(f"`side` is {self.side}, expected a multiple of {2 * self.patch}, twice `patch`")


def vision_config(side: int, patch: int, width: int, layers: int, heads: int) -> InternVLVisionConfig:
    return InternVLVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch,
        layer_scale_init_value=1.0,  # a small one is for hundreds of layers, and slow
    )


class Cells(SceneDraws):
    def draw(self, scene: dict[str, Tensor], rng) -> dict[str, Tensor]:
        return draw_cells(scene, self.args, rng)


def draw_cells(scene: dict[str, Tensor], args: VisionTrainingConfig, rng) -> dict[str, Tensor]:
    """pixel_values float[3, S, S], and of every cell noun, colour, pattern, point int[C, C] and depth float[C, C].

    Half of the pictures are mirrored, some have marked points; light and contrast differ.
    """
    image, things, depth, places = scene["image"], scene["things"], scene["depth"], scene["places"].clone()
    if rng.random() < 0.5:
        image, things, depth = image.flip(1), things.flip(1), depth.flip(1)
        places[places[:, 0] >= 0, 0] = args.side - 1 - places[places[:, 0] >= 0, 0]
    cell = args.patch // CELLS
    count = args.side // cell
    point = torch.zeros(count, count, dtype=torch.long)
    there = [(int(x), int(y)) for x, y in places.tolist() if x >= 0]
    if there and rng.random() < MARKED:
        shown = int(rng.integers(min(2, len(there)), len(there) + 1))
        chosen = [there[place] for place in rng.permutation(len(there))[:shown]]
        letters = "".join(rng.permutation(list(LETTERS))[:shown])
        image = torch.from_numpy(draw_points(image.numpy(), chosen, letters, drawn_larger(rng)).copy())
        for (x, y), letter in zip(chosen, letters, strict=True):
            point[y // cell, x // cell] = 1 + LETTERS.index(letter)
    light = torch.from_numpy(rng.uniform(0.85, 1.15, 3)).float() * float(rng.uniform(0.8, 1.2))
    pixels = (image.float() * light).clamp(0, 255)
    return {
        "pixel_values": as_pixels(pixels),
        "point": point,
        **cell_truth(things, depth, scene["names"], cell),
    }


class CellReader(nn.Module):
    """A vision tower with a linear head for each thing that is asked of a cell."""

    def __init__(self, config: InternVLVisionConfig):
        super().__init__()
        # the backward pass of written-out attention is the faster one on CPUs
        self.tower = InternVLVisionModel._from_config(config, attn_implementation="eager")
        start_well(self.tower)
        self.heads = nn.Linear(config.hidden_size, CELLS**2 * (sum(CLASSES.values()) + 1))

    def read(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Of every class float[B, C, C, classes], and "depth" float[B, C, C]."""
        states = self.tower(pixel_values=pixel_values).last_hidden_state[:, 1:]
        side = int(states.shape[1] ** 0.5)
        cells = self.heads(states).float().unflatten(1, (side, side)).unflatten(-1, (CELLS, CELLS, -1))
        cells = cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return split_cells(cells, CLASSES)

    def forward(self, pixel_values: Tensor, **truth: Tensor) -> dict[str, Tensor]:
        found = self.read(pixel_values)
        figures = {} if self.training else cell_figures(found, truth)
        return {"loss": cell_loss(found, truth), **figures}


@torch.no_grad()
def start_well(tower: InternVLVisionModel) -> None:
    """Near places begin alike, and attention begins by comparing each place with those that are like it, as it ends up
    in trained towers: few scenes then go a long way."""
    positions, width = tower.embeddings.position_embeddings, tower.config.hidden_size
    positions[0, 1:] = POSITIONS * sine_positions(int((positions.shape[1] - 1) ** 0.5), width)
    for layer in tower.encoder.layer:
        attention = layer.attention
        for linear, share in ((attention.q_proj, ALIKE), (attention.k_proj, ALIKE), (attention.v_proj, PASSED),
                              (attention.projection_layer, -PASSED)):  # fmt: skip
            linear.weight.copy_(share * torch.eye(width) + 0.02 * torch.randn(width, width))


def sine_positions(side: int, width: int) -> Tensor:
    """float[side², width]: sines and cosines of row and column, so that near places begin alike."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    rates = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    turns = [place.flatten()[:, None] * rates for place in (rows, columns)]
    return torch.cat([wave(turn) for turn in turns for wave in (torch.sin, torch.cos)], -1)


class VisionTrainer(SceneTrainer):
    facts = ("side", "patch", "width", "layers", "heads")
    draws, part = Cells, "tower"

    @staticmethod
    def measure(rows: list[dict]) -> dict[str, float]:
        """Of the cells that show a thing or a mark, the share that is named right; of all, the share of depths within
        a quarter (δ1 of depth 1 / (v + 0.1))."""
        right = {}
        for name in (*CLASSES, "depth"):
            found, count = torch.stack([row[name] for row in rows]).sum(0).tolist()
            right[name] = found / max(count, 1)
        return right


def train(args: VisionTrainingConfig) -> int:
    torch.manual_seed(args.seed)
    model = CellReader(vision_config(args.side, args.patch, args.width, args.layers, args.heads))
    if args.start is not None:
        model.tower.load_state_dict(load_part(args.start).state_dict())
    return train_part(VisionTrainer, model, args)


def main(arguments: list[str] | None = None) -> int:
    return main_of(VisionTrainingConfig, train, arguments)


if __name__ == "__main__":
    sys.exit(main())
