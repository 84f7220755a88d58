"""Pickled data that is only data: lists, dictionaries, texts and numbers.

refer distributes its expressions as a pickle.  A pickle is a program: it can import and call anything.  Here a file
with any other instruction than those that build plain data is refused before the first one is carried out.
"""

import io
import pickle
import pickletools
from pathlib import Path

from ..record import DataError, Problem

LARGEST_FILE = 256 << 20  # the published ones have at most 20 MB
PLAIN = frozenset(
    (
        "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 "
        "FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES "
        "SHORT_BINBYTES BINBYTES8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT "
        "DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET MEMOIZE"
    ).split()
)
PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


class UnsafePickleError(DataError):
    """A pickle that asks for more than plain data."""


class PlainUnpickler(pickle.Unpickler):
    """Builds plain data; whatever names a class or a function is refused."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, key):
        raise pickle.UnpicklingError("it refers to an object outside of the file")


def read_plain_pickle(path: str | Path, largest: int = LARGEST_FILE):
    """What the pickle at `path` holds.  Text of Python 2 is read as UTF-8."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            data = file.read(largest + 1)
    except OSError as error:
        raise _error(path, f"cannot be opened ({error.strerror})", "a pickle", "fetch it, or name another") from error
    if len(data) > largest:
        raise _error(path, f"more than {largest} bytes", f"at most {largest}", "raise `largest`")
    _demand_plain(data, path)
    try:
        return PlainUnpickler(io.BytesIO(data), encoding="utf-8", errors="replace").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise _error(path, f"damaged ({error!r:.120})", "a whole pickle", "fetch it again") from error


def _demand_plain(data: bytes, path: Path) -> None:
    try:
        for steps, (opcode, argument, place) in enumerate(pickletools.genops(data)):
            if opcode.name not in PLAIN:
                expected = "lists, dictionaries, texts and numbers alone"
                remedy = "do not open it otherwise: it can run any program. Fetch the published file"
                found = f"an instruction {opcode.name} {argument if argument is not None else ''!s:.80}".rstrip()
                raise UnsafePickleError(Problem(str(path), place, "pickle", found, expected, remedy))
            if opcode.name in PUTS and argument > steps + 1:  # the table of objects grows to this number
                found = f"object number {argument} at step {steps}"
                raise _error(path, found, "objects numbered one by one", "fetch the published file")
    except DataError:
        raise
    except Exception as error:
        raise _error(path, f"no pickle ({error!s:.120})", "a pickle", "fetch it again") from error


def _error(path: Path, found: str, expected: str, remedy: str) -> DataError:
    return DataError(Problem(str(path), None, "pickle", found, expected, remedy))
