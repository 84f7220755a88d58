"""The run of a benchmark: asks, judges, and writes a folder.

    OUT/run.json             what decides the predictions, written first; a folder that was begun otherwise is refused
    OUT/predictions.jsonl    a line for each item: its fingerprint, answer, masks, codes, problems
    OUT/seconds.jsonl        how long each took
    OUT/judgements.jsonl     what each item counts for, with its line in predictions.jsonl
    OUT/results.json         all figures, written last: a folder that has it is finished
    OUT/page.html            the best and the worst

Items of one perception are asked together, in batches that are the same each time, so that a run that was killed goes
on where it stopped and ends with the bytes of one that was not.  Nothing of the data is held but what the page shows.
"""

import hashlib
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..data.lock import only_one
from ..data.manifest import sha256, write_json
from ..data.record import DataError
from ..data.tally import Tally
from .benchmark import Benchmark, Figure, Item, Judgement, Prediction
from .page import Example, write_page
from .predict import Task

RUN, PREDICTIONS, SECONDS, JUDGEMENTS = "run.json", "predictions.jsonl", "seconds.jsonl", "judgements.jsonl"
RESULTS, PAGE, LOCK = "results.json", "page.html", ".run.lock"
SHOWN = 8  # best, and as many worst


@dataclass(frozen=True)
class Settings:
    """What a person chooses.

    limit: only the first so many items.
    perception: in place of each item's own, of items with exactly one picture.
    max_new_tokens: for depth span and answer; by default the span and the benchmark's `answer_tokens`.
    depth_codes: see `Predictor`.
    """

    split: str
    limit: int | None = None
    batch_size: int = 8
    perception: str | None = None
    max_new_tokens: int | None = None
    depth_codes: str = "own"


def run_benchmark(
    benchmark: Benchmark, predictor, data, out, settings: Settings, facts: dict, *, progress: bool = False
) -> dict:
    """Returns the content of results.json.

    predictor: a list of tasks, all of one perception → a prediction for each; a `Predictor`.
    facts: what else decides the predictions, as the hash of the model.
    """
    data, out = Path(data), Path(out)
    check_request(benchmark, settings, data)
    out.mkdir(parents=True, exist_ok=True)
    with only_one(out / LOCK, f"another run is writing into {out}: wait for it, or name another folder"):
        facts = {"benchmark": benchmark.name, **asdict(settings), **facts}
        _check_begun(out, facts)
        tally, found = Tally(benchmark.name), _Found(benchmark)
        items = islice(benchmark.items(data, settings.split, tally), settings.limit)
        tasks = _tasks(items, settings)
        _predict(tasks, predictor, out, settings, found, progress)
        if not found.judgements:
            raise DataError(f"{data} gave no item of the split {settings.split!r} ({tally}): name another folder")
        return _finish(out, benchmark, facts, found, tally, data)


