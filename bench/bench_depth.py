"""The depth tokenizer against its ancestors' (bench/ancestor.py): error at the same training budget, and speed.

    python bench/bench_depth.py [--maps 6000]

Both see the same rendered maps of 320 × 320 pixels, in bf16, each as its own recipe has it (ours is recipes/depth/
tiny.yaml at 320 pixels).  First the ancestors' sees each map once; then ours sees as many maps, which takes less time,
and then ours trains for as long.  Error and speed are taken on other maps, in turn.  Writes bench/results/depth.json.
"""

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import ancestor
import torch

from perceptio.data.label import load_vqvae
from perceptio.vqvae.evaluate import relative_errors, spread
from perceptio.vqvae.maps import MapSet, write_maps
from perceptio.vqvae.train import Trainer, parse

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "depth" / "tiny.yaml"
MAPS = ROOT / "build" / "bench-depth-maps"
HELD_OUT, ROUNDS = 400, 7


def train_ancestor(maps: MapSet, count: int) -> tuple[ancestor.Ancestor, float]:
    torch.manual_seed(0)
    model = ancestor.Ancestor()
    optimizer = torch.optim.Adam(model.parameters(), ancestor.RATE)
    order = torch.randperm(len(maps), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    for step in range(count // ancestor.BATCH):
        optimizer.param_groups[0]["lr"] = ancestor.RATE * ancestor.RATE_FACTOR ** (step // ancestor.RATE_EVERY)
        chosen = order[torch.arange(step * ancestor.BATCH, (step + 1) * ancestor.BATCH) % len(order)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(maps[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"  step {step}: {loss.item():.4f}", flush=True)
    return model.eval(), time.perf_counter() - start


def train_ours(steps: int, count: int):
    with tempfile.TemporaryDirectory() as out:
        arguments = ["--config", str(RECIPE), "--out", out, "--maps", str(MAPS), "--steps", str(steps)]
        arguments += ["--image_size", str(ancestor.SIDE), "--train_count", str(count), "--eval_count", str(HELD_OUT)]
        never = ["--eval_every", "1000000", "--save_every", "1000000", "--log_every", "100"]
        trainer = Trainer(parse([*arguments, *never]))
        trainer.run()
        lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
        seconds = next(line["seconds"] for line in reversed(lines) if "seconds" in line)
        return load_vqvae(Path(out) / "model"), seconds, trainer.config.batch_size * steps


@torch.no_grad()
def errors(model, maps: MapSet) -> dict:
    rows, counts = [], torch.zeros(ancestor.CODES)
    for start in range(0, len(maps), 25):
        true = maps[range(start, min(start + 25, len(maps)))]
        ids = model.encode(true)
        found = model.decode_ids(ids)
        counts += torch.bincount(ids.flatten(), minlength=ancestor.CODES)
        abs_rel, delta1 = relative_errors(found, true)
        rows.append(
            torch.stack([(found - true).square().mean((1, 2)), (found - true).abs().mean((1, 2)), abs_rel, delta1])
        )
    mse, mae, abs_rel, delta1 = torch.cat(rows, 1).mean(1).tolist()
    usage, perplexity = spread(counts)
    return {"mse": mse, "mae": mae, "abs_rel": abs_rel, "delta1": delta1, "usage": usage, "perplexity": perplexity}


@torch.no_grad()
def speeds(models: dict, maps: MapSet) -> dict:
    """Maps a second of each, in turn and as they are used: float32, batches of 32."""
    batch = maps[range(32)]
    ids = {name: model.encode(batch) for name, model in models.items()}
    found = {name: {"encode": [], "decode": []} for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            for work, argument in (("encode", batch), ("decode", ids[name])):
                run = model.encode if work == "encode" else model.decode_ids
                start = time.perf_counter()
                run(argument)
                found[name][work].append(len(batch) / (time.perf_counter() - start))
    return {name: {work: statistics.median(values) for work, values in rows.items()} for name, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=6000)
    count = parser.parse_args().maps
    shutil.rmtree(MAPS, ignore_errors=True)
    write_maps(MAPS / "train", count=count, side=ancestor.SIDE, progress=True)
    write_maps(MAPS / "eval", split="validation", count=HELD_OUT, side=ancestor.SIDE, progress=True)
    train, held_out = MapSet(MAPS / "train"), MapSet(MAPS / "eval")
    theirs, seconds = train_ancestor(train, count)
    results: dict = {"maps": count, "ancestor": {"seconds": seconds, "maps_seen": count, **errors(theirs, held_out)}}
    print("ancestor", results["ancestor"], flush=True)
    batch = parse(["--config", str(RECIPE), "--out", "x"]).batch_size
    steps = math.ceil(count / batch)
    for name in ("same_maps", "same_time"):
        ours, spent, seen = train_ours(steps, count)
        results[name] = {"seconds": spent, "maps_seen": seen, **errors(ours, held_out)}
        print(name, results[name], flush=True)
        steps = int(steps * seconds / spent * 0.9)  # the later steps cost more: the cycle
    rates = speeds({"ancestor": theirs, "ours": ours}, held_out)
    results["speed"] = rates
    results["ratios"] = {
        **{f"{name}_{key}": results[name][key] / results["ancestor"][key] for name in ("same_maps", "same_time")
           for key in ("mse", "mae", "abs_rel", "seconds")},
        **{work: rates["ours"][work] / rates["ancestor"][work] for work in ("encode", "decode")},
    }  # fmt: skip
    print(json.dumps(results["ratios"], indent=2))
    target = Path(__file__).parent / "results" / "depth.json"
    target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
