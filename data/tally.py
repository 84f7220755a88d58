"""Nothing is dropped silently: what was read is what was kept plus what was dropped, by reason."""

from collections import Counter


class Tally:
    """Counts of one job.  Every item that is read ends in `keep` or in `drop`; `check` holds one to that."""

    def __init__(self, name: str = "", examples: int = 5):
        self.name, self.longest = name, examples
        self.read = self.kept = 0
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def keep(self, count: int = 1) -> None:
        self.read += count
        self.kept += count

    def drop(self, reason: str, where: str = "", count: int = 1) -> None:
        self.read += count
        self.dropped[reason] += count
        seen = self.examples.setdefault(reason, [])
        if where and len(seen) < self.longest:
            seen.append(where)

    def add(self, other: "Tally | dict") -> "Tally":
        """Add the counts of another tally, or of its dictionary."""
        other = other.to_dict() if isinstance(other, Tally) else other
        self.read += other["read"]
        self.kept += other["kept"]
        self.dropped.update(other["dropped"])
        for reason, places in other.get("examples", {}).items():
            seen = self.examples.setdefault(reason, [])
            seen += places[: self.longest - len(seen)]
        return self

    def check(self, read: int | None = None) -> None:
        """Raise unless kept + dropped is what was read, by this tally and (`read`) by the one who counted."""
        total = self.kept + sum(self.dropped.values())
        if total != self.read or (read is not None and read != self.read):
            raise RuntimeError(
                f"{self.name or 'the job'}: {self.kept} kept and {sum(self.dropped.values())} dropped of "
                f"{self.read if read is None else read} read: some rows vanished without a reason"
            )

    def to_dict(self) -> dict:
        return {
            "name": self.name,
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
            "examples": {reason: self.examples[reason] for reason in sorted(self.examples)},
        }

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        return f"{self.name}: {self.kept} of {self.read} kept" + (f"; dropped: {reasons}" if reasons else "")
