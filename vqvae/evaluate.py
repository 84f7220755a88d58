"""How well a depth tokenizer keeps depth, and one picture of it.

    python -m perceptio.vqvae.evaluate checkpoints/depth-tiny --maps build/depth-maps/test --out build/depth-eval

Writes evaluation.json and evaluation.png.  All is measured at the resolution of the tokenizer, on maps it never saw.

Inverse depth v in [0, 1] has neither scale nor shift; AbsRel and delta1 need both.  They are taken on the depth
z = 1 / (v + 0.1): the farthest point of a picture then lies eleven times as far away as the nearest.  What other
offsets give stands beside it.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from ..cli import refuse
from ..data.depths import DepthError
from ..data.label import load_vqvae
from ..data.manifest import write_json
from ..drawing import colour_depth
from ..modeling_depth_vqvae import DepthVQVAE
from .maps import MapSet

OFFSET, OTHER_OFFSETS = 0.1, (0.02, 0.05, 0.25)
EDGE = 0.05  # step of log depth between two neighbours, as a share of its whole range, that counts as an edge
BATCH = 64
PANEL, GAP = 200, 8


def relative_errors(found: Tensor, true: Tensor, offset: float = OFFSET) -> tuple[Tensor, Tensor]:
    """AbsRel and delta1 of the depth 1 / (v + offset), for each map of float[B, H, W]."""
    ratio = (true + offset) / (found + offset)  # found depth over true depth
    return (ratio - 1).abs().mean((1, 2)), (torch.maximum(ratio, 1 / ratio) < 1.25).float().mean((1, 2))


def edges(depth: Tensor) -> Tensor:
    """bool[B, H, W]: where log(v + 0.1) steps to the right or downwards."""
    level = torch.log(depth / OFFSET + 1) / np.log(1 / OFFSET + 1)
    across, down = torch.zeros_like(level), torch.zeros_like(level)
    across[:, :, :-1] = (level[:, :, 1:] - level[:, :, :-1]).abs()
    down[:, :-1] = (level[:, 1:] - level[:, :-1]).abs()
    return torch.maximum(across, down) > EDGE


def edge_counts(found: Tensor, true: Tensor) -> Tensor:
    """[found edges, of which right, true edges, of which found], within one pixel, over all maps."""
    found, true = edges(found), edges(true)

    def near(mask: Tensor) -> Tensor:
        return F.max_pool2d(mask[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0

    return torch.stack([found.sum(), (found & near(true)).sum(), true.sum(), (true & near(found)).sum()]).double()


def spread(counts: Tensor) -> tuple[float, float]:
    """(share of the codes that are used at all, perplexity) of how often each code occurs."""
    share = counts.double() / counts.sum()
    entropy = -(share[share > 0] * share[share > 0].log()).sum()
    return (counts > 0).float().mean().item(), entropy.exp().item()


def legibility(ids: Tensor, depth: Tensor, grid: int, num_codes: int) -> float:
    """Share of the variance of the cells' mean log depth that each code tells by itself, whatever stands around it."""
    level = F.adaptive_avg_pool2d(torch.log(depth + OFFSET)[:, None], grid).flatten()
    ids = ids.flatten()
    counts = torch.bincount(ids, minlength=num_codes)
    means = torch.zeros(num_codes).index_add_(0, ids, level) / counts.clamp(min=1)
    return (1 - (level - means[ids]).square().mean() / level.var(unbiased=False)).item()


@torch.no_grad()
def evaluate(vqvae: DepthVQVAE, maps: MapSet | Tensor, count: int | None = None, progress: bool = False) -> dict:
    """Everything there is to say in numbers; `maps` at the tokenizer's resolution, the first `count` of them."""
    total = len(maps) if count is None else min(count, len(maps))
    if total == 0:
        raise DepthError("there are no maps to evaluate on: name a folder that holds some")
    rows: dict[str, list[Tensor]] = {}
    tally, all_ids, all_depth = torch.zeros(4, dtype=torch.double), [], []
    for start in tqdm(range(0, total, BATCH), "evaluating", disable=None if progress else True):
        true = maps[range(start, min(start + BATCH, total))]
        ids = vqvae.encode(true)
        found = vqvae.decode_ids(ids)
        again = vqvae.encode(found)
        true, found, ids = vqvae.resize(true).cpu(), found.cpu(), ids.cpu()
        scores = {"mse": (found - true).square().mean((1, 2)), "mae": (found - true).abs().mean((1, 2))}
        for offset in (OFFSET, *OTHER_OFFSETS):
            suffix = "" if offset == OFFSET else f"_{offset:g}"
            scores["abs_rel" + suffix], scores["delta1" + suffix] = relative_errors(found, true, offset)
        scores["stable"] = (again.cpu() == ids).float().mean((1, 2))
        for name, values in scores.items():
            rows.setdefault(name, []).append(values)
        tally += edge_counts(found, true)
        all_ids.append(ids)
        all_depth.append(true)
    ids = torch.cat(all_ids)
    result = {name: torch.cat(values).double().mean().item() for name, values in rows.items()}
    usage, perplexity = spread(torch.bincount(ids.flatten(), minlength=vqvae.config.num_codes))
    precision, recall = (tally[1] / tally[0].clamp(min=1)).item(), (tally[3] / tally[2].clamp(min=1)).item()
    return {
        "maps": total,
        **result,
        "edge_precision": precision,
        "edge_recall": recall,
        "edge_f1": 2 * precision * recall / max(precision + recall, 1e-12),
        "usage": usage,
        "perplexity": perplexity,
        "legibility": legibility(ids, torch.cat(all_depth), vqvae.config.grid_size, vqvae.config.num_codes),
    }


