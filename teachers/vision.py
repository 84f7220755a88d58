"""Train a small InternViT to tell what every part of a picture shows.

    python -m perceptio.teachers.vision --config recipes/teachers/vision-tiny.yaml

The vision towers of real backbones come trained; this is the small one's training.  Every cell of a few pixels is
asked for the thing that it shows (noun, colour, pattern), how near it is, and whether a marked point is in it, by
linear heads that are thrown away afterwards.  Scenes are rendered once into `<output_dir>/scenes`; they are shown
whole, in part, or many things of many scenes in one picture.  A killed run goes on with the same command.  Writes
`<output_dir>/model`, a folder for `InternVLVisionModel.from_pretrained`, with its figures on held-out scenes in
`evaluation.json`.
"""

import math
import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import InternVLVisionConfig, InternVLVisionModel

from ..world.marks import LETTERS, draw_points, drawn_larger
from .cells import NAMES, POINT, cell_figures, cell_loss, cell_truth, split_cells
from .freeze import load_part
from .scenes import SceneArguments, SceneDraws, SceneTrainer, as_pixels, main_of, train_part

CLASSES = {**NAMES, "point": POINT}
POSITIONS, ALIKE, PASSED = 0.5, 0.4, 0.4  # at the start: size of the positions; of what is compared, and of its values
MARKED = 0.6  # share of the pictures that have marked points
TILED, TILES, AROUND = 0.5, (3, 4), (1.1, 2.0)  # share of the pictures made of many things, their tiles along a side,
# and how much larger than its thing a tile is
LEAST_TILE = 20  # pixels of the scene
CUT, LEAST_CUT = 0.7, 0.35  # share of the pictures that show what is around a thing, and the least side of that part


@dataclass
class VisionTrainingConfig(SceneArguments):
    """transformers' `TrainingArguments`, the scenes, and the size of the tower."""

    side: int = field(default=224, metadata={"help": "of the pictures, a multiple of twice the patch"})
    scene_side: int = field(default=224, metadata={"help": "of the rendered scenes, which pictures are made from"})
    patch: int = field(default=14, metadata={"help": "side of a patch"})
    cells: int = field(default=2, metadata={"help": "that are asked along each side of a patch"})
    width: int = field(default=256, metadata={"help": "of the tower"})
    layers: int = field(default=8, metadata={"help": "of the tower"})
    heads: int = field(default=4, metadata={"help": "of its attention"})
    label_names: list[str] | None = field(default_factory=lambda: ["noun"])

    def __post_init__(self):
        super().__post_init__()
        if self.side % (2 * self.patch):
            raise ValueError(f"`side` is {self.side}, expected a multiple of {2 * self.patch}, twice `patch`")
        if self.patch % self.cells:
            raise ValueError(f"`cells` is {self.cells}, expected a divisor of `patch`, which is {self.patch}")


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
    """Scenes, and pictures of many things."""

    def draw(self, scene: dict[str, Tensor], rng) -> dict[str, Tensor]:
        if rng.random() < TILED:
            tiles = int(rng.choice(TILES))
            others = (self.scenes[int(place)] for place in rng.integers(len(self.scenes), size=tiles**2 - 1))
            return draw_tiles([scene, *others], self.args, rng)
        return draw_cells(scene, self.args, rng)


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
    many more names than a scene has.  How near something is cannot be told of a tile, so that depth is NaN."""
    count, marked = math.isqrt(len(scenes)), {}
    tile, cell = args.side // count, args.patch // args.cells
    image = torch.zeros(args.side, args.side, 3, dtype=torch.uint8)
    names = torch.zeros(args.side, args.side, 3, dtype=torch.uint8)
    for place, scene in enumerate(scenes):
        top, left = (at * tile for at in divmod(place, count))
        rows, columns = around_a_thing(scene["things"], rng)
        pixels, things, _ = resized(scene, rows, columns, tile)
        if rng.random() < 0.5:
            pixels, things = pixels.flip(1), things.flip(1)
        image[top : top + tile, left : left + tile] = pixels
        names[top : top + tile, left : left + tile] = scene["names"][things.long()]
        if rng.random() < MARKED:
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
        drawn = draw_points(image.numpy(), list(marked), "".join(marked.values()), drawn_larger(rng))
        image = torch.from_numpy(drawn.copy())
    for (x, y), letter in marked.items():
        point[y // cell, x // cell] = 1 + LETTERS.index(letter)
    light = torch.from_numpy(rng.uniform(0.85, 1.15, 3)).float() * float(rng.uniform(0.8, 1.2))
    return {"pixel_values": as_pixels((image.float() * light).clamp(0, 255)), "point": point}


def cut_scene(scene: dict[str, Tensor], side: int, rng, all_of_it: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A square part of the scene with a thing in it, or all of it, in `side` pixels.

    image uint8[side, side, 3], things uint8[side, side], depth float32[side, side] between the part's own nearest and
    farthest, places int[5, 2], -1 outside.
    """
    whole = scene["image"].shape[0]
    shown, size, left, top = scene["things"].nonzero(), whole, 0, 0
    if not all_of_it and len(shown) and rng.random() < CUT:
        size = round(whole * rng.uniform(LEAST_CUT, 1))
        middle = shown[int(rng.integers(len(shown)))].tolist()
        top, left = (min(max(at - int(rng.integers(size)), 0), whole - size) for at in middle)
    rows, columns = slice(top, top + size), slice(left, left + size)
    image, things, depth = resized(scene, rows, columns, side)
    low, high = depth.aminmax()
    places = (scene["places"].int() - torch.tensor([left, top])) * side // size
    places[(scene["places"][:, 0] < 0) | (places < 0).any(1) | (places >= side).any(1)] = -1
    return image, things, (depth - low) / (high - low).clamp(min=1e-6), places


