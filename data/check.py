"""What is wrong with a data set, all of it in one pass and with one decoding of each picture."""

import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from .depths import decode_depth
from .load import Found, row_jobs
from .masks import area
from .record import Problem

SHOWN = 20
INVERTED = 0.12  # of the range, between the upper and the lower third of a map, from which a direction is plain


@dataclass
class Report:
    """read = kept + the rows that have problems."""

    read: int = 0
    kept: int = 0
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    slopes: list[float] = field(default_factory=list)  # of each depth map: how much nearer it is below

    def add(self, row: Found) -> None:
        """Count one row."""
        self.read += 1
        self.problems += row.problems
        self.warnings += row.warnings
        record = row.record
        if record is None:
            return
        self.kept += 1
        found = Counter(
            f"answers ({message['perception']})" for message in record["messages"] if message["role"] == "assistant"
        )
        found["pictures"] = int(record["image"] is not None)
        found["masks"] = len(record["masks"])
        found["masks of absent things"] = sum(area(mask) == 0 for mask in record["masks"])
        found["depth maps"] = int(record["depth"] is not None)
        self.counts += found
        if record["depth"] is not None:
            self.slopes.append(_slope(decode_depth(record["depth"]["bytes"])))

    def finish(self) -> "Report":
        """Say what only all rows together can tell."""
        self.warnings += _inverted(self.slopes)
        return self

    @property
    def good(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict:
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": self.read - self.kept,
            "counts": dict(sorted(self.counts.items())),
            "problems": [problem.to_dict() for problem in self.problems],
            "warnings": [problem.to_dict() for problem in self.warnings],
        }

    def lines(self, most: int = SHOWN) -> Iterator[str]:
        """The report for people."""
        for kind, found in (("problem", self.problems), ("warning", self.warnings)):
            for problem in found[:most]:
                yield f"{kind}: {problem}"
            if len(found) > most:
                yield f"… and {len(found) - most} more {kind}s"
        bad = self.read - self.kept
        wrong = f", {bad} with problems ({len(self.problems)} in all)" if bad else ""
        warned = f", {len(self.warnings)} warnings" if self.warnings else ""
        yield f"{self.read} rows: {self.kept} good{wrong}{warned}"
        if self.kept:
            parts = ", ".join(f"{count} {name}" for name, count in self.counts.most_common())
            yield f"in the good rows: {parts}"


def check_data(spec, *, workers: int | None = None, progress: bool = False, **options) -> Report:
    """Read every row of `spec` (as `open_data` takes it) and report.  Threads: decoding leaves Python alone."""
    report = Report()
    jobs = row_jobs(spec, **options)
    found = _in_order(jobs, workers or os.cpu_count() or 1)
    if progress:
        from tqdm import tqdm

        found = tqdm(found, desc="checking", unit=" rows", disable=None)
    for row in found:
        report.add(row)
    if not report.read:
        report.problems.append(
            Problem(str(spec), None, "rows", "none", "at least one", "write some, or choose another split")
        )
    return report.finish()


def _in_order(jobs, workers: int) -> Iterator[Found]:
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(job) for job in islice(jobs, 4 * workers))
        while waiting:
            found = waiting.popleft().result()
            waiting.extend(pool.submit(job) for job in islice(jobs, 1))
            yield found


def _slope(depth: np.ndarray) -> float:
    """How much nearer the lower third is than the upper."""
    third = max(1, len(depth) // 3)
    with np.errstate(invalid="ignore"):
        return float(np.nanmean(depth[-third:]) - np.nanmean(depth[:third])) if np.isfinite(depth).any() else 0.0


def _inverted(slopes: list[float]) -> list[Problem]:
    """Most pictures are nearer below: a scale that is the other way round, for all maps or for many."""
    plain = [slope for slope in slopes if abs(slope) > INVERTED]
    upside = sum(slope < 0 for slope in plain)
    if len(plain) < 8 or upside <= 0.3 * len(plain):
        return []
    expected = "larger is nearer" if upside > 0.8 * len(plain) else "one scale for all"
    found = f"{upside} of {len(plain)} maps are farther below than above"
    return [
        Problem("all rows", None, "depth", found, expected, 'write `depth_kind: "metres"` where larger is farther')
    ]
