"""What every part of Perceptio brings: the same run without it, and answers after depth codes that are not its own.

    python bench/ablations.py --config recipes/ablations/tiny.yaml --out build/ablations
    python bench/ablations.py --tokens checkpoints/perceptio-tiny --data build/tiny/held-out --out build/ablations

The first goes on with a trained model, without each of its parts in turn and with every seed, and measures what
comes out; the second asks a trained model the closest-point questions with its own codes, with random and constant
ones, those of another picture, and those of the true depth.  What is done is not done again.  Both write
bench/results/ablations.json and draw ablations.svg beside it.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

import yaml

from perceptio.data.manifest import write_json
from perceptio.evaluation import CODES
from perceptio.evaluation.metrics import NORMAL_95
from perceptio.hub import train_tiny
from perceptio.hub.train_tiny import KEEP_MEMORY, fine_tuning_on_cores

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "ablations.json"
CLOSEST, FOUND = ("points3", "points4", "points5", "lure"), "closest point"
SHOWN = {  # beside the closest points: split and figure
    "answers": ("test", "answers"),
    "masks, cIoU": ("refer", "cIoU"),
    "δ1": ("test", "delta1, aligned"),
}
# What the paper and public work report for the same changes, in points of HardBLINK's mean.
PUBLISHED = {
    "no perception tokens": "−1.0 (LLaVA-13B), −12.4 (Qwen2.5-VL-3B)",
    "no depth span": "−25.8 (Perceptio-8B)",
}
PUBLISHED_CODES = {
    "random": "−8.9 (LLaVA-13B), −19.9 (Qwen2.5-VL-3B)",
    "constant": "−4.0 (LLaVA-13B), −12.4 (Qwen2.5-VL-3B)",
    "oracle": "+1.1 (LLaVA-13B), +9.4 (Qwen2.5-VL-3B)",
}


def run(*words) -> None:
    command = [sys.executable, *map(str, words)]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=ROOT, env={**KEEP_MEMORY, **os.environ})


def read_config(path: Path) -> dict:
    """The settings of a comparison; those of its runs are the recipe's, but for what it has itself."""
    config = yaml.safe_load(path.read_text("utf-8"))
    recipe = yaml.safe_load((ROOT / config.pop("recipe")).read_text("utf-8"))
    return {**config, "train": {**recipe, **config["train"]}}


def train(changes: dict, seed: int, config: dict, folder: Path) -> Path:
    """The folder of the trained model.  changes: arguments of train_sft.py, and `without` for its data."""
    if (folder / "run" / "model" / "manifest.json").is_file():
        return folder / "run" / "model"
    folder.mkdir(parents=True, exist_ok=True)
    changes = dict(changes)
    without, data = changes.pop("without", ""), folder / "data.yaml"
    recipe = yaml.safe_load((ROOT / config["train"]["data"]).read_text("utf-8"))
    # Spans that are given teach to read spans: without spans there is nothing to give.
    kept = [s for s in recipe["sources"] if "depth" not in without or not s["name"].startswith("given")]
    if without:
        kept = [{**source, "without": _either(without, source.get("without", ""))} for source in kept]
    recipe |= {"sources": kept, "root": str(ROOT / config["scenes"]["root"])}
    data.write_text(yaml.safe_dump(recipe), "utf-8")
    arguments = {**config["train"], **changes, "data": str(data), "seed": seed, "output_dir": str(folder / "run")}
    (folder / "run.yaml").write_text(yaml.safe_dump(arguments), "utf-8")
    run(*(fine_tuning_on_cores() or ("train_sft.py",)), "--config", folder / "run.yaml", "--resume")
    return folder / "run" / "model"


def _either(*left_out: str) -> str:
    return "+".join(part for part in ("seg", "depth") if any(part in some for some in left_out))


def ask(model: Path, data: str, splits: Sequence[str], out: Path, *options: str) -> dict:
    """Split → figure → value and number of questions; of closest points also which were found, a digit for each."""
    words = ["--model", model, "--data", data, "--split", ",".join(splits), "--out", out, "--batch-size", "32"]
    if not (out / "results.json").is_file():
        run("-m", "perceptio", "eval", "world", *words, *options)
    found: dict = {}
    for figure in json.loads((out / "results.json").read_text("utf-8"))["figures"]:
        split, name = figure["name"].split(": ", 1)
        found.setdefault(split, {})[name] = {"value": figure["value"], "n": figure["n"]}
    judged = map(json.loads, (out / "judgements.jsonl").read_text("utf-8").splitlines())
    for values in (row["values"] for row in sorted(judged, key=itemgetter("id"))):
        if values["kind"] == "points" and values["split"] in CLOSEST:
            told = found[values["split"]][FOUND]
            told["right"] = told.get("right", "") + str(int(values["right"]))
    return found


