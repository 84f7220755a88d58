"""What the sources share: files below a root, long JSON files piece by piece, and rows that are dropped by reason."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..masks import MaskError, rle_from_coco, transpose
from ..paths import OutsideError, PathError, read_file
from ..record import stored_size
from ..tally import Tally
from ..validate import check_record


class Unusable(Exception):
    """A row that is not used.  `reason` is one of few, for counting; `detail` says more about this one."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def convert_rows(
    rows: Iterable, convert: Callable[[object, int], dict], tally: Tally, where: str = "row"
) -> Iterator[dict]:
    """`convert(row, number)` of each row that gives a record without a problem; the tally counts all of them."""
    for number, row in enumerate(rows):
        try:
            record = convert(row, number)
            _demand_good(record)
        except Unusable as unusable:
            detail = f": {unusable.detail:.200}" if unusable.detail else ""
            tally.drop(unusable.reason, f"{where} {number}{detail}")
            continue
        tally.keep()
        yield record


def _demand_good(record: dict) -> None:
    try:  # a file name or an id may hold bytes that no table can store
        "".join([record["id"], record["extra"], (record["image"] or {}).get("path") or ""]).encode()
    except UnicodeEncodeError as error:
        raise Unusable("name or id that is no Unicode", ascii(record["id"])) from error
    problems = check_record(record)
    if problems:
        field = problems[0].field.partition("[")[0]
        raise Unusable("picture damaged" if field == "image" else f"{field} not usable", str(problems[0]))


def as_dict(row) -> dict:
    if not isinstance(row, dict):
        raise Unusable("not an object", f"{row!r:.80}")
    return row


def read_picture(root: Path, name) -> dict:
    """The published bytes of the picture `name` below `root`."""
    if not isinstance(name, str) or not name:
        raise Unusable("no name of a picture", f"{name!r:.80}")
    try:
        return {"bytes": read_file(Path(root), name), "path": Path(name).name}
    except OutsideError as error:
        raise Unusable("path outside the folder", str(error)) from error
    except PathError as error:
        raise Unusable("picture missing", str(error)) from error


def stored_frame(image: dict) -> tuple[tuple[int, int], int]:
    """((height, width) of the stored pixels, EXIF orientation) of a picture."""
    try:
        width, height, orientation = stored_size(image["bytes"])
    except Exception as error:  # a damaged header raises nearly anything
        raise Unusable("picture damaged", f"{image['path']}: {error}") from error
    return (height, width), orientation


def published_mask(segmentation, image: dict, size: tuple[int, int] | None = None) -> dict:
    """COCO's `segmentation`, drawn on the stored pixels of a picture → run lengths of the picture as it is shown.

    size: the (height, width) that the annotations state, when they do.
    """
    frame, orientation = stored_frame(image)
    if size is not None and tuple(size) != frame:
        raise Unusable("picture of another size", f"{image['path']} is {frame}, the annotations say {tuple(size)}")
    try:
        return transpose(rle_from_coco(segmentation, frame), orientation)
    except (MaskError, TypeError) as error:
        raise Unusable("mask not usable", str(error)) from error


def choose(options: tuple[str, ...], key: str) -> str:
    """One of the options, the same for the same key on every machine."""
    return options[zlib.crc32(key.encode("utf-8", "replace")) % len(options)]