def around_a_thing(things: Tensor, rng) -> tuple[slice, slice]:
    """Rows and columns of a square about one of the things; of any, where there is none."""
    side, numbers = things.shape[0], 1 + things.flatten().bincount()[1:].nonzero()[:, 0]
    own = (things == numbers[int(rng.integers(len(numbers)))] if len(numbers) else torch.ones_like(things)).nonzero()
    low, high = own.min(0).values, own.max(0).values
    size = int(min(side, max(LEAST_TILE, int((high - low).max()) * rng.uniform(*AROUND))))
    corner = ((low + high) // 2 - torch.from_numpy(rng.uniform(0.4, 0.6, 2) * size)).int().clamp(0, side - size)
    return tuple(slice(at, at + size) for at in corner.tolist())


def resized(scene: dict[str, Tensor], rows: slice, columns: slice, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a square part of a scene: image uint8[side, side, 3], things uint8[side, side], depth float32[side, side]."""
    image = scene["image"][rows, columns].permute(2, 0, 1)[None]
    image = F.interpolate(image, (side, side), mode="bilinear", antialias=True)[0].permute(1, 2, 0).contiguous()
    maps = torch.stack([scene["things"][rows, columns].float(), scene["depth"][rows, columns].float()])
    things, depth = F.interpolate(maps[None], (side, side), mode="nearest-exact")[0]
    return image, things.byte(), depth


class CellReader(nn.Module):
    """A vision tower with a linear head for each thing that is asked of a cell.

    cells: along each side of a patch."""

    def __init__(self, config: InternVLVisionConfig, cells: int = 2):
        super().__init__()
        self.cells = cells
        # the backward pass of written-out attention is the faster one on CPUs
        self.tower = InternVLVisionModel._from_config(config, attn_implementation="eager")
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
    facts = ("side", "scene_side", "patch", "cells", "width", "layers", "heads")
    draws, measured, part = Cells, SceneCells, "tower"

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
    model = CellReader(vision_config(args.side, args.patch, args.width, args.layers, args.heads), args.cells)
    if args.start is not None:
        model.tower.load_state_dict(fitted(load_part(args.start).state_dict(), model.tower.state_dict()))
    return train_part(VisionTrainer, model, args, args.scene_side)


def fitted(weights: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a tower for pictures or patches of another size: its filters and positions are resized."""
    patch, place = "embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings"
    old, new = weights[patch].shape[-1], like[patch].shape[-1]
    filters = F.interpolate(weights[patch], (new, new), mode="bilinear", antialias=True) * (old / new) ** 2
    first, rest = weights[place].split([1, weights[place].shape[1] - 1], 1)
    before, after = (int((positions.shape[1] - 1) ** 0.5) for positions in (weights[place], like[place]))
    rest = rest.unflatten(1, (before, before)).permute(0, 3, 1, 2)
    rest = F.interpolate(rest, (after, after), mode="bicubic").flatten(2).transpose(1, 2)
    return {**weights, patch: filters, place: torch.cat([first, rest], 1)}


def main(arguments: list[str] | None = None) -> int:
    return main_of(VisionTrainingConfig, train, arguments)


if __name__ == "__main__":
    sys.exit(main())
