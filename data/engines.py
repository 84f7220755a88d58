"""Who does the shards of a job: this process, a pool of processes, or Ray.  All take a killed worker for granted.

Both functions yield (task, error or None) for each task, in the order in which they end.
"""

import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict

from .shard_work import ShardTask, count_attempts, do_shard

MOST_IDLE = 2  # pools in a row that die before they begin a shard; those that die of one are bounded by that shard


def run_local(tasks: list, function: Callable, workers: int) -> Iterator[tuple]:
    if workers == 1:
        for task in tasks:
            yield task, do_shard(task, function)
        return
    left = {task.name: task for task in tasks}
    context = multiprocessing.get_context("spawn")  # a fork would copy threads that hold locks
    idle, before = 0, None
    while idle < MOST_IDLE:
        try:
            with ProcessPoolExecutor(workers, context, _start_worker, (function,)) as pool:
                running = {pool.submit(_work, task): name for name, task in left.items()}
                for future in as_completed(running):
                    error = future.result()
                    yield left.pop(running[future]), error
            return
        except BrokenProcessPool:  # a worker was killed: a new pool does what is left
            now = {name: count_attempts(task) for name, task in left.items()}
            idle, before = (idle + 1 if now == before or not any(now.values()) else 0), now
    raise RuntimeError(
        f"{idle} times the workers died before they began a shard, expected them to start: give more memory, name a "
        'function that a fresh process can import, and call the job under `if __name__ == "__main__":`'
    )


def _start_worker(function: Callable) -> None:
    global _worker
    _worker = function
    end_with_parent()


def end_with_parent() -> None:
    """In a worker: the workers of a killed job would else wait for ever for its next word."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(task):
    return do_shard(task, _worker)


class RayWorker:
    """One of Ray's actors: it holds the function, and with it the models, from shard to shard."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, row: dict) -> dict:
        task = ShardTask(**json.loads(row["task"]))
        return {"name": task.name, "error": do_shard(task, self.function) or ""}


def run_ray(tasks: list, function: Callable, workers: int, gpus: float = 0) -> Iterator[tuple]:
    """On the cluster that this process is connected to, or on one that is started on this machine and ended after."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError('engine "ray" needs Ray: pip install "perceptio[label]", or use --engine local') from error

    own = not ray.is_initialized()
    if own and os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level="ERROR")
    elif own:
        ray.init(
            address="local",
            num_cpus=workers + 1,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",  # whoever reaches a Ray port runs code: nobody else shall
        )
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        by_name = {task.name: task for task in tasks}
        items = [{"task": json.dumps(asdict(task))} for task in tasks]
        results = ray.data.from_items(items, override_num_blocks=len(tasks)).map(
            RayWorker,
            fn_constructor_args=(function,),
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(tasks))),
            num_cpus=1,
            num_gpus=gpus,
        )
        for row in results.iter_rows():
            yield by_name[row["name"]], row["error"] or None
    finally:
        if own:
            ray.shutdown()
