"""GranD-f: captions whose phrases are grounded by masks (the four training files of GLaMM's GCG data).

root is GLaMM's data folder: `GranDf/annotations/train/*.json` next to the folders of pictures.

    GranDf_HA, OpenPsg   [{"file_name", "caption", "groundings": {phrase: {"token_positives": [start, end],
                         "rle_masks": [run lengths, …]}}}]
    RefCOCOg             [{key: {"img_file_name", "caption", "refs": [{"sentence", "segmentation": [polygon, …]}]}}]
    flickr               COCO's layout: images with "caption", annotations with "tokens_positive" and "sam_mask"

The answer is the caption.  Its first grounded phrase (the one that ends first) owns the [SEG] that opens the answer;
each further phrase has its [SEG] directly behind it.  Several masks of one phrase are united.  Of two phrases that
end at the same character the longer counts.  A caption that ends with a phrase gets a full stop, so that the [SEG]
stands inside the text.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..masks import merge
from ..record import OPENING, assistant, make_record, user
from ..tally import Tally
from .common import Unusable, as_dict, choose, convert_rows, published_mask, read_picture
from .json_stream import read_rows, read_section

QUESTIONS = (
    "Describe the picture in detail, and segment the things that you name.",
    "What can be seen here? Give a mask for each thing in your description.",
    "Write a description of this picture with segmentation masks for its phrases.",
    "Tell me what the picture shows, and mark what you mention with masks.",
    "Please describe this scene and ground your description in segmentation masks.",
)
SHORTEST_SIDE, FEWEST_WORDS = 32, 3  # of the pictures and captions from Flickr, as published readers have it


@dataclass(frozen=True)
class Part:
    file: str
    images: str
    layout: str
    source: str


PARTS = {
    "granddf_ha": Part("GranDf_HA_GCG_train.json", "GranDf_HA_images/train", "groundings", "grandf/ha"),
    "openpsg": Part("OpenPsgGCG_train.json", "coco_2017/train2017", "groundings", "grandf/openpsg"),
    "refcocog": Part("RefCOCOg_GCG_train.json", "coco_2014/train2014", "refs", "grandf/refcocog"),
    "flickr": Part("flickr_mergedGT_GCG_train.json", "flikcr_30k/train", "coco", "grandf/flickr"),
}


@dataclass(frozen=True)
class Phrase:
    """Characters start…end of a caption, and what they name in COCO's form."""

    start: int
    end: int
    segmentation: object


@dataclass
class Caption:
    """What a row says: the picture, the size that it states, the text, its phrases, and how many have no place."""

    picture: object
    size: tuple[int, int] | None
    text: str
    phrases: list[Phrase] = field(default_factory=list)
    left_out: int = 0


def read_grandf(
    root: str | Path,
    *,
    tally: Tally,
    part: str = "granddf_ha",
    file: str | None = None,
    images: str | None = None,
    licence: str = "unknown",
    split: str = "train",
) -> Iterator[dict]:
    """One part of GranD-f, a record per caption.  file, images: where annotations and pictures are below `root`."""
    if part not in PARTS:
        raise ValueError(f"`part` is {part!r}, expected one of {', '.join(PARTS)}")
    chosen = PARTS[part]
    path = Path(root) / (file or f"GranDf/annotations/train/{chosen.file}")
    folder = Path(root) / (chosen.images if images is None else images)
    rows, parse = {
        "groundings": (read_rows, _parse_groundings),
        "refs": (read_rows, _parse_refs),
        "coco": (_read_flickr, _parse_flickr),
    }[chosen.layout]

    def convert(row, number: int) -> dict:
        caption = parse(as_dict(row))
        image = read_picture(folder, caption.picture)
        text, masks = _ground(caption, image)
        key = f"{chosen.source}/{number:06d}"
        return make_record(
            id=key,
            image=image,
            messages=[user(choose(QUESTIONS, key)), assistant(text, "seg")],
            masks=masks,
            source=chosen.source,
            licence=licence,
            split=split,
            extra={"phrases": len(masks), "phrases_left_out": caption.left_out},
        )

    yield from convert_rows(rows(path), convert, tally)


