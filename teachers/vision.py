"""Train a small vision tower of InternVL to tell what every part of a picture shows.

    python -m perceptio.teachers.vision --config recipes/teachers/vision-tiny.yaml

The vision towers of real backbones come trained; this is the small one's training.  Every cell of a few pixels is
asked for the thing that it shows (noun, colour, pattern), how near it is, and whether a marked point is in it, by
linear heads that are thrown away afterwards.  Scenes are rendered once into `<output_dir>/scenes`; they are shown
whole, in part, or many things of many scenes in one picture.  A killed run goes on with the same command.  Writes
`<output_dir>/model`, a folder for `PerceptioVisionModel.from_pretrained`, with its figures on held-out scenes in
`evaluation.json`.
"""

import math
import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import InternVLVisionConfig

from ..configuration_perceptio import first_pixels
from ..modeling_convolutions import PerceptioVisionModel
from ..world.instances import InstanceSet
from ..world.marks import LETTERS, draw_points, drawn_larger
from .cells import NAMES, POINT, cell_figures, cell_loss, cell_truth, split_cells
from .convolutions import close_convolutions, open_convolutions, start_convolutions
from .freeze import load_part
from .scenes import SceneArguments, SceneDraws, SceneTrainer, as_pixels, cut_scene, main_of, resized, train_part

CLASSES = {**NAMES, "point": POINT}
WEIGHTS = {"noun": 4.0, "colour": 0.5, "pattern": 0.3, "point": 1.0, "depth": 6.0}  # nouns are the hard ones
POSITIONS, ALIKE, PASSED = 0.5, 0.4, 0.4  # at the start: size of the positions; of what is compared, and of its values
MARKED = 0.6  # share of the pictures that have marked points
TILED, TILES = 0.6, (2, 3, 3, 4)  # share of the pictures made of many things; how many tiles they have along a side
AROUND = (1.1, 2.0)  # how much larger than its thing a tile is
LEAST_TILE, LEAST_SHOWN = 20, 0.002  # pixels of the scene; share of them that a thing has at least


@dataclass
class VisionTrainingConfig(SceneArguments):
    """transformers' `TrainingArguments`, the scenes, and the size of the tower."""

    side: int = field(default=224, metadata={"help": "of the pictures, a multiple of twice the patch"})
    scene_side: int = field(default=224, metadata={"help": "of the rendered scenes, which pictures are made from"})
    patch: int = field(default=14, metadata={"help": "side of a patch"})
    cells: int = field(default=2, metadata={"help": "that are asked along each side of a patch"})
    width: int = field(default=256, metadata={"help": "of the tower"})
    conv_widths: list[int] = field(
        default_factory=list, metadata={"help": "of the stages that read a patch; none: one linear map reads it"}
    )
    conv_depths: list[int] = field(default_factory=list, metadata={"help": "blocks of each stage"})
    layers: int = field(default=8, metadata={"help": "of the tower"})
    heads: int = field(default=4, metadata={"help": "of its attention"})
    label_names: list[str] | None = field(default_factory=lambda: ["noun"])

    def __post_init__(self):
        super().__post_init__()
        if self.side % (2 * self.patch):
            raise ValueError(f"`side` is {self.side}, expected a multiple of {2 * self.patch}, twice `patch`")
        if self.conv_widths:
            first_pixels(vision_config(self.side, self.patch, self.width, 1, 1, self.conv_widths, self.conv_depths))
        if self.patch % self.cells:
            raise ValueError(f"`cells` is {self.cells}, expected a divisor of `patch`, which is {self.patch}")


def vision_config(
    side: int, patch: int, width: int, layers: int, heads: int, conv_widths=(), conv_depths=()
) -> InternVLVisionConfig:
    stages = {"conv_widths": list(conv_widths), "conv_depths": list(conv_depths)} if conv_widths else {}
    return InternVLVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch,
        layer_scale_init_value=1.0,  # a small one is for hundreds of layers, and slow
        **stages,
    )


class Cells(SceneDraws):
    """Scenes, and pictures of many things."""

    def __init__(self, scenes: InstanceSet, args: VisionTrainingConfig, repeats: int = 1):
        super().__init__(scenes, args, repeats)
        self._frames: dict[int, Tensor] = {}  # finding them takes longer than all that is drawn of a tile

    def draw(self, scene: dict[str, Tensor], rng) -> dict[str, Tensor]:
        if rng.random() < TILED:
            places = rng.integers(len(self.scenes), size=int(rng.choice(TILES)) ** 2)
            return draw_tiles([self.framed(int(place)) for place in places], self.args, rng)
        return draw_cells(scene, self.args, rng)

    def framed(self, place: int) -> dict[str, Tensor]:
        scene = self.scenes[place]
        if place not in self._frames:
            self._frames[place] = frames(scene["things"])
        return {**scene, "frames": self._frames[place]}


