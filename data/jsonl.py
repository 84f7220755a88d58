"""JSON lines, with every fault named by its row and reading going on."""

import json
from collections.abc import Iterator
from pathlib import Path

from .record import Problem

LONGEST_LINE = 16 << 20


class _Fault(ValueError):
    pass


def read_jsonl(path: Path) -> Iterator[tuple[int, dict | Problem]]:
    """(row, object) of each line that is not blank, or (row, problem).  Rows count from 1, as editors do."""
    found_any = False
    with open(path, "rb") as file:
        row = 0
        while line := file.readline(LONGEST_LINE + 1):
            row += 1
            if len(line) > LONGEST_LINE and not line.endswith(b"\n"):
                while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                found_any = True
                yield (
                    row,
                    _problem(path, row, f"a line of more than {LONGEST_LINE} bytes", "one record a line", "split it"),
                )
                continue
            if row == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                found_any = True
                yield row, _parse(line, path, row)
    if not found_any:
        yield 1, _problem(path, None, "an empty file", "one JSON object a line", "write the records into it")


def _problem(path: Path, row: int | None, found: str, expected: str, remedy: str) -> Problem:
    return Problem(path.name, row, "line", found, expected, remedy)


def _parse(line: bytes, path: Path, row: int) -> dict | Problem:
    try:
        content = json.loads(line.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return _problem(path, row, f"bytes that are no UTF-8 at {error.start}", "UTF-8", "save the file as UTF-8")
    except _Fault as fault:
        return _problem(path, row, str(fault), "plain JSON", "write a number, or null")
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else ", and the file ends in it"
        text = line.decode("utf-8", "replace").strip()
        return _problem(
            path, row, f"no JSON ({error}){cut}: {text:.60}", "one JSON object a line", "write it again, on one line"
        )
    if not isinstance(content, dict):
        return _problem(
            path, row, f"{type(content).__name__} {content!r:.60}", "a JSON object", 'write {"image": …, …}'
        )
    return content


def _refuse(name: str):
    raise _Fault(f"the number {name}")


def _unique(pairs: list[tuple]) -> dict:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Fault(f"the key {next(name for name in names if names.count(name) > 1)!r:.60} twice")
    return content