def _ground(caption: Caption, image: dict) -> tuple[str, list[dict]]:
    """(the answer, its masks in order); counts the phrases that end where another does."""
    by_span = defaultdict(list)
    for phrase in caption.phrases:
        end = phrase.start + len(caption.text[phrase.start : phrase.end].rstrip())
        by_span[end, phrase.start].append(phrase.segmentation)
    masks, last = [], None
    for (end, _), segmentations in sorted(by_span.items()):
        if end == last:
            caption.left_out += 1
            continue
        last = end
        mask = merge([published_mask(segmentation, image, caption.size) for segmentation in segmentations])
        masks.append({**mask, "turn": 1, "offset": end if masks else OPENING})
    if not masks:
        raise Unusable("no grounded phrase")
    return caption.text + ("." if masks[-1]["offset"] == len(caption.text) else ""), masks


def _text(row: dict) -> str:
    text = row.get("caption")
    text = text.strip('"').strip() if isinstance(text, str) else ""
    if not text:
        raise Unusable("no caption")
    return text


def _size(row: dict) -> tuple[int, int] | None:
    size = row.get("height"), row.get("width")
    return size if all(isinstance(side, int) for side in size) else None


def _parse_groundings(row: dict) -> Caption:
    caption, groundings = Caption(row.get("file_name"), _size(row), _text(row)), row.get("groundings")
    for phrase, grounding in (groundings if isinstance(groundings, dict) else {}).items():
        start, end = _span(as_dict(grounding).get("token_positives"), caption.text)
        masks = grounding.get("rle_masks")
        if caption.text[start:end].strip().casefold() != phrase.strip().casefold() or not isinstance(masks, list):
            caption.left_out += 1  # the mask of other words would teach something false
            continue
        caption.phrases += [Phrase(start, end, mask) for mask in masks]
    return caption


def _span(positions, caption: str) -> tuple[int, int]:
    good = isinstance(positions, (list, tuple)) and len(positions) == 2 and all(isinstance(p, int) for p in positions)
    if not good or not 0 <= positions[0] < positions[1] <= len(caption) or not caption[slice(*positions)].strip():
        raise Unusable("a phrase outside the caption", f"{positions!r:.80}")
    return positions[0], positions[1]


def _parse_refs(row: dict) -> Caption:
    entry = as_dict(next(iter(row.values()), None))
    caption, refs = Caption(entry.get("img_file_name"), _size(entry), _text(entry)), entry.get("refs")
    for ref in refs if isinstance(refs, list) else []:
        sentence = as_dict(ref).get("sentence")
        sentence = sentence.strip() if isinstance(sentence, str) else ""
        found = re.search(re.escape(sentence), caption.text, re.IGNORECASE) if sentence else None
        if found:
            caption.phrases.append(Phrase(found.start(), found.end(), ref.get("segmentation")))
        else:
            caption.left_out += 1
    return caption


def _read_flickr(path: Path) -> Iterator[dict]:
    """The entries of `images`, each with its annotations."""
    annotations = defaultdict(list)
    for annotation in read_section(path, "annotations"):
        if isinstance(annotation, dict):
            kept = {key: annotation.get(key) for key in ("bbox", "area", "ignore", "tokens_positive", "sam_mask")}
            annotations[repr(annotation.get("image_id"))].append(kept)
    for image in read_section(path, "images"):
        yield (
            {**image, "annotations": annotations.pop(repr(image.get("id")), [])} if isinstance(image, dict) else image
        )


def _parse_flickr(row: dict) -> Caption:
    caption = Caption(row.get("file_name"), _size(row), row.get("caption"))
    if not isinstance(caption.text, str) or len(caption.text.split()) < FEWEST_WORDS:
        raise Unusable("caption of fewer than three words")
    if caption.size is None or min(caption.size) < SHORTEST_SIDE:
        raise Unusable("picture of fewer than 32 pixels a side")
    for annotation in row["annotations"]:
        if annotation["ignore"] or not _has_area(annotation, caption.size):
            caption.left_out += 1
            continue
        spans = annotation["tokens_positive"]
        start, end = _span(spans[0] if isinstance(spans, list) and spans else None, caption.text)
        caption.phrases.append(Phrase(start, end, annotation["sam_mask"]))
    return caption


def _has_area(annotation: dict, size: tuple[int, int]) -> bool:
    """Whether the box has a side of a pixel and lies in the picture, at least in part."""
    box, area = annotation["bbox"], annotation["area"]
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in [*box, area]):
        return False
    x, y, width, height = box
    inside = min(x + width, size[1]) > max(x, 0) and min(y + height, size[0]) > max(y, 0)
    return inside and area > 0 and width >= 1 and height >= 1
