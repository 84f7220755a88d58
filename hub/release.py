"""Freeze perceptio-tiny: the folder that comes with the package, in half precision and small shards.

    python -m perceptio.hub.release build/tiny checkpoints/perceptio-tiny
    python -m perceptio.hub.release build/tiny checkpoints/perceptio-tiny --start checkpoints/perceptio-tiny
    python -m perceptio.hub.release --code checkpoints/perceptio-tiny       # after a change of the code beside it
    python -m perceptio.hub.release checkpoints/perceptio-tiny --results build/ablations/codes/*/results.json

Beside the model: the log of its fine-tuning (`log.jsonl`, `curve.svg`), its figures on held-out scenes and those of
its teachers (`evaluation.json`), the recipe that it was made by, and a card written from these (`hub/card.py`).
Figures that were measured on the folder itself come in afterwards (`evaluation/`).
"""

import argparse
import json
import math
import shutil
import sys
from itertools import groupby
from pathlib import Path
from statistics import fmean

import torch

from ..cli import refuse
from ..data.manifest import write_json
from ..files_perceptio import copy_code
from ..modeling_perceptio import PerceptioForConditionalGeneration
from ..processing_perceptio import PerceptioProcessor
from ..training.checkpoints import STATE, checkpoints
from .assemble import KEPT_FLOAT32, PART_PREFIXES, put_in_place
from .average import MEAN
from .card import CARD, CURVE, EVALUATION, LOG, read_object, write_card
from .manifest import write_manifest
from .repository import add_results
from .train_tiny import MORE_LAYERS
from .weights import write_shards

RECIPE = "recipe.yaml"
TEACHERS = {  # module and last recipe of each, and the folder of its run
    "segmenter": ("sam", "sam-tiny-whole", "sam-whole"),
    "vision tower": ("vision", "vision-tiny-large", "vision-large"),
}
LICENCE = "apache-2.0"
MEASURED = "Measured before the weights were rounded to half precision."
SHARD = "15MB"
LINES = 300  # of the log, at most: it counts among what the folder may weigh
LAST = ("step", "epoch", "num_tokens", "bad_steps")  # that a line has of its last step; of the rest it has the mean
CURVES = {"code_accuracy": "depth codes", "answer_accuracy": "whole answers", "mask_iou": "masks (mean IoU)"}
COLOURS = ("#e63c00", "#009ee1", "#00af82")


def release(run: Path, folder: Path, recipe: Path, start: Path | None = None) -> Path:
    """Write the folder from that of `perceptio.hub.train_tiny`; one that is there is replaced at the end.

    start: the perceptio-tiny that the run went on from, whose log comes before its own.
    """
    source = run / "run" / "model"
    log = json.loads((checkpoints(run / "run")[-1] / STATE).read_text("utf-8"))["log_history"]
    if start is not None:
        before = [json.loads(line) for line in (start / LOG).read_text("utf-8").splitlines()]
        last = max(line["step"] for line in before)
        log = [*before, *({**line, "step": line["step"] + last} for line in log)]
    log = shortened(log)
    results = json.loads((run / "eval" / "results.json").read_text("utf-8"))
    facts = {key: results[key] for key in ("figures", "settings", "data", "versions") if key in results}
    facts |= {"note": MEASURED, "teachers": {name: _teacher(run, *where) for name, where in TEACHERS.items()}}
    half = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    model = PerceptioForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    write_weights(model, half)
    PerceptioProcessor.from_pretrained(source).save_pretrained(half)
    (half / LOG).write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    (half / CURVE).write_text(draw_curve(log), encoding="utf-8")
    (half / RECIPE).write_text(recipe.read_text("utf-8"), encoding="utf-8")
    write_json(half / EVALUATION, facts)
    states = read_object(source / MEAN)["states"] if (source / MEAN).is_file() else 1
    write_json(half / CARD, card_facts(folder.name, states))
    write_card(half, folder.name, LICENCE)
    write_manifest(half)
    put_in_place(half, folder)
    return folder


def bring_up_to_date(folder: Path, code: bool, results: tuple[Path, ...]) -> None:
    """Bring in the code as it is now, figures that were measured on the folder, or both."""
    if results:
        add_results(folder, results, folder)
        write_card(folder, folder.name, LICENCE)
    if code:
        copy_code(folder)
    write_manifest(folder)


def write_weights(model: PerceptioForConditionalGeneration, folder: Path) -> None:
    """In float16 on the disk and float32 once loaded, which every processor computes; a codebook is never rounded."""
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    kinds = {name: torch.float32 if name.startswith(KEPT_FLOAT32) else torch.float16 for name in weights}
    sizes = {name: weight.numel() * kinds[name].itemsize for name, weight in weights.items()}
    write_shards(folder, sizes, lambda name: weights[name].to(kinds[name]), SHARD)


