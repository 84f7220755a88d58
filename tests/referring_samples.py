"""Small files in the layouts in which the referring data sets are published."""

import json
import pickle
from io import BytesIO

import numpy as np
from PIL import Image

from perceptio.data.masks import decode_mask
from perceptio.data.tally import Tally
from perceptio.data.validate import check_records

WIDTH, HEIGHT = 64, 48
SQUARE = [[8, 8, 24, 8, 24, 20, 8, 20]]  # x 8…23, y 8…19
OTHER = [[40, 16, 60, 16, 60, 44, 40, 44]]


def jpeg(size=(WIDTH, HEIGHT), orientation: int | None = None, seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).integers(0, 255, (size[1] // 4, size[0] // 4, 3), np.uint8)
    picture = Image.fromarray(values).resize(size, Image.Resampling.NEAREST)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    file = BytesIO()
    picture.save(file, "JPEG", exif=exif)
    return file.getvalue()


def file_name(image_id: int) -> str:
    return f"COCO_train2014_{image_id:012d}.jpg"


def picture(image_id: int, width: int = WIDTH, height: int = HEIGHT) -> dict:
    return {"id": image_id, "file_name": file_name(image_id), "width": width, "height": height, "license": 1}


def annotation(number: int, image_id: int, segmentation=SQUARE, category: int = 1, iscrowd: int = 0) -> dict:
    mask = {"segmentation": segmentation, "iscrowd": iscrowd, "area": 1.0, "bbox": [0, 0, 1, 1]}
    return {"id": number, "image_id": image_id, "category_id": category, **mask}


def ref(number: int, image_id: int, ann_id, *sentences: str, split: str = "train", **more) -> dict:
    sents = [{"tokens": s.split(), "raw": s, "sent": s, "sent_id": 100 * number + i} for i, s in enumerate(sentences)]
    return {
        "ref_id": number,
        "ann_id": ann_id,
        "image_id": image_id,
        "category_id": 1,
        "split": split,
        "file_name": file_name(image_id).replace(".jpg", "_0.jpg"),
        "sentences": sents,
        "sent_ids": [sent["sent_id"] for sent in sents],
        **more,
    }


def write_refer(root, refs, annotations, pictures, dataset="refcoco", split_by="unc", protocol=2) -> None:
    """refer's layout.  Pictures are written where none is; protocol 2 is that of the published files."""
    folder = root / dataset
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol))
    write_instances(root, folder, annotations, pictures, "images/mscoco/images/train2014")


def write_grefcoco(root, refs, annotations, pictures) -> None:
    folder = root / "grefcoco"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "grefs(unc).json").write_text(json.dumps(refs), "utf-8")
    write_instances(root, folder, annotations, pictures, "images/train2014")


def write_instances(root, folder, annotations, pictures, images) -> None:
    content = {"info": {}, "images": pictures, "licenses": [], "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}]
    (folder / "instances.json").write_text(json.dumps(content), "utf-8")
    (root / images).mkdir(parents=True, exist_ok=True)
    for info in pictures:
        path = root / images / info["file_name"]
        if not path.exists():
            path.write_bytes(jpeg((info["width"], info["height"]), seed=info["id"]))


def read_all(reader, root, expected: int, **options) -> tuple[list[dict], Tally]:
    """The records, all good, and a tally that adds up to the `expected` number of expressions."""
    tally = Tally("test")
    records = list(reader(root, tally=tally, **options))
    tally.check(expected)
    assert sum(len(record["masks"]) for record in records) == tally.kept
    assert [problem for _, problems in check_records(records) for problem in problems] == []
    return records, tally


def box_of(mask: dict) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the pixels of a mask, all inside."""
    rows, columns = np.nonzero(decode_mask(mask))
    return tuple(int(side) for side in (columns.min(), rows.min(), columns.max(), rows.max()))
