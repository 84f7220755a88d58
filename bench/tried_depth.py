"""What was tried with the depth tokenizer, what it brought and what it did not: a table.

    python bench/tried_depth.py [--steps 300] [--out build/tried-depth]

Every row is recipes/depth/tiny.yaml with the changes that it names, for the same short time, on the same maps; so the
rows compare with each other and not with a full training.  A row that is done is not done again.  Writes
bench/results/depth_tried.json.
"""

import argparse
import json
import time
from pathlib import Path

from perceptio.data.manifest import write_json
from perceptio.vqvae.train import Trainer, parse

ROOT = Path(__file__).parent.parent
KEYS = ("abs_rel", "delta1", "mse", "edge_f1", "usage", "perplexity", "stable", "legibility")
TRIED = {
    "the recipe": {},
    "squared error in place of absolute": {"loss": "l2"},
    "plain depth in place of log depth": {"depth_offset": 10000},
    "codes from the first step, no warm-up": {"codes_from": 0},
    "no revival of dead codes": {"revive_below": 0},
    "no cycle": {"cycle_weight": "0", "cycle_from": "0"},
    "learning rate 2e-3": {"learning_rate": 0.002},
    "codes of 64 numbers in place of 16": {"code_dim": 64},
    "encoder of 1 layer and decoder of 6 in place of 3 and 4": {"num_encoder_layers": 1, "num_decoder_layers": 6},
}


def run(changes: dict, steps: int, out: Path, maps: Path) -> dict:
    arguments = ["--config", str(ROOT / "recipes" / "depth" / "tiny.yaml"), "--out", str(out), "--maps", str(maps)]
    arguments += ["--steps", str(steps), "--eval_every", "1000000", "--save_every", "1000000"]
    for name, value in changes.items():
        arguments += [f"--{name}", str(value)]
    start = time.perf_counter()
    result = Trainer(parse(arguments)).run()
    return {"changes": changes, "seconds": time.perf_counter() - start, **{key: result[key] for key in KEYS}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "tried-depth")
    options = parser.parse_args()
    target = ROOT / "bench" / "results" / "depth_tried.json"
    results = json.loads(target.read_text()) if target.is_file() else {}
    if results.get("steps") != options.steps:
        results = {"steps": options.steps, "rows": {}}
    for number, (name, changes) in enumerate(TRIED.items()):
        if name not in results["rows"]:
            results["rows"][name] = run(changes, options.steps, options.out / f"{number:02d}", options.out / "maps")
            write_json(target, results)
            row = results["rows"][name]
            print(name, {key: round(row[key], 4) for key in KEYS}, flush=True)


if __name__ == "__main__":
    main()
