"""Those records of a folder of shards whose ids match, as a data set of their own: to be seen more often, or alone.

    python -m perceptio.data.pick build/scenes build/things --without "[-]points$"

The records and their order stay as they are.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from ..cli import refuse
from .card import write_card
from .shards import read_shards, write_shards
from .tally import Tally


def pick(root, *, tally: Tally, ids: str = "", without: str | None = None, split: str = "train") -> Iterator[dict]:
    """The records of a folder of shards whose id has `ids` in it and `without` not: regular expressions."""
    wanted, unwanted = compiled("ids", ids), None if without is None else compiled("without", without)
    for record in read_shards(root, split):
        if wanted.search(record["id"]) and not (unwanted and unwanted.search(record["id"])):
            tally.keep()
            yield record
        else:
            tally.drop("its id does not match", record["id"])


def compiled(name: str, expression: str) -> re.Pattern:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(f"`{name}` is {expression!r}, expected a regular expression: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of shards")
    parser.add_argument("out", type=Path, help="folder to write, as shards")
    parser.add_argument("--ids", default="", metavar="REGEX", help="found in the ids of those to take (default: all)")
    parser.add_argument("--without", metavar="REGEX", help="found in the ids of those to leave out")
    parser.add_argument("--split", default="train", help="default: %(default)s")
    options = parser.parse_args(arguments)
    tally = Tally("pick")
    found = pick(options.folder, tally=tally, ids=options.ids, without=options.without, split=options.split)
    return write_data_set(found, options.out, options.split, tally)


def write_data_set(records: Iterable[dict], out: Path, split: str, tally: Tally) -> int:
    """Write what a reader gives as shards with a card, and say what it kept and dropped; the exit code."""
    try:
        write_shards(tqdm(records, unit=" records", disable=None), out, split=split, tally=tally)
        write_card(out)
    except (ValueError, OSError) as error:
        return refuse(error)
    print(f"wrote {tally.kept} records to {out}\n{tally}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
