"""RefCOCO, RefCOCO+ and RefCOCOg in the layout that refer distributes.

    root/refcoco/instances.json          COCO's images, annotations, categories
    root/refcoco/refs(unc).p             the expressions, a pickle of plain data
    root/images/mscoco/images/train2014/COCO_train2014_000000000009.jpg

also refcoco+ (unc) and refcocog (umd, google). `images_dir` names another folder of pictures.
"""

from collections.abc import Iterator
from pathlib import Path

from ..joint import build_joint
from ..tally import Tally
from .common import Unusable
from .referring import Facts, Ref, ReferringItem, as_ref, demand_files, find_images, items_of_refs, read_refs
from .restricted_pickle import read_plain_pickle

SPLITS_BY = {"refcoco": ("unc", "google"), "refcoco+": ("unc",), "refcocog": ("umd", "google")}
IMAGES = ("images/mscoco/images/train2014", "images/train2014", "train2014")


def read_refer(
    root: str | Path,
    *,
    tally: Tally,
    dataset: str = "refcoco",
    split_by: str | None = None,
    split: str = "train",
    images_dir: str | None = None,
    expressions: int = 5,
    more: str = "choose",
    seed: int = 0,
    licence: str = "unknown",
) -> Iterator[dict]:
    """Records: one per picture, up to `expressions` of its expressions as turns, each answered with its mask.

    For more, seed see `data.joint.build_joint`.
    """
    items = refer_items(
        root, tally=tally, dataset=dataset, split_by=split_by, split=split, images_dir=images_dir, licence=licence
    )
    yield from build_joint(items, tally=tally, expressions=expressions, more=more, seed=seed)


def refer_items(
    root: str | Path,
    *,
    tally: Tally,
    dataset: str = "refcoco",
    split_by: str | None = None,
    split: str = "train",
    images_dir: str | Path | None = None,
    licence: str = "unknown",
) -> Iterator[ReferringItem]:
    """One item per picture of a split.  split_by: by default unc, of refcocog umd."""
    root, split_by = Path(root), split_by or default_split_by(dataset)
    refs_file, instances = annotation_files(root, dataset, split_by)
    images = find_images(root, images_dir, IMAGES)
    refs = read_refs(read_plain_pickle(refs_file), split, _convert, tally, refs_file)
    yield from items_of_refs(refs, instances, images, tally, Facts(f"{dataset}/{split_by}", licence, split))


def default_split_by(dataset: str) -> str:
    if dataset not in SPLITS_BY:
        raise ValueError(f"`dataset` is {dataset!r}, expected one of {', '.join(SPLITS_BY)}")
    return SPLITS_BY[dataset][0]


def annotation_files(
    root: str | Path, dataset: str = "refcoco", split_by: str | None = None, **_
) -> tuple[Path, Path]:
    """(the file of expressions, COCO's file): what the records are made from, besides the pictures."""
    split_by = split_by or default_split_by(dataset)
    if split_by not in SPLITS_BY[dataset]:
        raise ValueError(f"`split_by` of {dataset} is {split_by!r}, expected one of {', '.join(SPLITS_BY[dataset])}")
    folder = Path(root) / dataset
    return demand_files(folder / f"refs({split_by}).p", folder / "instances.json")


def _convert(entry: dict) -> Ref:
    annotation = entry.get("ann_id")
    if isinstance(annotation, list):
        raise Unusable("id that is no number", "ann_id is a list: this is gRefCOCO, use its reader")
    return as_ref(entry, entry["sentences"], [annotation])
