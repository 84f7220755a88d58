"""What a kill and a bad sample do to a run, with our trainer's parts and with the stock `transformers.Trainer`.

    python bench/bench_survival.py [--kills 20]

Kills: a run that saves after every step is killed at a random moment after its first checkpoint, and resumed.  The
moments are the same shares of the run's own time for both.  Counted are the resumed runs that end with the losses and
the weights of a run that nothing stopped.

Bad sample: one sample in 64 is NaN, over 40 steps, saved every second one.  Counted are the checkpoints that hold a
weight that is not finite.  Writes bench/results/survival.json.
"""

import argparse
import json
import math
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from toy_training import STEPS, StockTrainer, ToyModel, ToyTrainer, curve, start, wait, wait_for  # noqa: E402

KINDS = {"ours": ToyTrainer, "stock": StockTrainer}
WIDTH = 100_000
SLOW = 0.03  # seconds of a step without its saving


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{STEPS}" / "model.safetensors")


def begin(folder: Path, kind: str, **options):
    return start(folder.with_suffix(".log"), folder, kind=KINDS[kind], width=WIDTH, slow=SLOW, **options)


def saved(folder: Path) -> bool:
    """The first checkpoint is complete, because the second is there."""
    return (folder / "checkpoint-2").exists()


def run_whole(folder: Path, kind: str) -> float:
    """Seconds from the second checkpoint to the end."""
    process = begin(folder, kind, resume=None)
    wait_for(lambda: saved(folder), process)
    start_time = time.perf_counter()
    wait_for(lambda: (folder / f"checkpoint-{STEPS}").exists(), process)
    seconds = time.perf_counter() - start_time
    if wait(process, 60):
        raise SystemExit(folder.with_suffix(".log").read_text())
    return seconds


def kill_and_resume(folder: Path, kind: str, moment: float, reference: Path) -> str:
    process = begin(folder, kind, resume=None)
    wait_for(lambda: saved(folder), process)
    time.sleep(moment)
    process.kill()
    if wait(process) != -signal.SIGKILL:
        raise SystemExit("a run ended before it was killed: raise SLOW")
    if wait(begin(folder, kind), 60):
        return "does not resume"
    if curve(folder / f"checkpoint-{STEPS}") != curve(reference / f"checkpoint-{STEPS}"):
        return "resumes with another curve"
    found, wanted = weights(folder), weights(reference)
    return "identical" if all(torch.equal(found[name], wanted[name]) for name in wanted) else "other weights"


def bad_sample(folder: Path, kind: str) -> dict:
    options = {"pixels": {20: math.nan}, "max_steps": 40, "save_steps": 2, "resume": None}
    if wait(start(folder.with_suffix(".log"), folder, kind=KINDS[kind], **options), 120):
        raise SystemExit(folder.with_suffix(".log").read_text())
    paths = sorted(folder.glob("checkpoint-*/model.safetensors"))
    spoiled = sum(not all(tensor.isfinite().all() for tensor in load_file(path).values()) for path in paths)
    last = curve(folder / "checkpoint-40")[-1]
    return {"checkpoints": len(paths), "not_finite": spoiled, "last_logged_loss": last["loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    rng = random.Random(0)
    shares = [rng.uniform(0, 0.9) for _ in range(arguments.kills)]
    count = sum(parameter.numel() for parameter in ToyModel(WIDTH).parameters())
    results: dict = {"steps": STEPS, "weights": count, "kills": {}, "one_bad_sample_in_64": {}}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            reference = Path(folder) / f"{kind}-whole"
            seconds = run_whole(reference, kind)
            outcomes = Counter(
                kill_and_resume(Path(folder) / f"{kind}-{number}", kind, share * seconds, reference)
                for number, share in enumerate(shares)
            )
            step = seconds / (STEPS - 2)
            results["kills"][kind] = {
                "kills": arguments.kills,
                "identical": outcomes.pop("identical", 0),
                **dict(sorted(outcomes.items())),
                "seconds_per_step": round(step, 3),
                "share_of_saving": round(1 - SLOW / step, 2),
            }
            results["one_bad_sample_in_64"][kind] = bad_sample(Path(folder) / f"{kind}-bad", kind)
            print(kind, results["kills"][kind], results["one_bad_sample_in_64"][kind], flush=True)
    path = Path(__file__).parent / "results" / "survival.json"
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
