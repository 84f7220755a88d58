"""A long JSON file row by row: the published annotation files have up to a gigabyte, and parsed ten times that."""

import json
from collections.abc import Iterator
from pathlib import Path

from ..record import DataError, Problem

CHUNK = 1 << 20  # characters read at a time
AFTER_NUMBER = tuple(" \t\r\n,]}")
LONGEST_ROW = 1 << 26  # characters; a broken file is not read to its end in search of a bracket


def read_rows(path: str | Path) -> Iterator:
    """The elements of the array that the file is, or, of a `.jsonl` file, its lines."""
    with _Text(path) as text:
        if Path(path).suffix == ".jsonl":
            while text.peek():
                yield text.value()
        else:
            yield from _array(text)


def read_section(path: str | Path, key: str) -> Iterator:
    """The elements of the array under `key` of the object that the file is; the rest is passed over.

    A file without the key is an error.
    """
    with _Text(path) as text:
        text.expect("{", "an object with arrays in it")
        while text.peek() != "}":
            name = text.value()
            text.expect(":", "a colon after the key")
            if name == key:
                yield from _array(text)
                return
            if text.peek() == "[":
                for _ in _array(text):
                    pass
            else:
                text.value()
            if text.peek() != "}":
                text.expect(",", "a comma or the end of the object")
    raise text.error(f"no key {key!r}", f"an object with the array {key!r}", "pass the published file")


def _array(text: "_Text") -> Iterator:
    text.expect("[", "an array")
    while text.peek() != "]":
        yield text.value()
        text.rows += 1
        if text.peek() != "]":
            text.expect(",", "a comma or the end of the array")
    text.expect("]", "the end of the array")


class _Text:
    """The text of a file, of which one value at a time is held."""

    def __init__(self, path: str | Path):
        self.path, self.rows = Path(path), 0
        self.buffer, self.place, self.ended = "", 0, False
        self.decoder = json.JSONDecoder()

    def __enter__(self) -> "_Text":
        try:
            self.file = open(self.path, encoding="utf-8-sig")
        except OSError as error:
            raise DataError(
                Problem(
                    str(self.path), None, "file", f"cannot be opened ({error.strerror})", "the annotations", "fetch it"
                )
            ) from error
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def error(self, found: str, expected: str, remedy: str) -> DataError:
        return DataError(Problem(str(self.path), self.rows, "json", found, expected, remedy))

    def peek(self) -> str:
        """The next character that is no white space; "" at the end of the file."""
        while True:
            while self.place < len(self.buffer) and self.buffer[self.place] in " \t\r\n":
                self.place += 1
            if self.place < len(self.buffer):
                return self.buffer[self.place]
            if not self._more():
                return ""

    def expect(self, character: str, meaning: str) -> None:
        found = self.peek()
        if found != character:
            raise self.error(f"{found!r}" if found else "the end of the file", meaning, "fetch the file again")
        self.place += 1

    def value(self):
        self.peek()
        wanted = CHUNK
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.place)
            except json.JSONDecodeError as error:
                if not self.ended and len(self.buffer) - self.place < LONGEST_ROW:
                    self._more(wanted)
                    wanted *= 2  # so that a long value is not parsed from its start many times
                    continue
                raise self.error(
                    f"no JSON ({error.msg})", "one value after the other", "fetch the file again"
                ) from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
                raise self.error(f"a value that cannot be read ({error})", "rows", "fetch the file again") from None
            if isinstance(value, (int, float)) and not self.ended and self.buffer[end : end + 1] not in AFTER_NUMBER:
                self._more()  # a number may go on in the next piece
                continue
            self.place = end
            return value

    def _more(self, count: int | None = None) -> bool:
        try:
            piece = self.file.read(count or CHUNK)
        except UnicodeDecodeError as error:
            raise self.error(f"bytes that are no UTF-8 ({error.reason})", "UTF-8", "fetch the file again") from None
        self.ended = not piece
        self.buffer = self.buffer[self.place :] + piece
        self.place = 0
        return bool(piece)
