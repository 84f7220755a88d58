"""perceptio-tiny from nothing, in any number of parts: its teachers, its scenes, its fine-tuning, its figures.

    python -m perceptio.hub.train_tiny                    # until it is done
    python -m perceptio.hub.train_tiny --minutes 9        # stop in time; run again to go on
    python -m perceptio.hub.train_tiny --frozen           # with the trained teachers of checkpoints/
    python -m perceptio.hub.train_tiny --start DIR        # go on with a perceptio-tiny that was trained before
    python -m perceptio.hub.train_tiny --start DIR -- --samples 40000 --learning_rate 1e-3    # of train_sft.py

Every stage is a command of its own, printed as it is run; one that is done is not run again, one that was stopped goes
on from its newest checkpoint.  Exit codes: 0 done, 75 stopped with more to do, else that of the stage that failed.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.manifest import read_manifest
from .tiny_data import DEPTH, PARTS, missing_parts

OUT = Path("build/tiny")
HELD_OUT = {"test": 100, "points3": 150, "points4": 150, "points5": 150, "lure": 150, "refer": 150, "absent": 150}
MORE_TO_DO = 75
# glibc gives large blocks back to the system at once, and takes them again page by page in every step.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
STEP, CACHED = 16, 4  # records of a step, as the recipe has it, and of a part of one that a core keeps in its cache
LARGE_STEP, SPARE = 160, 4  # on an accelerator, which so small a model leaves idle; cores that load no records then
MORE_LAYERS = 2  # of the vision tower, than its teacher has
TEACHER_PARTS = 4  # of a step of the teachers, as their recipes have them
PATIENCE = 100  # seconds for a stage to write down where it is


@dataclass(frozen=True)
class Stage:
    name: str
    words: tuple[str, ...]
    done: Callable[[], bool]


def stages(
    python: str = sys.executable, frozen: bool = False, start: Path | None = None, more: Sequence[str] = ()
) -> list[Stage]:
    """frozen: the teachers are those of `checkpoints/`, and are not trained.  start: a Perceptio to fine-tune in place
    of a new one, which brings its own.  more: arguments of `train_sft.py`, before those of the recipe."""

    def stage(name: str, file: Path, *words) -> Stage:
        """One that leaves a file behind."""
        return Stage(name, (python, *map(str, words)), file.is_file)

    recipes = Path("recipes")
    base, sam, vision = (OUT / name for name in ("base", "sam-whole/model", "vision-large/model"))
    teachers = [
        stage("vision tower", OUT / "vision/model/evaluation.json", *teacher("vision")),
        stage("vision tower, larger pictures", vision / "evaluation.json", *teacher("vision", "-large")),
        stage("segmenter", OUT / "sam/model/evaluation.json", *teacher("sam")),
        stage("segmenter, all of it", sam / "evaluation.json", *teacher("sam", "-whole")),
    ]
    if frozen:
        teachers, sam, vision = [], Path("checkpoints/sam-tiny"), Path("checkpoints/vision-tiny")
    build = stage("base", base / "manifest.json",
                  "-m", "perceptio.hub.small", base, "--sam", sam, "--vision", vision, "--depth", DEPTH,
                  "--more-layers", MORE_LAYERS)  # fmt: skip
    before, model = ([*teachers, build], ()) if start is None else ([], ("--model", start))
    return [
        *before,
        Stage("scenes to learn from", (python, "-m", "perceptio.hub.tiny_data", str(OUT / "parts")),
              lambda: not missing_parts(OUT / "parts", PARTS)),
        *held_out(python),
        stage("fine-tuning", OUT / "run/model/manifest.json",
              *fine_tuning(), "--config", recipes / "perceptio-tiny.yaml", "--resume", *model, *more),
        stage("figures", OUT / "eval/results.json",
              "-m", "perceptio", "eval", "world", "--model", OUT / "run/model", "--data", OUT / "held-out",
              "--out", OUT / "eval", "--batch-size", 32),
    ]  # fmt: skip


def held_out(python: str = sys.executable) -> list[Stage]:
    """The scenes that are measured on."""

    def scenes(split: str, count: int) -> Stage:
        folder = OUT / "held-out"
        build = ("-m", "perceptio", "world", "build", folder, "--split", split, "--scenes", count)
        return Stage(f"scenes: {split}", (python, *map(str, build)), lambda: _has_split(folder, split))

    return [scenes(split, count) for split, count in HELD_OUT.items()]


def fine_tuning() -> tuple:
    """The script; on an accelerator in larger steps, fewer of them, for which the other cores load."""
    on_cores = fine_tuning_on_cores()
    if on_cores:
        return on_cores
    loading = max(1, (os.cpu_count() or 1) - SPARE)
    return ("train_sft.py", "--per_device_train_batch_size", LARGE_STEP, "--dataloader_num_workers", loading)


def fine_tuning_on_cores() -> tuple:
    """The script in as many processes as are worth it, each with few records at a time and fused layers; nothing where
    there is an accelerator."""
    shared = shared_out(STEP // CACHED)
    if not shared:
        return ()
    launch, step = shared
    return (*launch, "train_sft.py", "--per_device_train_batch_size", CACHED, *step, "--compiled", "true",
            "--pad_to_multiple_of", 32, "--dataloader_num_workers", 0)  # fmt: skip


def teacher(name: str, kind: str = "") -> tuple:
    module = ("-m", f"perceptio.teachers.{name}")
    recipe = ("--config", Path("recipes/teachers") / f"{name}-tiny{kind}.yaml")
    shared = shared_out(TEACHER_PARTS)
    if not shared:
        return (*module, *recipe)
    launch, step = shared
    return (*launch, *module, *recipe, *step)


def shared_out(parts: int) -> tuple[tuple, tuple] | None:
    """How to start a script in as many processes as a step of so many parts can be shared out to, evenly, and how many
    each then takes; None where there is an accelerator, which takes them one after the other."""
    import torch

    if torch.accelerator.is_available():
        return None
    processes = max(count for count in range(1, min(os.cpu_count() or 1, parts) + 1) if not parts % count)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes)
    return launch, ("--gradient_accumulation_steps", parts // processes)


def _has_split(folder: Path, split: str) -> bool:
    return (folder / "manifest.json").is_file() and split in read_manifest(folder)["splits"]


def run(stage: Stage, seconds: float | None) -> int:
    """The exit code of the stage; 75 where the time was too short."""
    print(f"== {stage.name}\n$ {' '.join(stage.words)}", flush=True)
    process = subprocess.Popen(stage.words, env={**KEEP_MEMORY, **os.environ})
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return MORE_TO_DO
    return code


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="stop after so long, to go on with the same command")
    parser.add_argument("--frozen", action="store_true", help="take the trained teachers of checkpoints/")
    parser.add_argument(
        "--start", type=Path, metavar="DIR", help="a perceptio-tiny that was trained before, to go on with"
    )
    parser.add_argument("more", nargs="*", metavar="OPTION", help="behind --: of train_sft.py, for the fine-tuning")
    options = parser.parse_args(arguments)
    end = None if options.minutes is None else time.monotonic() + 60 * options.minutes - PATIENCE / 2
    for stage in stages(frozen=options.frozen, start=options.start, more=options.more):
        if stage.done():
            continue
        left = None if end is None else end - time.monotonic()
        if left is not None and left < 1:
            return MORE_TO_DO
        code = run(stage, left)
        if code:
            return code
    print(f"done: {OUT / 'run/model'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
