"""Packages that not every use takes, and which extra brings them."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str, need: str) -> Iterator[None]:
    """Imports within it that fail say what to install.  need: as in "masks need"; an outer one speaks for all."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f'{error.__cause__ or error}: {need} the extra "{name}": pip install "perceptio[{name}]"'
        ) from error