def closest(splits: dict) -> float | None:
    """The share of closest points that were found, in percent as `perceptio eval` writes it; the splits' mean."""
    found = [splits[name][FOUND]["value"] for name in CLOSEST if name in splits]
    return statistics.fmean(found) if found else None


def difference(some: list[dict], others: list[dict]) -> tuple[float, float]:
    """How many more of the closest points some runs found than others, in percent, and by how much that may be off, at
    95%, for having asked these questions of all that might be.  All were asked the same."""
    shifts, variances = [], []
    for name in CLOSEST:
        if name in some[0] and name in others[0]:
            shares = [_found(runs, name) for runs in (some, others)]
            each = [100 * (one - other) for one, other in zip(*shares, strict=True)]
            shifts.append(statistics.fmean(each))
            variances.append(statistics.variance(each) / len(each))
    return statistics.fmean(shifts), NORMAL_95 * math.sqrt(sum(variances)) / len(shifts)


def _found(runs: list[dict], split: str) -> list[float]:
    """For each question the share of runs that found the point."""
    return [
        statistics.fmean(map(int, digits))
        for digits in zip(*(run[split][FOUND]["right"] for run in runs), strict=True)
    ]


def ablate(config: dict, out: Path, results: dict) -> None:
    shared = {key: value for key, value in config.items() if key not in ("seeds", "variants")}
    made = {"settings": shared, "start": weights_of(ROOT / config["train"]["model"])}
    if any(results.get(key) != value for key, value in made.items()):
        results |= {**made, "changes": {}, "variants": {}}
    for seed in config["seeds"]:
        for name, changes in config["variants"].items():
            variant = dict(changes or {})
            if results["changes"].get(name) != variant:
                results["changes"][name], results["variants"][name] = dict(variant), {}
            rows = results["variants"][name]
            if str(seed) in rows:
                continue
            folder = out / f"{name.replace(' ', '-')}-{seed}"
            claim(folder, {**made, "changes": variant})
            options, asked = variant.pop("eval", []), config["eval"]
            make_scenes(config["scenes"])
            make_held_out(asked["data"])
            model = train(variant, seed, config, folder)
            rows[str(seed)] = ask(model, asked["data"], asked["splits"], folder / "eval", *options)
            write_json(RESULTS, results)


def make_scenes(scenes: dict) -> None:
    """What all runs learn from, the same for each; what is there is not made again."""
    which = ("--first", scenes["first"], "--parts", scenes["parts"])
    run("-m", "perceptio.hub.tiny_data", f"{scenes['root']}/parts", *which)


def make_held_out(data: str) -> None:
    """Those of our own; another folder has to be there."""
    if Path(data).resolve() != (train_tiny.OUT / "held-out").resolve():
        return
    for stage in train_tiny.held_out():
        if not stage.done():
            run(*stage.words[1:])


def replace_codes(model: Path, data: str, out: Path, results: dict) -> None:
    weights = weights_of(model)
    claim(out / "codes", {"start": weights, "data": data})
    make_held_out(data)
    results["codes"] = {"model": model.name, "weights": weights, "with": {}}
    for codes in CODES:
        folder = out / "codes" / codes
        results["codes"]["with"][codes] = ask(model, data, CLOSEST, folder, "--depth-codes", codes)
        write_json(RESULTS, results)


