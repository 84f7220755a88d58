"""A job over the shards of a data set: every shard through one function, by one process, several, or Ray.

    python -m perceptio.data.job --in build/raw --out build/labelled --vqvae checkpoints/vqvae --workers 2

One shard in is one shard out, and in `.job/` a note with its checksum and what became of each row. The note is written
last: a shard without it is done again, so a killed worker or a killed job loses nothing, and the bytes are the same in
the end.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from ..cli import refuse
from .engines import run_local, run_ray
from .label import Labeller
from .lock import only_one
from .manifest import MANIFEST, join_manifest, join_summaries, read_manifest, write_json, write_manifest
from .record import DataError
from .shard_work import NOTES, ShardTask, attempts, read_note
from .shards import remove_leftovers
from .tally import Tally

ENGINES = ("local", "ray")
BATCH_SIZE = 16


def run_job(
    in_dir,
    out_dir,
    function: Callable[[dict], dict],
    *,
    engine: str = "local",
    workers: int = 1,
    batch_size: int = BATCH_SIZE,
    threads: int = 1,
    gpus: float = 0,
    progress: bool = False,
) -> dict:
    """Run `function` over all shards of `in_dir`, write `out_dir`, and return its manifest.

    function: a batch (columns → lists) → the same rows with the column `problem`; rows that have one are dropped and
        counted by what stands before its colon. It must give equal rows for equal rows and cross processes; its
        `describe()`, if it has one, says what decides the result.
    threads: of torch in each worker; another number can change the last bit of a map, so it is part of the job.
    gpus: share of a GPU that each of Ray's workers asks for.
    """
    if engine not in ENGINES or workers < 1:
        raise ValueError(f"engine {engine!r} with {workers} workers, expected one of {ENGINES} with at least 1")
    folder, out = Path(in_dir), Path(out_dir)
    if folder.resolve() == out.resolve():
        raise DataError(f"{out} is both input and output, expected another folder for the output: change --out")
    manifest = read_manifest(folder)
    description = {**_describe(function), "batch_size": batch_size, "threads": threads}
    job = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    (out / "data").mkdir(parents=True, exist_ok=True)
    (out / NOTES).mkdir(exist_ok=True)
    with only_one(
        out / NOTES / "lock", f"another job is writing to {out}, expected none: wait for it, or name another folder"
    ):
        _check_same_job(out, description)
        remove_leftovers(out)
        tasks = [
            ShardTask(str(folder), entry, str(out), job, batch_size, threads)
            for split in manifest["splits"].values()
            for entry in split["shards"]
        ]
        for task in tasks:
            attempts(task).unlink(missing_ok=True)
        errors = _run(tasks, function, engine, workers, gpus, progress)
        if errors:
            raise DataError(
                f"{len(errors)} of {len(tasks)} shards could not be done, the others are:\n"
                + "\n".join(errors)
                + "\nput this right and run the same command again: it goes on from here"
            )
        remove_leftovers(out)  # of workers that were killed on the way
        return _merge(out, manifest, tasks, description)


def _run(tasks: list[ShardTask], function, engine: str, workers: int, gpus: float, progress: bool) -> list[str]:
    """Do what is not done yet; returns the errors, one line for each shard that failed."""
    waiting = [task for task in tasks if read_note(task) is None]
    rows = sum(task.entry["rows"] for task in tasks)
    done = rows - sum(task.entry["rows"] for task in waiting)
    run = run_ray if engine == "ray" else run_local
    options = {"gpus": gpus} if engine == "ray" else {}
    errors = []
    with tqdm(total=rows, initial=done, unit="row", desc=engine, disable=not progress) as bar:
        for task, error in run(waiting, function, workers, **options) if waiting else ():
            bar.update(task.entry["rows"])
            if error is not None:
                errors.append(error)
    return sorted(errors)


def _describe(function: Callable) -> dict:
    if hasattr(function, "describe"):
        return function.describe()
    kind = function if hasattr(function, "__qualname__") else type(function)
    return {"function": f"{kind.__module__}.{kind.__qualname__}"}


def _check_same_job(out: Path, description: dict) -> None:
    path = out / NOTES / "job.json"
    if path.is_file():
        found = json.loads(path.read_bytes())
        if found != description:
            changed = sorted(key for key in {*found, *description} if found.get(key) != description.get(key))
            raise DataError(
                f"{out} holds the work of another job ({changed[0]} {found.get(changed[0])!r}), expected "
                f"{description.get(changed[0])!r}: name another folder, or remove this one"
            )
    elif (out / MANIFEST).is_file():
        raise DataError(f"{out} is a data set that no job wrote, expected a new folder: change --out")
    write_json(path, description)


def _merge(out: Path, manifest: dict, tasks: list[ShardTask], description: dict) -> dict:
    notes = {task.entry["file"]: read_note(task) for task in tasks}
    splits = {}
    for split, entry in manifest["splits"].items():
        tally = Tally(split)
        parts = [notes[shard["file"]] for shard in entry["shards"]]
        for note in parts:
            tally.add(note["tally"])
        tally.check(entry["rows"])
        splits[split] = join_summaries([note["total"] for note in parts], tally, split)
        splits[split]["earlier"] = [entry["tally"], *entry.get("earlier", [])]
    return write_manifest(out, {**join_manifest(splits), "job": description})


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m perceptio.data.job",
        description="Label a data set with depth: each picture gets a depth map from the teacher and the codes of the "
        "depth tokenizer. Rows that cannot be used are left out and counted by reason. Run the same command again "
        "after an interruption: what is done is not done twice.",
        epilog="Example: python -m perceptio.data.job --in build/raw --out build/labelled --vqvae checkpoints/vqvae "
        "--teacher depth-anything/Depth-Anything-V2-Small-hf --engine ray --workers 2",
    )
    parser.add_argument("--in", dest="source", metavar="DIR", required=True, help="folder of shards to read")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write; must not be the same")
    parser.add_argument("--vqvae", metavar="DIR", required=True, help="depth tokenizer, or a whole Perceptio")
    parser.add_argument(
        "--teacher",
        metavar="NAME",
        default="none",
        help="folder or Hub id of a depth-estimation model; none: rows must have depth already (default: %(default)s)",
    )
    parser.add_argument(
        "--engine", choices=ENGINES, default="local", help="what runs the workers (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes at a time (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, metavar="N", help="rows at a time in each")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch in each (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda (default: %(default)s)")
    parser.add_argument("--no-check", action="store_true", help="do not look at the finished rows again")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    function = Labeller(options.vqvae, options.teacher, options.device, not options.no_check)
    try:
        manifest = run_job(
            options.source,
            options.out,
            function,
            engine=options.engine,
            workers=options.workers,
            batch_size=options.batch_size,
            threads=options.threads,
            gpus=1 if options.device.startswith("cuda") else 0,
            progress=True,
        )
    except (ValueError, OSError, ImportError) as error:
        return refuse(error)
    for split, entry in manifest["splits"].items():
        tally = Tally(split).add(entry["tally"])
        print(tally)
    return 0


if __name__ == "__main__":
    # Under its own name: what is pickled as `__main__` is another class in every worker.
    from perceptio.data.job import main as run

    sys.exit(run())
