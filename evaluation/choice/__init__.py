"""Multiple-choice and yes-or-no benchmarks."""

BENCHMARKS: dict[str, str] = {}  # name → ".module:Class", relative to this package