def claim(folder: Path, made: dict) -> None:
    """made: of what everything in the folder is; what is there of something else is left alone, and refused."""
    known = folder / "made.json"
    there = json.loads(known.read_text("utf-8")) if known.is_file() else None
    if folder.is_dir() and any(folder.iterdir()) and there != made:
        raise SystemExit(f"{folder} is of other settings or another model: move it away, or give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(known, made)


def weights_of(model: Path) -> dict:
    """Size and checksum of each file."""
    manifest = json.loads((model / "manifest.json").read_text("utf-8"))
    return {name: entry for name, entry in manifest["files"].items() if name.endswith(".safetensors")}


# What people look at


def table(results: dict) -> str:
    """Markdown."""
    shown = ["closest point", "against all", *SHOWN, "seeds", "published"]
    lines = [f"| | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    whole = list(results.get("variants", {}).get("all", {}).values())
    for name, rows in results.get("variants", {}).items():
        values = _values(results, name)
        change = ""
        if name != "all" and whole and values:
            change = "{:+.1f} ± {:.1f}".format(*difference(list(rows.values()), whole))
        others = [
            _spread([splits[split][figure]["value"] for splits in rows.values() if figure in splits.get(split, {})])
            for split, figure in SHOWN.values()
        ]
        cells = [name, _spread(values), change, *others, len(values), PUBLISHED.get(name, "")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if "codes" in results:
        lines += ["", "| codes in the span | closest point | against its own | published |", "|---|---|---|---|"]
        own = closest(results["codes"]["with"]["own"])
        for codes, splits in results["codes"]["with"].items():
            value = closest(splits)
            change = "" if codes == "own" else f"{value - own:+.1f}"
            lines.append(f"| {codes} | {value:.1f} | {change} | {PUBLISHED_CODES.get(codes, '')} |")
    return "\n".join(lines)


def _values(results: dict, name: str) -> list[float]:
    found = (closest(splits) for splits in results.get("variants", {}).get(name, {}).values())
    return [value for value in found if value is not None]


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def plot(results: dict) -> str:
    """SVG: a row for each variant and for each kind of codes, a dot for each seed, a bar at the mean."""
    groups = [
        ("trained without a part", {name: _values(results, name) for name in results.get("variants", {})}),
        ("trained whole, other codes in the span",
         {codes: [closest(splits)] for codes, splits in results.get("codes", {}).get("with", {}).items()}),
    ]  # fmt: skip
    left, width, row, top = 200, 420, 26, 34
    parts, y = [], top
    for title, rows in groups:
        if not rows:
            continue
        parts.append(f'<text x="16" y="{y}" class="title">{title}</text>')
        for name, values in rows.items():
            y += row
            parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{name}</text>')
            parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" class="rule"/>')
            dots = [left + width * value / 100 for value in values]
            mean = statistics.fmean(dots)
            parts.append(f'<line x1="{mean:.1f}" x2="{mean:.1f}" y1="{y - 8}" y2="{y + 8}" class="mean"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y}" r="3.5"/>' for x in dots]
            parts.append(f'<text x="{left + width + 12}" y="{y + 4}">{statistics.fmean(values):.1f}%</text>')
        y += 2 * row
    parts += [
        f'<text x="{left + width * share / 100}" y="{y - row}" text-anchor="middle" class="soft">{share}%</text>'
        for share in (0, 25, 50, 75, 100)
    ]
    style = (
        "text{font:13px system-ui,sans-serif;fill:#1c1e22}.title{font-weight:600}.soft{fill:#60646c}"
        ".rule{stroke:#d4d4ce}.mean{stroke:#e63c00;stroke-width:2.5}circle{fill:#009ee1;fill-opacity:.75}"
    )
    size = f'width="{left + width + 80}" height="{y}" viewBox="0 0 {left + width + 80} {y}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fafaf8"/>{"".join(parts)}</svg>\n'
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="variants to train, as recipes/ablations/tiny.yaml")
    parser.add_argument("--tokens", type=Path, metavar="DIR", help="trained model whose codes are replaced")
    parser.add_argument("--data", default="build/tiny/held-out", help="scenes that --tokens asks about")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "ablations")
    options = parser.parse_args()
    if options.config is None and options.tokens is None:
        parser.error("name --config, --tokens, or both")
    if options.config is not None and not options.config.is_file():
        parser.error(f"`--config` is {options.config}, expected a file as recipes/ablations/tiny.yaml")
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    config = None if options.config is None else read_config(options.config)
    out, data = options.out.resolve(), str(Path(options.data).resolve())
    tokens = None if options.tokens is None else options.tokens.resolve()
    os.chdir(ROOT)
    if tokens is not None:
        replace_codes(tokens, data, out, results)
    if config is not None:
        ablate(config, out, results)
    RESULTS.with_suffix(".svg").write_text(plot(results), "utf-8")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