def check_request(benchmark: Benchmark, settings: Settings, data) -> None:
    """Raise for what can be seen to be wrong before a model is loaded."""
    if not Path(data).is_dir():
        raise FileNotFoundError(f"`--data` is {data}, expected the folder of the data of {benchmark.name}")
    benchmark.check_split(settings.split)
    for name in ("batch_size", "limit", "max_new_tokens"):
        if (value := getattr(settings, name)) is not None and value < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` is {value}, expected 1 or more")
    for need in benchmark.needs:
        if settings.perception is not None and need not in settings.perception:
            raise ValueError(
                f"`--perception` is {settings.perception}, but {benchmark.name} is about {need}: leave it out, or "
                "name one with it"
            )


# Asking


def _tasks(items: Iterable[Item], settings: Settings) -> Iterator[Task]:
    codes = settings.depth_codes
    for item, other in _with_other(items) if codes == "other" else ((item, None) for item in items):
        mode = item.perception if settings.perception is None or len(item.pictures) != 1 else settings.perception
        if codes != "own" and len(item.pictures) == 1 and "depth" not in mode:
            raise ValueError(
                f"`--depth-codes` is {codes}, but {item.id!r} is asked with perception {mode!r}, which has no depth "
                "span: pass --perception seg+depth"
            )
        yield Task(item, mode, other if "depth" in mode else None)


def _with_other(items: Iterable[Item]) -> Iterator[tuple[Item, bytes | None]]:
    """Each item with a picture that is not its own: the one before, and for the first picture the one after it."""
    waiting: list[Item] = []
    before = None
    for pictures, group in groupby(items, key=lambda item: item.pictures):
        if len(pictures) != 1:
            yield from ((item, None) for item in group)
        elif before is None:
            waiting, before = list(group), pictures[0]
        else:
            yield from ((item, pictures[0]) for item in waiting)
            yield from ((item, before) for item in group)
            waiting, before = [], pictures[0]
    if waiting:
        raise ValueError("all items show one picture, expected another to take codes from: choose other codes")


def _batches(tasks: Iterable[Task], size: int) -> Iterator[list[Task]]:
    """Tasks of one perception together, in the order in which the batches are full."""
    waiting: dict[str, list[Task]] = {}
    ids: set[str] = set()
    for task in tasks:
        if task.item.id in ids:
            raise DataError(
                f"two items are called {task.item.id!r}, expected an id for each: this is a bug of the data"
            )
        ids.add(task.item.id)
        batch = waiting.setdefault(task.perception, [])
        batch.append(task)
        if len(batch) == size:
            yield waiting.pop(task.perception)
    yield from waiting.values()


def _predict(tasks: Iterator[Task], predictor, out: Path, settings: Settings, found: "_Found", progress: bool) -> None:
    """Every prediction, from the file or from the model, in the order of the file."""
    lines = _Lines(out)
    bar = tqdm(total=settings.limit, unit=" items", disable=None if progress else True)
    try:
        for batch in _batches(tasks, settings.batch_size):
            predictions = lines.take([_fingerprint(task) for task in batch], predictor.decode)
            if predictions is None:
                start = time.perf_counter()
                predictions = _ask(predictor, batch)
                lines.append(batch, predictions, (time.perf_counter() - start) / len(batch))
            for task, prediction in zip(batch, predictions, strict=True):
                found.add(task.item, prediction)
            bar.update(len(batch))
        lines.end()
    finally:
        bar.close()


def _ask(predictor, batch: list[Task]) -> list[Prediction]:
    """In halves where the memory does not suffice."""
    import torch

    try:
        return predictor(batch)
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise ValueError(f"the memory does not suffice for {batch[0].item.id!r} alone: {error}") from error
    except (ValueError, FloatingPointError) as error:
        named = ", ".join(repr(task.item.id) for task in batch[:3]) + (" …" if len(batch) > 3 else "")
        raise type(error)(f"{error} (while asking {named})") from error
    torch.cuda.empty_cache()
    middle = len(batch) // 2
    return _ask(predictor, batch[:middle]) + _ask(predictor, batch[middle:])


def _fingerprint(task: Task) -> str:
    """Of the item as it is asked."""
    parts = [task.item.fingerprint(), task.perception]
    if task.other is not None:
        parts.append(hashlib.sha256(task.other).hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


class _Lines:
    """The files of predictions and seconds: what was written of the same batches is taken, the rest written anew."""

    def __init__(self, out: Path):
        self.path, self.clock = out / PREDICTIONS, out / SECONDS
        self.written = list(_whole_lines(self.path))
        self.taken = self.kept = 0  # lines, and their bytes
        self.open = False

    def take(self, fingerprints: list[str], decode) -> list[Prediction] | None:
        """The predictions of a batch, or None when it is to be done."""
        if self.open:
            return None
        part = self.written[self.taken : self.taken + len(fingerprints)]
        known = [content["item"] for content, _ in part]
        if known != fingerprints[: len(known)]:
            raise DataError(
                f"line {self.taken + 1} of {self.path} or one soon after it is about another item than the data has "
                "now: the data was changed, so name another `--out`"
            )
        if len(part) < len(fingerprints):
            self._begin()
            return None
        self.taken += len(part)
        self.kept = part[-1][1]
        found = [Prediction(**{name: v for name, v in content.items() if name != "item"}) for content, _ in part]
        for prediction in found:
            prediction.decode = decode
        return found

    def _begin(self) -> None:
        """Cut what is torn, or of a batch that was not finished."""
        self.open = True
        with open(self.path, "ab") as file:
            file.truncate(self.kept)
        done = {content["id"] for content, _ in self.written[: self.taken]}
        seconds = [content for content, _ in _whole_lines(self.clock) if content.get("id") in done]
        self.clock.unlink(missing_ok=True)
        _append(self.clock, seconds)

    def append(self, batch: list[Task], predictions: list[Prediction], seconds: float) -> None:
        lines = [{"item": _fingerprint(t), **p.to_dict()} for t, p in zip(batch, predictions, strict=True)]
        _append(self.path, lines)
        _append(self.clock, [{"id": task.item.id, "seconds": round(seconds, 4)} for task in batch])

    def end(self) -> None:
        """All items were seen: nothing may be left over."""
        if not self.open and self.taken < len(self.written):
            raise DataError(f"{self.path} has more items than the data: it was changed, so name another `--out`")
        if not self.open:
            self._begin()


def _whole_lines(path: Path) -> Iterator[tuple[dict, int]]:
    """(content, place of its end) of each line up to the first that is torn."""
    if not path.is_file():
        return
    end = 0
    with open(path, "rb") as file:
        for line in file:
            end += len(line)
            try:
                content = json.loads(line)
            except ValueError:
                return
            if not line.endswith(b"\n") or not isinstance(content, dict):
                return
            yield content, end


def _append(path: Path, lines: list[dict]) -> None:
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


# Judging


@dataclass
class _Found:
    """What is kept of the items that were seen."""

    benchmark: Benchmark
    judgements: list[Judgement] = field(default_factory=list)
    best: list[tuple[int, Example]] = field(default_factory=list)  # with their numbers
    worst: list[tuple[int, Example]] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, item: Item, prediction: Prediction) -> None:
        judgement = self.benchmark.judge(item, prediction)
        judgement.group = item.group
        judgement.invalid = prediction.error or judgement.invalid
        number = len(self.judgements)
        self.judgements.append(judgement)
        self.digest.update(item.fingerprint().encode())
        if judgement.quality is not None and prediction.error is None:
            entry = number, Example(item, prediction, judgement)
            self.best = sorted([*self.best, entry], key=lambda e: (-e[1].judgement.quality, e[0]))[:SHOWN]
            self.worst = sorted([*self.worst, entry], key=lambda e: (e[1].judgement.quality, e[0]))[:SHOWN]


def _finish(out: Path, benchmark: Benchmark, facts: dict, found: _Found, tally: Tally, data: Path) -> dict:
    figures = benchmark.figures(found.judgements)
    _write_judgements(out / JUDGEMENTS, found.judgements)
    invalid = Counter(row.invalid.partition(":")[0] for row in found.judgements if row.invalid is not None)
    seconds = [content["seconds"] for content, _ in _whole_lines(out / SECONDS)]
    results = {
        "benchmark": benchmark.name,
        "split": facts["split"],
        "figures": [figure.to_dict() for figure in figures],
        "items": len(found.judgements),
        "invalid": dict(sorted(invalid.items())),
        "settings": facts,
        "data": {
            "folder": data.resolve().name,
            "fingerprint": found.digest.hexdigest()[:16],
            "tally": tally.to_dict(),
        },
        "files": {name: sha256(out / name) for name in (PREDICTIONS, JUDGEMENTS)},
        "versions": versions(),
        "seconds": round(sum(seconds), 2),
    }
    best = dict(found.best)
    worst = [example for number, example in found.worst if number not in best]
    write_page(out / PAGE, benchmark, results, list(best.values()), worst)
    write_json(out / RESULTS, results)
    return results


def _write_judgements(path: Path, judgements: list[Judgement]) -> None:
    half = path.with_name(f".{path.name}.incomplete")
    half.unlink(missing_ok=True)
    _append(half, [{"line": number, **asdict(row)} for number, row in enumerate(judgements, start=1)])
    os.replace(half, path)


def versions() -> dict[str, str]:
    import numpy
    import PIL
    import torch
    import transformers

    from .. import __version__

    packages = {package.__name__: package.__version__ for package in (numpy, PIL, torch, transformers)}
    return {"perceptio": __version__, "python": platform.python_version(), **packages}


def table(results: dict) -> str:
    """The figures as text, one line each."""
    rows = [Figure.HEAD, *(Figure(**figure).cells() for figure in results["figures"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


# The folder


def _check_begun(out: Path, facts: dict) -> None:
    path, begun = out / RUN, (out / PREDICTIONS).is_file() and (out / PREDICTIONS).stat().st_size > 0
    if path.is_file() and begun:
        found = json.loads(path.read_text("utf-8"))
        if changed := [key for key in {**facts, **found} if found.get(key) != facts.get(key)]:
            raise DataError(
                f"{out} was begun with another `{changed[0]}` ({found.get(changed[0])!r}), expected "
                f"{facts.get(changed[0])!r}: name another folder, or remove this one"
            )
    elif not path.is_file() and (own := [n for n in (PREDICTIONS, RESULTS, JUDGEMENTS) if (out / n).exists()]):
        raise DataError(
            f"{out} has a {own[0]} that this command did not write, expected a folder without: name another `--out`"
        )
    (out / RESULTS).unlink(missing_ok=True)
    write_json(path, facts)
