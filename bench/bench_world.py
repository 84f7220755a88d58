"""How fast the world is rendered, with all annotations.

    python bench/bench_world.py [--scenes 600] [--size 224]

Scenes per second of the two worker processes that a small machine has, of one, and the share of each step; workers are
warm when the clock starts.  Writes bench/results/world.json.
"""

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path

from perceptio.world.questions import Asker
from perceptio.world.records import WorldOptions, scene_records
from perceptio.world.scene import sample_scene

WARM_UP = 60


def work(task) -> float:
    first, count, size, barrier_time = task
    options = WorldOptions(size, size)
    for index in range(WARM_UP):
        scene_records(10**6 + index, options=options)
    while time.time() < barrier_time:
        time.sleep(0.01)
    start = time.perf_counter()
    for index in range(first, first + count):
        scene_records(index, options=options)
    return time.perf_counter() - start


def rate(workers: int, scenes: int, size: int) -> float:
    begin = time.time() + 25 + 12 * workers
    share = scenes // workers
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        seconds = pool.map(work, [(worker * share, share, size, begin) for worker in range(workers)], 1)
    return share * workers / max(seconds)


def steps(size: int, count: int = 60) -> dict:
    """Milliseconds of each step of a scene."""
    import numpy as np

    total = {"scene and rendering": 0.0, "views": 0.0, "a question of each kind": 0.0}
    for index in range(-WARM_UP, count):
        rng = np.random.default_rng([9, index + WARM_UP])
        times = [time.perf_counter()]
        scene = sample_scene(rng, size, size)
        times.append(time.perf_counter())
        asker = Asker(scene, rng)
        times.append(time.perf_counter())
        for kind in WorldOptions().kinds:
            asker.ask(kind)
        times.append(time.perf_counter())
        if index >= 0:
            for name, start, stop in zip(total, times, times[1:], strict=False):
                total[name] += 1000 * (stop - start) / count
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    results = {"size": arguments.size, "scenes": arguments.scenes, "cores": os.cpu_count()}
    for workers in (1, 2):
        results[f"scenes_per_second_{workers}"] = rate(workers, arguments.scenes, arguments.size)
        print(f"{workers} workers: {results[f'scenes_per_second_{workers}']:.1f} scenes a second", flush=True)
    results["milliseconds"] = steps(arguments.size)
    target = Path(__file__).parent / "results" / "world.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
