"""One process at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .record import DataError


@contextmanager
def only_one(lock: Path, busy: str) -> Iterator[None]:
    """Two processes that write to one place would tear each other's files.  A killed one gives the lock up.

    busy: what is said where another process holds it.
    """
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(busy) from error
        yield