def shortened(log: list[dict], lines: int = LINES) -> list[dict]:
    """A log of so many lines at most, each for as many steps; one of no loss, as that of a run's end, is left out."""
    logged = [line for line in log if "loss" in line]
    width = logged[-1]["step"] / lines
    groups = [list(group) for _, group in groupby(logged, lambda line: math.ceil(line["step"] / width))]
    return [{key: _significant(group[-1][key] if key in LAST else fmean(line[key] for line in group if key in line))
             for key in group[-1]} for group in groups]  # fmt: skip


def _significant(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")


def draw_curve(log: list[dict]) -> str:
    """SVG: what the training batches were right in, against the records that were seen."""
    left, top, width, height = 48, 24, 560, 240
    last = log[-1]["step"]
    parts = []
    for share in (0, 25, 50, 75, 100):
        y = top + height * (1 - share / 100)
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" class="rule"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{share}%</text>')
    for number, ((key, name), colour) in enumerate(zip(CURVES.items(), COLOURS, strict=True)):
        points = " ".join(
            f"{left + width * line['step'] / last:.1f},{top + height * (1 - line[key]):.1f}"
            for line in log
            if key in line
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{left + 150 * number}" y="{top + height + 40}" style="fill:{colour}">{name}</text>')
    parts.append(f'<text x="{left + width}" y="{top + height + 18}" text-anchor="end">{last:,} steps</text>')
    style = "text{font:12px system-ui,sans-serif;fill:#1c1e22}.rule{stroke:#d4d4ce}"
    size = f'width="{left + width + 24}" height="{top + height + 56}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fafaf8"/>{"".join(parts)}</svg>\n'
    )


def card_facts(name: str, states: int = 1) -> dict:
    """What the card says that no other file knows.  states: of the training, of which the weights are the mean."""
    from ..world.shapes import NOUNS

    mean = "" if states == 1 else f" The weights are the mean of {states} states of it (`perceptio.hub.average`)."
    made = {"origin": "trained here, from nothing", "licence": LICENCE}
    return {
        "about": "A Perceptio small enough for a laptop, trained from nothing on rendered scenes: an InternVL "
        "(a vision tower and Qwen2), a SAM2 and a depth tokenizer of the real classes. Convolutions read the pictures "
        f"in place of the first layers of InternViT and of SAM2's Hiera. {name} shows how the method works; it has "
        f"never seen a photograph, and knows {len(NOUNS)} kinds of things.",
        "data": "Rendered scenes with exact depth, masks and answers (`perceptio world build`); the split that it is "
        "measured on has other scenes. Vision tower, SAM2's image encoder and depth tokenizer were trained first, on "
        f"scenes of the same kind; `train_sft.py` with [{RECIPE}]({RECIPE}) trained the rest, and further the vision "
        f"tower, which has {MORE_LAYERS} layers more by then.{mean}",
        "made_by": "python -m perceptio.hub.train_tiny",
        "limits": [
            "Its answers are about rendered things, and wrong about much that is not.",
            "Its chat template writes a picture behind the words of its message, wherever the message has it.",
        ],
        "parts": dict.fromkeys(PART_PREFIXES, made),
    }


def _teacher(run: Path, module: str, recipe: str, folder: str) -> dict:
    trained, frozen = run / folder / "model", Path("checkpoints") / f"{module}-tiny"  # of `train_tiny --frozen`
    figures = json.loads(((trained if trained.is_dir() else frozen) / "evaluation.json").read_text("utf-8"))
    command = f"python -m perceptio.teachers.{module} --config recipes/teachers/{recipe}.yaml"
    return {"figures": figures, "command": command}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of perceptio.hub.train_tiny")
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--code", action="store_true", help="bring the code in FOLDER up to date, and nothing else")
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[], metavar="FILE",
        help="results.json of `perceptio eval --model FOLDER`, for FOLDER's card",
    )  # fmt: skip
    parser.add_argument("--recipe", type=Path, default=Path("recipes/perceptio-tiny.yaml"))
    parser.add_argument(
        "--start", type=Path, metavar="DIR", help="the perceptio-tiny that RUN went on from (`train_tiny --start`)"
    )
    options = parser.parse_args(arguments)
    if (options.code or bool(options.results)) == (options.run is not None):
        parser.error("name the run and the folder, or the folder and --code or --results")
    if options.run is None:
        try:
            bring_up_to_date(options.folder, options.code, tuple(options.results))
        except (ValueError, OSError) as error:
            return refuse(error)
        return 0
    try:
        release(options.run, options.folder, options.recipe, options.start)
    except (ValueError, OSError, KeyError, IndexError) as error:
        return refuse(ValueError(f"{options.run} does not hold a finished run: {error}"))
    print(f"wrote {options.folder}: {sum(file.stat().st_size for file in options.folder.rglob('*')) / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
