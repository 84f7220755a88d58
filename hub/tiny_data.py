"""What perceptio-tiny is fine-tuned on, in parts that all cores make at once: scenes with their depth codes, and spans
that are given.

    python -m perceptio.hub.tiny_data build/tiny/parts
    python -m perceptio.hub.tiny_data build/tiny/parts --parts 400    # more; what is there is not made again
    python -m perceptio.hub.tiny_data build/tiny/unseen/parts --first 219 --parts 8    # others

A part is a folder with one data set of each kind.  A recipe names those of all parts as `parts/*/scenes`.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from ..cli import refuse
from ..data.engines import end_with_parent
from ..data.label import PROBLEM, Labeller
from ..data.pick import pick
from ..data.shards import write_shards
from ..data.sources.counterfactual import read_counterfactual
from ..data.tally import Tally
from ..world.records import WorldOptions, scene_records

PARTS = 200  # so that a run of `recipes/perceptio-tiny.yaml` sees hardly a picture twice; about 18 GB
SEED = 1000  # of the first part's scenes, and how far those of the next kind are off; the teachers have seen none
DEPTH = "checkpoints/depth-tiny"
LABELLED = 64  # records at a time
# Of each kind the scenes of a part: all sorts of questions, what things look like, and how they lie to each other.
LOOKS = {"colour": 4, "pattern": 2, "exists": 3, "absent": 2, "refer": 1, "count": 1, "closer": 1}
RELATIONS = {"side": 4, "closer": 6, "nearest": 2, "count": 1, "colour": 1, "refer": 1}
KINDS = {
    "scenes": (400, WorldOptions(turns=4, points=1.0, point_turns=5)),
    "looks": (150, WorldOptions(turns=5, points=0.0, kinds=LOOKS, repeated=("colour", "pattern", "exists", "absent"))),
    "relations": (
        200,
        WorldOptions(turns=6, points=0.0, kinds=RELATIONS, repeated=("side", "closer", "nearest", "refer")),
    ),
}
GIVEN = {"given": ("scenes", "points"), "given-things": ("relations", "things")}  # made of which, and about what
MAPS = 2  # that are given to each picture


def make_parts(
    folder: Path, count: int, workers: int | None = None, depth: str = DEPTH, kinds: dict = KINDS, first: int = 0
) -> None:
    """Make those of the `count` parts from `first` on that are not there.  depth: folder of the depth tokenizer."""
    if count < 1:
        raise ValueError(f"`parts` is {count}, expected at least 1")
    if workers is not None and workers < 1:
        raise ValueError(f"`workers` is {workers}, expected at least 1")
    if first < 0:
        raise ValueError(f"`first` is {first}, expected 0 or more")
    waiting = missing_parts(folder, count, first)
    if not waiting:
        return
    folder.mkdir(parents=True, exist_ok=True)
    workers = min(workers or os.cpu_count() or 1, len(waiting))
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker) as pool:
        jobs = [pool.submit(make_part, folder, number, depth, kinds) for number in waiting]
        try:
            for job in tqdm(as_completed(jobs), "parts", len(jobs), unit=" parts", disable=None):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def make_part(folder: Path, number: int, depth: str = DEPTH, kinds: dict = KINDS) -> None:
    """One part, whole or not at all."""
    half = folder / f".{number:03d}.incomplete"
    shutil.rmtree(half, ignore_errors=True)
    label = Labeller(depth)
    for place, (kind, (count, options)) in enumerate(kinds.items()):
        seed = SEED * (place + 1) + number
        records = [record for index in range(count) for record in scene_records(index, seed, "train", options)]
        write_shards(_labelled(records, label), half / kind)
    tally = Tally("things")
    write_shards(pick(half / "scenes", tally=tally, without="-points$"), half / "things", tally=tally)
    for kind, (source, about) in GIVEN.items():
        tally = Tally(kind)
        found = read_counterfactual(half / source, tally=tally, tokenizer=depth, each=MAPS, about=about)
        write_shards(found, half / kind, tally=tally)
    os.replace(half, part_folder(folder, number))


def part_folder(folder: Path, number: int) -> Path:
    return folder / f"{number:03d}"


def missing_parts(folder: Path, count: int, first: int = 0) -> list[int]:
    """The numbers of those of the `count` parts from `first` on that are not there."""
    return [number for number in range(first, first + count) if not part_folder(folder, number).is_dir()]


def _start_worker() -> None:
    torch.set_num_threads(1)
    end_with_parent()


def _labelled(records: list[dict], label: Labeller) -> Iterator[dict]:
    for start in range(0, len(records), LABELLED):
        some = records[start : start + LABELLED]
        done = label({name: [record[name] for record in some] for name in some[0]})
        problems = done.pop(PROBLEM)
        for record, problem in zip(zip(*done.values(), strict=True), problems, strict=True):
            if problem is not None:
                raise RuntimeError(f"a scene of our own cannot be labelled ({problem}): this must not happen")
            yield dict(zip(done, record, strict=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--parts", type=int, default=PARTS, help="default: %(default)s")
    parser.add_argument(
        "--first", type=int, default=0, metavar="N", help="number of the first one (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument(
        "--depth", default=DEPTH, metavar="DIR", help="folder of the depth tokenizer (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        make_parts(options.folder, options.parts, options.workers, options.depth, first=options.first)
    except BrokenProcessPool:
        return refuse(
            RuntimeError("a process was killed, for want of memory perhaps: run it again with fewer `--workers`")
        )
    except (ValueError, OSError) as error:
        return refuse(error)
    print(f"{options.parts} parts are in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
