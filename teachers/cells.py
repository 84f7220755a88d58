"""What every cell of a scene shows, asked by linear heads: dense questions that teach an encoder quickly."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..world.marks import LETTERS
from ..world.shapes import NOUNS
from ..world.surfaces import COLOURS, PATTERNS

NAMES = {"noun": len(NOUNS) + 1, "colour": len(COLOURS) + 1, "pattern": len(PATTERNS) + 1}  # 0 where there is no thing
POINT = len(LETTERS) + 1
WEIGHTS = {"noun": 2.0, "colour": 0.5, "pattern": 0.3, "depth": 2.0}
DEPTH_OFFSET = 0.1  # relative inverse depth is compared on a log scale above it


def cell_truth(things: Tensor, depth: Tensor, names: Tensor, cell: int) -> dict[str, Tensor]:
    """Of every cell of `cell` pixels: noun, colour, pattern int[C, C] of the thing in its middle, depth float[C, C].

    things: uint8[S, S];  depth: float16[S, S];  names: uint8[256, 3], as `InstanceSet` has them.
    """
    middle = slice(cell // 2, None, cell)
    shown = names.long()[things[middle, middle].long()]  # [C, C, 3]
    near = F.avg_pool2d(depth[None].float(), cell)[0]
    return {**dict(zip(NAMES, shown.unbind(-1), strict=True)), "depth": (near + DEPTH_OFFSET).log()}


def split_cells(logits: Tensor, classes: dict[str, int]) -> dict[str, Tensor]:
    """float[..., classes and depth] → by name, float[..., classes]; "depth" float[...]."""
    *parts, depth = logits.split([*classes.values(), 1], -1)
    return {**dict(zip(classes, parts, strict=True)), "depth": depth[..., 0]}


def cell_loss(found: dict[str, Tensor], truth: dict[str, Tensor], weights: dict[str, float] = WEIGHTS) -> Tensor:
    """float[]: the weighted sum; of what has a name, the mean over the cells that show something, which are few, and
    that over all cells; of depth over the cells where it is no NaN."""
    told = truth["depth"].isfinite()
    apart = (found["depth"] - truth["depth"].nan_to_num()).abs()
    losses = {"depth": (apart * told).sum() / told.sum().clamp(min=1)}
    for name in found.keys() - {"depth"}:
        missed = F.cross_entropy(found[name].flatten(0, -2), truth[name].flatten(), reduction="none")
        shown = truth[name].flatten() > 0
        losses[name] = missed.mean() + (missed * shown).sum() / shown.sum().clamp(min=1)
    return sum(weights[name] * loss for name, loss in losses.items())


@torch.no_grad()
def cell_figures(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of each question (right, asked): of names and points among the cells that have one, of depth δ1 of all."""
    figures = {}
    for name in found.keys() - {"depth"}:
        told = truth[name] > 0
        figures[name] = torch.stack([((found[name].argmax(-1) == truth[name]) & told).sum(), told.sum()])
    apart = (found["depth"] - truth["depth"]).abs().exp()
    figures["depth"] = torch.stack([(apart < 1.25).sum(), apart.isfinite().sum()])
    return figures
