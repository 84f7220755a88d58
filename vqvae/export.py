"""Freeze a depth tokenizer: a folder that `DepthVQVAE.from_pretrained` and `perceptio assemble --depth` load.

    python -m perceptio.vqvae.export build/depth-tiny checkpoints/depth-tiny --maps build/depth-test
    python -m perceptio.vqvae.export some/perceptio-8b build/its-depth-tokenizer

The hash of the codebook goes into config.json.  The codes of a data set carry the same hash, and a model refuses codes
of another.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..cli import refuse
from ..data.label import load_vqvae
from ..data.manifest import write_json
from ..hub.manifest import write_manifest
from ..modeling_depth_vqvae import DepthVQVAE
from .evaluate import draw, report
from .maps import MapSet

EVALUATION, TRAINING, PICTURE, CURVE = "evaluation.json", "training.json", "evaluation.png", "curve.jsonl"


@torch.no_grad()
def depth_of_codes(vqvae: DepthVQVAE) -> Tensor:
    """float[K]: the mean inverse depth of the map that a grid of one code alone decodes to."""
    cells = vqvae.config.span_length
    ids = torch.arange(vqvae.config.num_codes)[:, None].expand(-1, cells)
    return torch.cat([vqvae.decode_ids(part).mean((1, 2)) for part in ids.split(16)])


@torch.no_grad()
def sort_codes(vqvae: DepthVQVAE) -> DepthVQVAE:
    """Number the codes from far to near, in place: the numbers then mean something to whoever reads them."""
    vqvae.codebook.copy_(vqvae.codebook[depth_of_codes(vqvae).argsort(stable=True)].clone())
    return vqvae


def export(
    vqvae: DepthVQVAE,
    folder,
    evaluation: dict | None = None,
    training: dict | None = None,
    picture: Image.Image | None = None,
    curve: list[dict] | None = None,
) -> Path:
    """Write the frozen tokenizer with its hash, and what is known of how it was trained and how good it is.

    curve: its figures on held-out maps while it was trained.

    Float32 whatever it was trained in: a rounded codebook would have another hash.
    """
    folder = Path(folder)
    wrong = [name for name, value in vqvae.state_dict().items() if not torch.isfinite(value).all()]
    if wrong:
        raise ValueError(f"`{wrong[0]}` holds NaN or infinite values: this tokenizer was not trained to the end")
    vqvae = vqvae.float().cpu()
    vqvae.config.codebook_hash = vqvae.codebook_hash()
    vqvae.save_pretrained(folder)
    for name, facts in ((EVALUATION, evaluation), (TRAINING, training)):
        if facts is not None:
            write_json(folder / name, facts)
    if picture is not None:
        picture.save(folder / PICTURE)
    if curve:
        (folder / CURVE).write_text("".join(json.dumps(line) + "\n" for line in curve), encoding="utf-8")
    (folder / "README.md").write_text(_card(vqvae, evaluation, training), encoding="utf-8")
    write_manifest(folder)
    return folder


def _card(vqvae: DepthVQVAE, evaluation: dict | None, training: dict | None) -> str:
    config = vqvae.config
    lines = [
        "---\nlibrary_name: transformers\nlicense: apache-2.0\ntags: [perceptio, depth-estimation]\n---",
        "# A depth tokenizer of Perceptio\n",
        f"A depth map becomes {config.grid_size} × {config.grid_size} = {config.span_length} codes out of "
        f"{config.num_codes}, and comes back at {config.image_size} × {config.image_size} pixels. Depth is relative "
        "inverse depth in [0, 1], scaled per picture: larger is nearer. The codes are numbered from far to near.\n",
        "```python\nfrom perceptio import DepthVQVAE\n\nvqvae = DepthVQVAE.from_pretrained(folder)\n"
        "ids = vqvae.encode(depth)        # float[B, H, W] in [0, 1], any size\n"
        "depth = vqvae.decode_ids(ids)    # float32[B, image_size, image_size]\n```\n",
        f"- codebook hash: `{config.codebook_hash}`\n- parameters: {sum(p.numel() for p in vqvae.parameters()):,}",
    ]
    if training is not None:
        lines.append(f"- trained on {training['maps']:,} maps of `{training['source']}`, {training['steps']:,} steps")
        if teacher := training.get("teacher"):
            licence = training.get("teacher_licence") or "unknown to us"
            lines.append(f"- the depth was seen by `{teacher}`; the licence of its weights is {licence}")
    if evaluation is not None:
        rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in evaluation.items() if isinstance(value, float))
        where = f"{evaluation['maps']:,} maps of `{evaluation['source']}`, split `{evaluation['split']}`"
        lines.append(f"\nOn {where}, which it was not trained on:\n\n| measure | value |\n|---|---|\n{rows}")
        lines.append("\n![Depth, its codes, what they decode to, and the error](evaluation.png)\n")
    return "\n".join(lines) + "\n"


def read_curve(log: Path) -> list[dict]:
    """The lines of a run's log that hold figures of held-out maps, or those of an earlier curve."""
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.is_file() else []
    return [line for line in lines if "eval" in line]


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m perceptio.vqvae.export",
        description="Freeze the depth tokenizer of a training run, or take the one out of a whole Perceptio.",
        epilog="Example: python -m perceptio.vqvae.export build/depth-tiny checkpoints/depth-tiny",
    )
    parser.add_argument("source", metavar="DIR", help="folder of a run, of a depth tokenizer, or of a Perceptio")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--maps", metavar="DIR", help="measure it on these maps; otherwise its earlier figures are kept"
    )
    options = parser.parse_args(arguments)
    source = Path(options.source)
    source = source / "model" if (source / "model" / "config.json").is_file() else source
    try:
        vqvae = load_vqvae(source)
        training, evaluation, picture = _read(source / TRAINING), _read(source / EVALUATION), None
        if options.maps:
            maps = MapSet(options.maps)
            evaluation, picture = report(vqvae, maps, progress=True), draw(vqvae, maps[range(min(6, len(maps)))])
        elif (source / PICTURE).is_file():
            picture = Image.open(source / PICTURE)
        log = source.parent / "log.jsonl" if (source.parent / "log.jsonl").is_file() else source / CURVE
        export(vqvae, options.out, evaluation, training, picture, read_curve(log))
    except (ValueError, OSError) as error:
        return refuse(error)
    print(f"wrote {options.out}: codebook {vqvae.config.codebook_hash}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
