"""gRefCOCO: expressions that mean several things, or nothing in the picture.

    root/grefcoco/grefs(unc).json, root/grefcoco/instances.json
    root/images/train2014/COCO_train2014_000000000009.jpg

Several targets are united to one mask, without regions of many things (iscrowd), as its own reader does. Without a
target the mask is empty and the answer says so; the answer opens with [SEG] all the same, from which the model learns
its object score.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from ..joint import build_joint
from ..record import DataError, Problem
from ..tally import Tally
from .common import Unusable
from .refer import IMAGES
from .referring import Facts, Ref, ReferringItem, as_ref, demand_files, find_images, items_of_refs, read_refs

NO_TARGET = [-1]
ONLY = ("all", "targets", "no-target")
LARGEST_FILE = 1 << 30


def read_grefcoco(
    root: str | Path,
    *,
    tally: Tally,
    split: str = "train",
    only: str = "all",
    images_dir: str | None = None,
    expressions: int = 5,
    more: str = "choose",
    seed: int = 0,
    licence: str = "unknown",
) -> Iterator[dict]:
    """Records, as `read_refer` gives them.  only: "targets" or "no-target" reads one kind of expression."""
    items = grefcoco_items(root, tally=tally, split=split, only=only, images_dir=images_dir, licence=licence)
    yield from build_joint(items, tally=tally, expressions=expressions, more=more, seed=seed)


def grefcoco_items(
    root: str | Path,
    *,
    tally: Tally,
    split: str = "train",
    only: str = "all",
    images_dir: str | Path | None = None,
    licence: str = "unknown",
) -> Iterator[ReferringItem]:
    """One item per picture of a split."""
    if only not in ONLY:
        raise ValueError(f"`only` is {only!r}, expected one of {', '.join(ONLY)}")
    refs_file, instances = annotation_files(root)
    images = find_images(Path(root), images_dir, IMAGES[1:] + IMAGES[:1])

    def convert(entry: dict) -> Ref | None:
        ref = _convert(entry)
        return None if only != "all" and ref.absent != (only == "no-target") else ref

    refs = read_refs(_read_json(refs_file), split, convert, tally, refs_file)
    source = "grefcoco/unc" if only == "all" else f"grefcoco/unc/{only}"
    yield from items_of_refs(refs, instances, images, tally, Facts(source, licence, split), crowds=False)


def annotation_files(root: str | Path, **_) -> tuple[Path, Path]:
    folder = Path(root) / "grefcoco"
    return demand_files(folder / "grefs(unc).json", folder / "instances.json")


def _convert(entry: dict) -> Ref:
    annotations = entry.get("ann_id")
    annotations = annotations if isinstance(annotations, list) else [annotations]
    absent = annotations == NO_TARGET
    if absent != bool(entry.get("no_target", absent)) or (-1 in annotations and not absent) or not annotations:
        raise Unusable("target and no target", f"ann_id {annotations!r:.60}, no_target {entry.get('no_target')!r:.20}")
    return as_ref(entry, entry["sentences"], [] if absent else annotations, absent)


def _read_json(path: Path):
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"more than {LARGEST_FILE} bytes")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            Problem(str(path), None, "file", f"not readable ({error!s:.160})", "gRefCOCO's JSON", "fetch it again")
        ) from error