def report(vqvae: DepthVQVAE, maps: MapSet, count: int | None = None, progress: bool = False) -> dict:
    """`evaluate`, with what was measured on what."""
    facts = {"codebook": vqvae.codebook_hash(), "image_size": vqvae.config.image_size}
    facts |= {name: maps.facts[name] for name in ("source", "split")}
    return facts | evaluate(vqvae, maps, count, progress)


@torch.no_grad()
def draw(vqvae: DepthVQVAE, maps: Tensor) -> Image.Image:
    """A row for each map float[B, H, W]: depth, the grid of its codes, what comes back, and how far off that is."""
    ids = vqvae.encode(maps)
    found, true = vqvae.decode_ids(ids).cpu().numpy(), vqvae.resize(maps).cpu().numpy()
    titles = ("depth", "its codes", "decoded", "error (white: 0.2 and more)")
    sheet = Image.new("RGB", (4 * PANEL + 5 * GAP, len(maps) * (PANEL + GAP) + 24), (250, 250, 248))
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((GAP + column * (PANEL + GAP), 6), title, fill=(28, 30, 34))
    for row, codes in enumerate(ids.cpu().numpy()):
        off = np.abs(found[row] - true[row])
        panels = (
            colour_depth(true[row]),
            _code_grid(codes, vqvae.config.num_codes),
            colour_depth(found[row]),
            Image.fromarray((np.clip(off / 0.2, 0, 1) * 255).astype(np.uint8)).convert("RGB"),
        )
        for column, panel in enumerate(panels):
            place = (GAP + column * (PANEL + GAP), 24 + row * (PANEL + GAP))
            sheet.paste(panel.resize((PANEL, PANEL), Image.Resampling.NEAREST), place)
    return sheet


def _code_grid(codes: np.ndarray, num_codes: int) -> Image.Image:
    """Each cell with its code, in the colour of its number: codes are sorted by depth when they are frozen."""
    size = PANEL // len(codes)
    picture = colour_depth(codes / max(num_codes - 1, 1)).resize((size * len(codes),) * 2, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    for (row, column), code in np.ndenumerate(codes):
        ink = (250, 250, 248) if code < num_codes / 2 else (28, 30, 34)
        pen.text(((column + 0.5) * size, (row + 0.5) * size), str(code), fill=ink, anchor="mm", font_size=size // 2)
    return picture


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m perceptio.vqvae.evaluate",
        description="Measure a depth tokenizer on depth maps and draw what it keeps of them.",
        epilog="Example: python -m perceptio.vqvae.evaluate checkpoints/depth-tiny --maps build/depth-maps/test "
        "--out build/depth-eval",
    )
    parser.add_argument("model", metavar="DIR", help="folder of a depth tokenizer, or of a whole Perceptio")
    parser.add_argument(
        "--maps", metavar="DIR", required=True, help="maps, written with `python -m perceptio.vqvae.maps`"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder for evaluation.json and evaluation.png")
    parser.add_argument("--count", type=int, metavar="N", help="only the first N maps")
    parser.add_argument("--rows", type=int, default=6, metavar="N", help="maps that are drawn (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        vqvae, maps = load_vqvae(options.model, options.device), MapSet(options.maps)
        result = report(vqvae, maps, options.count, progress=True)
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "evaluation.json", result)
        draw(vqvae, maps[range(min(options.rows, len(maps)))]).save(out / "evaluation.png")
    except (ValueError, OSError, RuntimeError) as error:
        return refuse(error)
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
