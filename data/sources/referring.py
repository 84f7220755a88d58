"""What the readers of referring expressions share: one item per picture, with the things that are referred to.

Counting: one unit is one expression (a sentence about a thing).  A reader counts the expressions that it drops;
whoever takes an item counts those in it, as kept or as dropped (`data.joint.build_joint` does).  An entry without any
sentence counts as one.

Masks are drawn on the stored pixels of a picture, as COCO's tools read them.  Where the file says that the picture is
to be turned (EXIF), the mask is turned with it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...processing_perceptio import PictureError, load_picture
from ..masks import area, encode_mask, merge
from ..record import DataError, Problem, upright_size
from ..tally import Tally
from ..templates import clean_phrase, has_control_token
from .common import Unusable, published_mask, read_picture
from .json_stream import read_section


@dataclass(frozen=True)
class Thing:
    """What some phrases mean: a mask of the picture as it is shown, empty when it is not there."""

    key: str
    phrases: tuple[str, ...]
    mask: dict
    category: str | None = None

    @property
    def absent(self) -> bool:
        return area(self.mask) == 0


@dataclass(frozen=True)
class ReferringItem:
    """One picture of one data set; `image` holds the bytes as published."""

    id: str
    image: dict
    things: tuple[Thing, ...]
    source: str
    licence: str
    split: str
    extra: dict = field(default_factory=dict)

    def expressions(self) -> int:
        return sum(len(thing.phrases) for thing in self.things)


@dataclass(frozen=True)
class Ref:
    """One entry of a file of expressions.  annotations: ids of what it means, none when it is not in the picture."""

    key: int | str
    image_id: int
    annotations: tuple[int, ...]
    sentences: tuple[str, ...]
    absent: bool = False


@dataclass(frozen=True)
class Facts:
    source: str
    licence: str
    split: str


def as_ref(entry: dict, sentences, annotations, absent: bool = False) -> Ref:
    """A published entry; raises `Unusable` when its ids are none.  sentences: texts, or dictionaries with `sent`."""
    ids = [entry.get("ref_id"), entry.get("image_id"), *annotations]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in ids):
        raise Unusable("id that is no number", f"{ids!r:.80}")
    texts = [s.get("sent", s.get("raw")) if isinstance(s, dict) else s for s in sentences]
    return Ref(ids[0], ids[1], tuple(ids[2:]), tuple(texts), absent)


def read_refs(entries, split: str, convert, tally: Tally, file: Path) -> list[Ref]:
    """The entries of one split; `convert` makes a `Ref` of each.  Entries of other splits are not read."""
    if not isinstance(entries, list) or not entries:
        found = f"{type(entries).__name__} of {len(entries) if isinstance(entries, (list, dict)) else 0}"
        raise DataError(Problem(str(file), None, "refs", found, "a list of expressions", "fetch the published file"))
    refs, seen, splits = [], set(), set()
    for row, entry in enumerate(entries):
        if not isinstance(entry, dict):
            tally.drop("not an object", f"entry {row}")
            continue
        splits.add(str(entry.get("split")))
        if not in_split(entry.get("split"), split):
            continue
        sentences = entry.get("sentences")
        count = max(1, len(sentences)) if isinstance(sentences, list) else 1
        try:
            if not isinstance(sentences, list) or not sentences:
                raise Unusable("no sentence")
            ref = convert(entry)
            if ref is None:
                continue
            if ref.key in seen:
                raise Unusable("ref id twice")
            seen.add(ref.key)
            refs.append(ref)
        except Unusable as unusable:
            tally.drop(unusable.reason, f"entry {row}: ref {entry.get('ref_id')!r:.40} {unusable.detail}", count)
    if not any(in_split(found, split) for found in splits):
        raise DataError(
            Problem(str(file), None, "split", f"no entry of {split!r}", ", ".join(sorted(splits)), "name one of these")
        )
    return refs


def in_split(found, split: str) -> bool:
    """As refer has it: "testAB" belongs to testA and to testB, and "test" takes every test split."""
    if not isinstance(found, str):
        return False
    if split in ("testA", "testB", "testC"):
        return found.startswith("test") and split[-1] in found[4:]
    return found.startswith("test") if split == "test" else found == split


def items_of_refs(
    refs: list[Ref], instances: Path, images: Path, tally: Tally, facts: Facts, crowds: bool = True
) -> Iterator[ReferringItem]:
    """One item per picture, in the order in which the pictures first occur.

    instances: COCO's file with images, annotations and categories, of which only what the refs name is held.
    crowds: whether regions of many things (iscrowd) count; without it they are left out of a union.
    """
    pictures = _index(instances, "images", {ref.image_id for ref in refs}, ("file_name", "height", "width"))
    wanted = {number for ref in refs for number in ref.annotations}
    annotations = _index(instances, "annotations", wanted, ("image_id", "segmentation", "iscrowd", "category_id"))
    categories = _index(instances, "categories", None, ("name",))
    by_picture: dict[int, list[Ref]] = {}
    for ref in refs:
        by_picture.setdefault(ref.image_id, []).append(ref)
    for image_id, group in by_picture.items():
        expressions = sum(len(ref.sentences) for ref in group)
        try:
            info = pictures.get(image_id)
            if info is None or info is TWICE:
                raise Unusable("unknown image id" if info is None else "image id twice")
            image = read_picture(images, info["file_name"])
            demand_whole(image)
        except Unusable as unusable:
            tally.drop(unusable.reason, f"image {image_id}: {unusable.detail:.200}", expressions)
            continue
        size = info["height"], info["width"]
        things = []
        for ref in group:
            try:
                mask, category = _mask_of(ref, annotations, categories, image, size, crowds)
            except Unusable as unusable:
                tally.drop(unusable.reason, f"ref {ref.key}: {unusable.detail:.200}", len(ref.sentences))
                continue
            things += thing_of(str(ref.key), ref.sentences, mask, category, tally)
        if things:
            yield item_of(facts, image_id, image, things)


def item_of(facts: Facts, image_id, image: dict, things: Iterable[Thing]) -> ReferringItem:
    key = f"{facts.source}/{facts.split}/{image_id}"
    extra = {"image_id": image_id}
    return ReferringItem(key, image, tuple(things), facts.source, facts.licence, facts.split, extra)


def _mask_of(
    ref: Ref, annotations: dict, categories: dict, image: dict, size, crowds: bool
) -> tuple[dict, str | None]:
    if ref.absent:
        return empty_mask(image), None
    found = []
    for number in ref.annotations:
        if number not in annotations:
            raise Unusable("unknown annotation id", str(number))
        annotation = annotations[number]
        if annotation is TWICE:
            raise Unusable("annotation id twice", str(number))
        if annotation["image_id"] != ref.image_id:
            raise Unusable(
                "annotation of another picture", f"{number} belongs to image {annotation['image_id']!r:.40}"
            )
        found.append(annotation)
    used = found if crowds else [annotation for annotation in found if not annotation["iscrowd"]]
    if not used:
        raise Unusable("crowds alone" if found else "no annotation")
    mask = merge([demand_area(published_mask(annotation["segmentation"], image, size)) for annotation in used])
    return mask, _one_category(used, categories)


def _one_category(annotations: list[dict], categories: dict) -> str | None:
    """The name of the category that all of them have, if there is one."""
    numbers = {annotation["category_id"] for annotation in annotations if isinstance(annotation["category_id"], int)}
    name = categories.get(numbers.pop(), {}).get("name") if len(numbers) == 1 else None
    return name if isinstance(name, str) else None


def thing_of(key: str, sentences: Iterable, mask: dict, category: str | None, tally: Tally) -> list[Thing]:
    """The thing with its phrases, or nothing when none of its sentences is usable."""
    phrases: dict[str, None] = {}
    for sentence in sentences:
        reason = _add_phrase(sentence, phrases)
        if reason:
            tally.drop(reason, f"ref {key}: {sentence!r:.80}")
    return [Thing(key, tuple(phrases), mask, category)] if phrases else []


def _add_phrase(sentence, phrases: dict[str, None]) -> str | None:
    """Add the phrase, or say why not."""
    if not isinstance(sentence, str):
        return "sentence that is no text"
    phrase = clean_phrase(sentence)
    if not phrase:
        return "no sentence"
    if has_control_token(sentence) or "\x00" in phrase or any("\ud800" <= c <= "\udfff" for c in phrase):
        return "sentence with control characters"
    if phrase in phrases:
        return "sentence twice for one thing"
    phrases[phrase] = None
    return None


def demand_area(mask: dict) -> dict:
    if area(mask) == 0:
        raise Unusable("empty mask")
    return mask


def demand_whole(image: dict) -> None:
    try:
        load_picture(image["bytes"])
    except PictureError as error:
        raise Unusable("picture damaged", f"{image['path']}: {error}") from error


def empty_mask(image: dict) -> dict:
    width, height = upright_size(image["bytes"])
    return encode_mask(np.zeros((height, width), bool))


TWICE = {"id": "twice"}  # stands for an annotation whose id two different ones have


def _index(file: Path, section: str, wanted: set | None, keys: tuple[str, ...]) -> dict:
    """id → the entry with these keys, for the ids that are wanted (None: all)."""
    index: dict = {}
    for entry in read_section(file, section):
        number = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(number, int) or (wanted is not None and number not in wanted):
            continue
        kept = {key: entry.get(key) for key in keys}
        index[number] = TWICE if index.get(number, kept) != kept else kept
    return index


def demand_files(*paths: Path) -> tuple[Path, ...]:
    for path in paths:
        if not path.is_file():
            found = f"files {', '.join(sorted(p.name for p in path.parent.glob('*')))[:200] or 'none'}"
            raise DataError(
                Problem(str(path), None, "file", f"missing; the folder has {found}", "the published file", "fetch it")
            )
    return paths


def find_images(root: Path, images_dir: str | Path | None, usual: tuple[str, ...]) -> Path:
    """The folder of pictures: the one that is named (relative to `root`), or the first of the usual ones."""
    names = usual if images_dir is None else (images_dir,)
    for name in names:
        if Path(root, name).is_dir():
            return Path(root, name)
    places = " or ".join(str(Path(root, name)) for name in names)
    raise DataError(
        Problem(str(root), None, "images_dir", "no folder of pictures", places, "pass `images_dir`, or put them there")
    )
