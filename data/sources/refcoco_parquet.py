"""RefCOCO and its kin as Parquet on the Hub, read from local files.  The columns say which form it is:

    answers     image, answer (sentences), segmentation (one flat polygon), bbox, file_name     lmms-lab/RefCOCO
    raw         sentences, raw_anns and raw_image_info (JSON text), image_id; no pictures       jxu124/refcoco
    samples     image, image_id, samples (sentences, mask)                                      moondream/refcoco-m

also RefCOCOplus and RefCOCOg of the first two.  The first form has room for one polygon: a thing that has more, so
that it does not reach to all sides of the box, is dropped.  The second needs COCO's train2014 (`images_dir`).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq

from ..joint import build_joint
from ..record import DataError, Problem
from ..tally import Tally
from .common import Unusable, published_mask, read_picture
from .refer import IMAGES
from .referring import Facts, ReferringItem, Thing, demand_area, demand_whole, find_images, in_split, item_of, thing_of

FORMS = {
    "answers": ("image", "answer", "segmentation", "bbox", "file_name"),
    "raw": ("sentences", "raw_anns", "raw_image_info", "image_id"),
    "samples": ("image", "image_id", "samples"),
}
SPLIT_NAMES = {"val": ("val", "validation"), "validation": ("val", "validation")}
COCO_NAME = re.compile(r"_(\d{12})(?:\D|$)")  # COCO_train2014_000000581857_16.jpg: the rest counts the things in it
BOX_SLACK = 2.0  # pixels


@dataclass(frozen=True)
class Entry:
    """One row, or one sample of a row: what it says besides the picture."""

    key: str
    picture: str
    sentences: list
    segmentation: object
    size: tuple | None = None
    box: list | None = None
    category: str | None = None
    file_name: str | None = None


def read_refcoco_parquet(
    root: str | Path,
    *,
    tally: Tally,
    split: str = "train",
    files: str = "**/*.parquet",
    images_dir: str | None = None,
    expressions: int = 5,
    more: str = "choose",
    seed: int = 0,
    source: str = "refcoco-parquet",
    licence: str = "unknown",
) -> Iterator[dict]:
    """Records, as `read_refer` gives them."""
    facts = {"source": source, "licence": licence}
    items = refcoco_parquet_items(root, tally=tally, split=split, files=files, images_dir=images_dir, **facts)
    yield from build_joint(items, tally=tally, expressions=expressions, more=more, seed=seed)


def refcoco_parquet_items(
    root: str | Path,
    *,
    tally: Tally,
    split: str = "train",
    files: str = "**/*.parquet",
    images_dir: str | Path | None = None,
    source: str = "refcoco-parquet",
    licence: str = "unknown",
) -> Iterator[ReferringItem]:
    """One item per picture, in the order in which the pictures first occur."""
    paths = annotation_files(root, split=split, files=files)
    form = _form_of(paths)
    facts = Facts(source, licence, split)
    by_picture: dict[str, list[Entry]] = {}
    seen: set[str] = set()
    for row, entry in _entries(paths, form, split, tally):
        if entry.key in seen:
            tally.drop("ref id twice", f"row {row}: {entry.key}", max(1, len(entry.sentences)))
            continue
        seen.add(entry.key)
        by_picture.setdefault(entry.picture, []).append(entry)
    if form == "raw":
        images = find_images(Path(root), images_dir, ("coco/train2014", *IMAGES))
        pictures = ((key, None) for key in list(by_picture))
    else:
        images, pictures = None, _pictures(paths, form)
    for key, image in pictures:
        entries = by_picture.pop(key, None)
        if entries is not None:
            yield from _items(key, image, images, entries, tally, facts)
    for key, entries in by_picture.items():  # nothing vanishes
        tally.drop("picture missing", key, sum(len(entry.sentences) for entry in entries))


def annotation_files(root: str | Path, split: str = "train", files: str = "**/*.parquet", **_) -> list[Path]:
    """The files of a split: those named after it, or, where none is named after any, all (a column says it then)."""
    paths = sorted(Path(root).glob(files))
    if not paths:
        raise DataError(
            Problem(str(root), None, "files", "no file", f"files {files!r}", "name the folder, or `files`")
        )
    names = SPLIT_NAMES.get(split, (split,))
    named = [path for path in paths if re.split(r"[-.]", path.name)[0] in names]
    if named or _has_split_column(paths[0]):
        return paths if _has_split_column(paths[0]) else named
    found = sorted({re.split(r"[-.]", path.name)[0] for path in paths})
    raise DataError(
        Problem(
            str(root), None, "split", f"files of {', '.join(found)}", f"files {split}-*.parquet", "name one of these"
        )
    )


def _columns(path: Path) -> list[str]:
    try:
        return pq.read_schema(path).names
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise _unreadable(path, error) from error


def _has_split_column(path: Path) -> bool:
    return "split" in _columns(path)


def _unreadable(path: Path, error) -> DataError:
    return DataError(Problem(str(path), None, "file", f"not readable ({error!s:.160})", "Parquet", "fetch it again"))


def _form_of(paths: list[Path]) -> str:
    """The form that all of the files have."""
    forms = set()
    for path in paths:
        columns = _columns(path)
        form = next((name for name, needed in FORMS.items() if set(needed) <= set(columns)), None)
        if form is None:
            known = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in FORMS.items())
            raise DataError(
                Problem(str(path), None, "columns", ", ".join(columns), f"those of one form ({known})", "rename them")
            )
        forms.add(form)
    if len(forms) > 1:
        raise DataError(
            Problem(str(paths[0].parent), None, "files", f"forms {', '.join(sorted(forms))}", "one", "pass `files`")
        )
    return forms.pop()


def _rows(paths: list[Path], leave_out: tuple[str, ...] = (), only: tuple[str, ...] = ()) -> Iterator[dict]:
    for path in paths:
        try:
            with pq.ParquetFile(path) as table:
                names = [name for name in table.schema_arrow.names if name not in leave_out]
                names = [name for name in names if not only or name in only]
                for batch in table.iter_batches(batch_size=64, columns=names, use_threads=False):
                    yield from batch.to_pylist()
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise _unreadable(path, error) from error


def _entries(paths: list[Path], form: str, split: str, tally: Tally) -> Iterator[tuple[int, Entry]]:
    parse = {"answers": _parse_answers, "raw": _parse_raw, "samples": _parse_samples}[form]
    for row, content in enumerate(_rows(paths, leave_out=("image",))):
        if "split" in content and not any(in_split(content["split"], n) for n in SPLIT_NAMES.get(split, (split,))):
            continue
        try:
            for entry in parse(content, row):
                if entry.sentences:
                    yield row, entry
                else:
                    tally.drop("no sentence", f"row {row}: {entry.key}")
        except Unusable as unusable:
            tally.drop(unusable.reason, f"row {row}: {unusable.detail:.200}", _count(content))


def _count(content: dict) -> int:
    found = content.get("answer") or content.get("sentences")
    return max(1, len(found)) if isinstance(found, list) else 1


def _texts(sentences) -> list:
    sentences = [sentences] if isinstance(sentences, str) else sentences or []
    return [s.get("sent", s.get("raw")) if isinstance(s, dict) else s for s in sentences]


def _picture_key(row: dict) -> str:
    if isinstance(row.get("image_id"), int):
        return str(row["image_id"])
    name = row.get("file_name")
    found = COCO_NAME.search(name) if isinstance(name, str) else None
    if not name or not isinstance(name, str):
        raise Unusable("no name of a picture", f"{name!r:.60}")
    return str(int(found[1])) if found else name


def _parse_answers(row: dict, index: int) -> Iterator[Entry]:
    key, polygon = str(index), row["segmentation"]
    if not polygon or not isinstance(polygon, list):
        raise Unusable("crowd without a mask" if row.get("iscrowd") else "no mask", key)
    yield Entry(
        key, _picture_key(row), _texts(row["answer"]), [polygon], box=row["bbox"] or [], file_name=row["file_name"]
    )


def _parse_raw(row: dict, index: int) -> Iterator[Entry]:
    try:
        annotation, info = json.loads(row["raw_anns"]), json.loads(row["raw_image_info"])
        size, name, mask = (info["height"], info["width"]), info["file_name"], annotation["segmentation"]
        owner = annotation.get("image_id", row["image_id"])
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise Unusable("raw columns not readable", repr(error)) from error
    if owner != row["image_id"]:
        raise Unusable("annotation of another picture", f"{annotation.get('id')!r:.40} belongs to {owner!r:.40}")
    yield Entry(str(row.get("ref_id", index)), _picture_key(row), _texts(row["sentences"]), mask, size, file_name=name)


def _parse_samples(row: dict, index: int) -> Iterator[Entry]:
    picture = _picture_key(row)
    for number, sample in enumerate(row["samples"] or []):
        sample = sample if isinstance(sample, dict) else {}
        key, mask = f"{picture}/{sample.get('id', number)}", sample.get("mask")
        size = tuple(mask.get("size") or ()) if isinstance(mask, dict) else None
        yield Entry(key, picture, _texts(sample.get("sentences")), mask, size, category=sample.get("category"))


def _pictures(paths: list[Path], form: str) -> Iterator[tuple[str, dict]]:
    for row in _rows(paths, only=("image", "image_id", "file_name")):
        image = row["image"]
        image = image if isinstance(image, dict) else {"bytes": image}
        try:
            key = _picture_key(row)
        except Unusable:
            continue  # counted with its expressions
        yield key, {"bytes": image.get("bytes"), "path": image.get("path")}


def _united(entries: list[Entry]) -> list[Entry]:
    """Entries with one mask as one: of the published sets some join two splits, and have what is in both twice."""
    united: dict[str, Entry] = {}
    for entry in entries:
        mask = json.dumps([entry.segmentation, entry.box])
        first = united.get(mask, replace(entry, sentences=[]))
        united[mask] = replace(first, sentences=first.sentences + entry.sentences)
    return list(united.values())


def _items(key: str, image: dict | None, images: Path | None, entries: list[Entry], tally: Tally, facts: Facts):
    count = sum(len(entry.sentences) for entry in entries)
    try:
        if image is None:
            image = read_picture(images, entries[0].file_name)
        if not isinstance(image["bytes"], bytes):
            raise Unusable("picture missing", "no bytes in the column `image`")
        demand_whole(image)
    except Unusable as unusable:
        tally.drop(unusable.reason, f"picture {key}: {unusable.detail:.200}", count)
        return
    things: list[Thing] = []
    for entry in _united(entries):
        try:
            if entry.box is not None:
                _demand_filled(entry.segmentation[0], entry.box)
            mask = demand_area(published_mask(entry.segmentation, image, entry.size or None))
        except Unusable as unusable:
            tally.drop(unusable.reason, f"ref {entry.key}: {unusable.detail:.200}", len(entry.sentences))
            continue
        things += thing_of(entry.key, entry.sentences, mask, entry.category, tally)
    if things:
        yield item_of(facts, int(key) if key.isdecimal() else key, image, things)


def _demand_filled(polygon: list, box: list) -> None:
    """Whether the polygon reaches to all sides of the box (x, y, width, height) of the whole thing."""
    if not box or len(box) != 4 or len(polygon) < 6:
        raise Unusable("no box" if not box or len(box) != 4 else "mask not usable", f"{box!r:.80}")
    x, y, width, height = box
    found = (min(polygon[::2]), min(polygon[1::2]), max(polygon[::2]), max(polygon[1::2]))
    if any(abs(a - b) > BOX_SLACK for a, b in zip(found, (x, y, x + width, y + height), strict=True)):
        raise Unusable(
            "mask in part only", f"the polygon fills {found}, its box is {tuple(box)} (x, y, width, height)"
        )