class SceneCells(SceneDraws):
    """Scenes alone, to measure on."""

    def draw(self, scene: dict[str, Tensor], rng) -> dict[str, Tensor]:
        return draw_cells(scene, self.args, rng, whole=True)


def draw_cells(scene: dict[str, Tensor], args: VisionTrainingConfig, rng, whole: bool = False) -> dict[str, Tensor]:
    """pixel_values float[3, S, S], and of every cell noun, colour, pattern, point int[C, C] and depth float[C, C].

    Half of the pictures are mirrored, some have marked points or, unless `whole`, show a part of the scene; light and
    contrast differ.
    """
    image, things, depth, places = cut_scene(scene, args.side, rng, whole)
    if rng.random() < 0.5:
        image, things, depth = image.flip(1), things.flip(1), depth.flip(1)
        places[places[:, 0] >= 0, 0] = args.side - 1 - places[places[:, 0] >= 0, 0]
    there = [(int(x), int(y)) for x, y in places.tolist() if x >= 0]
    marked: dict[tuple[int, int], str] = {}
    if there and rng.random() < MARKED:
        shown = int(rng.integers(min(2, len(there)), len(there) + 1))
        letters = rng.permutation(list(LETTERS))
        marked = {there[place]: str(letters[at]) for at, place in enumerate(rng.permutation(len(there))[:shown])}
    cells = cell_truth(things, depth, scene["names"], args.patch // args.cells)
    return {**show(image, marked, args, rng), **cells}


def draw_tiles(scenes: list[dict[str, Tensor]], args: VisionTrainingConfig, rng) -> dict[str, Tensor]:
    """The same, of a picture in which a square number of scenes have a tile each, with a thing that fills most of it:
    many more names than a scene has.  How near something is cannot be told of a tile, so that depth is NaN.

    scenes: with the `frames` of their things.
    """
    count, marked, marks = math.isqrt(len(scenes)), {}, rng.random() < MARKED
    tile, cell = args.side // count, args.patch // args.cells
    image = torch.zeros(args.side, args.side, 3, dtype=torch.uint8)
    names = torch.zeros(args.side, args.side, 3, dtype=torch.uint8)
    for place, scene in enumerate(scenes):
        top, left = (at * tile for at in divmod(place, count))
        rows, columns = around_a_thing(scene, rng)
        pixels, things, _ = resized(scene, rows, columns, tile)
        if rng.random() < 0.5:
            pixels, things = pixels.flip(1), things.flip(1)
        image[top : top + tile, left : left + tile] = pixels
        names[top : top + tile, left : left + tile] = scene["names"][things.long()]
        if marks and rng.random() < MARKED:
            x, y = (int(at) for at in rng.integers(tile // 3, tile - tile // 8, 2))
            marked[left + x, top + y] = str(rng.choice(list(LETTERS)))
    middle = slice(cell // 2, None, cell)
    shown = dict(zip(NAMES, names[middle, middle].long().unbind(-1), strict=True))
    return {**show(image, marked, args, rng), **shown, "depth": torch.full(shown["noun"].shape, torch.nan)}


def show(image: Tensor, marked: dict[tuple[int, int], str], args: VisionTrainingConfig, rng) -> dict[str, Tensor]:
    """pixel_values of the picture uint8[S, S, 3] with its marks in another light, and the point int[C, C] of cells."""
    cell = args.patch // args.cells
    point = torch.zeros((args.side // cell,) * 2, dtype=torch.long)
    if marked:
        larger = min(1.0, args.scene_side / args.side) * drawn_larger(rng)  # a small picture was marked before it grew
        drawn = draw_points(image.numpy(), list(marked), "".join(marked.values()), larger)
        image = torch.from_numpy(drawn.copy())
    for (x, y), letter in marked.items():
        point[y // cell, x // cell] = 1 + LETTERS.index(letter)
    light = torch.from_numpy(rng.uniform(0.85, 1.15, 3)).float() * float(rng.uniform(0.8, 1.2))
    return {"pixel_values": as_pixels((image.float() * light).clamp(0, 255)), "point": point}


def frames(things: Tensor) -> Tensor:
    """uint8[S, S] → int[things, 2, 2]: the first and last (row, column) of each that shows well; of the whole where
    there is none."""
    shown = 1 + things.flatten().bincount()[1:].ge(LEAST_SHOWN * things.numel()).nonzero()[:, 0]
    found = []
    for number in shown.tolist():
        own = things == number
        sides = [own.any(1 - side).nonzero()[:, 0] for side in (0, 1)]
        found.append(torch.tensor([[int(side[end]) for side in sides] for end in (0, -1)]))
    return torch.stack(found or [torch.tensor([[0, 0], [side - 1 for side in things.shape]])])


def around_a_thing(scene: dict[str, Tensor], rng) -> tuple[slice, slice]:
    """Rows and columns of a square about one of the scene's `frames`."""
    side = scene["things"].shape[0]
    low, high = scene["frames"][int(rng.integers(len(scene["frames"])))]
    size = int(min(side, max(LEAST_TILE, int((high - low).max()) * rng.uniform(*AROUND))))
    corner = ((low + high) // 2 - torch.from_numpy(rng.uniform(0.4, 0.6, 2) * size)).int().clamp(0, side - size)
    return tuple(slice(at, at + size) for at in corner.tolist())


class CellReader(nn.Module):
    """A vision tower with a linear head for each thing that is asked of a cell.

    cells: along each side of a patch."""

    def __init__(self, config: InternVLVisionConfig, cells: int = 2):
        super().__init__()
        self.cells = cells
        # the backward pass of written-out attention is the faster one on CPUs
        self.tower = PerceptioVisionModel._from_config(config, attn_implementation="eager")
        start_well(self.tower)
        self.heads = nn.Linear(config.hidden_size, cells**2 * (sum(CLASSES.values()) + 1))

    def read(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Of every class float[B, C, C, classes], and "depth" float[B, C, C]."""
        states = self.tower(pixel_values=pixel_values).last_hidden_state[:, 1:]
        side = int(states.shape[1] ** 0.5)
        cells = self.heads(states).float().unflatten(1, (side, side)).unflatten(-1, (self.cells, self.cells, -1))
        cells = cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return split_cells(cells, CLASSES)

    def forward(self, pixel_values: Tensor, **truth: Tensor) -> dict[str, Tensor]:
        found = self.read(pixel_values)
        figures = {} if self.training else cell_figures(found, truth)
        return {"loss": cell_loss(found, truth, WEIGHTS), **figures}


@torch.no_grad()
def start_well(tower: PerceptioVisionModel) -> None:
    """Near places begin alike, and attention begins by comparing each place with those that are like it, as it ends up
    in trained towers: few scenes then go a long way."""
    positions, width = tower.embeddings.position_embeddings, tower.config.hidden_size
    positions[0, 1:] = POSITIONS * sine_positions(int((positions.shape[1] - 1) ** 0.5), width)
    for layer in tower.encoder.layer:
        attention = layer.attention
        for linear, share in ((attention.q_proj, ALIKE), (attention.k_proj, ALIKE), (attention.v_proj, PASSED),
                              (attention.projection_layer, -PASSED)):  # fmt: skip
            linear.weight.copy_(share * torch.eye(width) + 0.02 * torch.randn(width, width))
    start_convolutions(tower)


def sine_positions(side: int, width: int) -> Tensor:
    """float[side², width]: sines and cosines of row and column, so that near places begin alike."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    rates = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    turns = [place.flatten()[:, None] * rates for place in (rows, columns)]
    return torch.cat([wave(turn) for turn in turns for wave in (torch.sin, torch.cos)], -1)


class VisionTrainer(SceneTrainer):
    facts = ("side", "scene_side", "patch", "cells", "width", "conv_widths", "conv_depths", "layers", "heads")
    draws, measured, part = Cells, SceneCells, "tower"

    @staticmethod
    def finish(model: CellReader) -> None:
        close_convolutions(model.tower)

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
    sizes = (args.side, args.patch, args.width, args.layers, args.heads, args.conv_widths, args.conv_depths)
    model = CellReader(vision_config(*sizes), args.cells)
    if args.start is not None:
        model.tower.load_state_dict(fitted(load_part(args.start).state_dict(), model.tower.state_dict()))
    open_convolutions(model.tower, norms=args.start is None)
    return train_part(VisionTrainer, model, args, args.scene_side)


def fitted(weights: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a tower for pictures or patches of another size: its filters and positions are resized.
    Convolutions that read patches are kept as they are."""
    patch, place = "embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings"
    filters = {}
    if patch in weights:
        old, new = weights[patch].shape[-1], like[patch].shape[-1]
        filters[patch] = F.interpolate(weights[patch], (new, new), mode="bilinear", antialias=True) * (old / new) ** 2
    first, rest = weights[place].split([1, weights[place].shape[1] - 1], 1)
    before, after = (int((positions.shape[1] - 1) ** 0.5) for positions in (weights[place], like[place]))
    rest = rest.unflatten(1, (before, before)).permute(0, 3, 1, 2)
    rest = F.interpolate(rest, (after, after), mode="bicubic").flatten(2).transpose(1, 2)
    return {**weights, **filters, place: torch.cat([first, rest], 1)}


def main(arguments: list[str] | None = None) -> int:
    return main_of(VisionTrainingConfig, train, arguments)


if __name__ == "__main__":
    sys.exit(main())
