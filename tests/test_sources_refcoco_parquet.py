"""The Parquet forms of RefCOCO that are on the Hub."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from referring_samples import (
    HEIGHT,
    OTHER,
    SQUARE,
    WIDTH,
    annotation,
    file_name,
    jpeg,
    picture,
    read_all,
)
from test_sources_fuzz import spoilt

from perceptio.data.masks import decode_mask, encode_mask
from perceptio.data.record import DataError
from perceptio.data.sources.refcoco_parquet import read_refcoco_parquet
from perceptio.data.tally import Tally
from perceptio.data.validate import check_records

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write_parquet(path, rows, **kinds) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    pq.write_table(pa.table({key: pa.array(values, kinds.get(key)) for key, values in columns.items()}), path)


def answers_row(image_id, number, *sentences, polygon=SQUARE[0], bbox=(8, 8, 16, 12), iscrowd=0, data=None):
    return {
        "question_id": str(number),
        "image": {"bytes": jpeg(seed=image_id) if data is None else data, "path": None},
        "question": "Please carefully observe the area …",
        "answer": list(sentences),
        "segmentation": polygon,
        "bbox": list(bbox),
        "iscrowd": iscrowd,
        "file_name": file_name(image_id).replace(".jpg", f"_{number}.jpg"),
    }


KINDS = {"image": IMAGE, "segmentation": pa.list_(pa.float32()), "bbox": pa.list_(pa.float32())}


def test_parquet_with_answers_and_polygons(tmp_path):
    rows = [
        answers_row(1, 1, "left cup", "cup at left"),
        answers_row(2, 2, "dog"),
        answers_row(1, 3, "right cup", polygon=OTHER[0], bbox=(40, 16, 20, 28)),
        answers_row(1, 4, "in two parts", bbox=(8, 8, 40, 12)),
        answers_row(2, 5, "people", polygon=[], iscrowd=1),
        answers_row(2, 2, "dog", "the same again"),
        answers_row(2, 6),
        answers_row(3, 7, "a", "b", data=jpeg()[:-300]),
    ]
    write_parquet(tmp_path / "data/val-00000-of-00001.parquet", rows, **KINDS)
    write_parquet(tmp_path / "data/testA-00000-of-00001.parquet", rows[:1], **KINDS)
    records, tally = read_all(read_refcoco_parquet, tmp_path, 11, split="val", source="refcoco/lmms")
    assert [record["id"] for record in records] == ["refcoco/lmms/val/1", "refcoco/lmms/val/2"]
    assert [len(record["masks"]) for record in records] == [3, 2]
    assert records[0]["image"]["bytes"] == rows[0]["image"]["bytes"]
    assert tally.dropped == {
        "mask in part only": 1,
        "crowd without a mask": 1,
        "sentence twice for one thing": 1,
        "no sentence": 1,
        "picture damaged": 2,
    }
    assert read_all(read_refcoco_parquet, tmp_path, 2, split="testA")[1].kept == 2
    with pytest.raises(DataError, match="files of testA, val; expected files train-"):
        list(read_refcoco_parquet(tmp_path, tally=Tally()))


def raw_row(image_id, number, *sentences, split="train", anns=None):
    sents = [{"raw": s, "sent": s, "sent_id": i, "tokens": s.split()} for i, s in enumerate(sentences)]
    return {
        "sent_ids": list(range(len(sentences))),
        "file_name": file_name(image_id).replace(".jpg", "_1.jpg"),
        "ann_id": number,
        "ref_id": number,
        "image_id": image_id,
        "split": split,
        "sentences": sents,
        "category_id": 1,
        "raw_anns": json.dumps(annotation(number, image_id)) if anns is None else anns,
        "raw_image_info": json.dumps(picture(image_id)),
        "image_path": f"coco/train2014/{file_name(image_id)}",
        "bbox": [8.0, 8.0, 24.0, 20.0],
    }


def test_parquet_with_raw_annotations_takes_the_pictures_of_coco(tmp_path):
    rows = [raw_row(1, 1, "left cup", "cup"), raw_row(2, 2, "dog"), raw_row(1, 3, "x", anns="{"), raw_row(3, 4, "y")]
    rows += [raw_row(2, 2, "ref id twice")]
    rows += [raw_row(1, 5, "in another split", split="val"), raw_row(1, 6, "of another", anns='{"image_id": 2}')]
    rows[-1]["raw_anns"] = json.dumps(annotation(6, 2))
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", rows)
    images = tmp_path / "coco"
    images.mkdir()
    for number in (1, 2):
        (images / file_name(number)).write_bytes(jpeg(seed=number))
    records, tally = read_all(read_refcoco_parquet, tmp_path, 7, images_dir="coco")
    assert [len(record["masks"]) for record in records] == [2, 1]
    assert tally.dropped == {
        "raw columns not readable": 1,
        "picture missing": 1,
        "annotation of another picture": 1,
        "ref id twice": 1,
    }
    assert read_all(read_refcoco_parquet, tmp_path, 1, images_dir="coco", split="validation")[1].kept == 1
    with pytest.raises(DataError, match="no folder of pictures"):
        list(read_refcoco_parquet(tmp_path, tally=Tally()))


def test_parquet_with_samples_and_run_lengths(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[4:9, 4:9] = True
    sample = {"id": 5, "category": "cup", "sentences": ["left cup", "cup"], "mask": encode_mask(mask)}
    other = {"id": 6, "category": "dog", "sentences": ["dog"], "mask": {"counts": "zz", "size": [HEIGHT, WIDTH]}}
    rows = [
        {
            "image": {"bytes": jpeg(), "path": None},
            "image_id": 9,
            "file_name": file_name(9),
            "samples": [sample, other],
        }
    ]
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", rows)
    records, tally = read_all(read_refcoco_parquet, tmp_path, 3, split="val")
    assert np.array_equal(decode_mask(records[0]["masks"][0]), mask) and tally.dropped == {"mask not usable": 1}


def samples_row(image_id, number, *sentences):
    mask = encode_mask(np.eye(HEIGHT, WIDTH, dtype=bool))
    sample = {"id": number, "category": "cup", "sentences": list(sentences), "mask": mask}
    image = {"bytes": jpeg(seed=image_id), "path": None}
    return {"image": image, "image_id": image_id, "file_name": file_name(image_id), "samples": [sample]}


@pytest.mark.parametrize("row", [answers_row, raw_row, samples_row], ids=["answers", "raw", "samples"])
def test_a_row_with_an_empty_cell_does_not_stop_the_others(tmp_path, row):
    (tmp_path / "train2014").mkdir()
    for number in (1, 2, 3):
        (tmp_path / "train2014" / file_name(number)).write_bytes(jpeg(seed=number))
    for column in row(1, 1, "cup"):
        rows = [row(1, 1, "left cup"), row(2, 2, "dog"), row(3, 3, "bird")]
        rows[1][column] = None
        write_parquet(tmp_path / "data/train-0.parquet", rows, **(KINDS if row is answers_row else {}))
        tally = Tally()
        records = list(read_refcoco_parquet(tmp_path, tally=tally))
        tally.check()
        assert 2 <= tally.kept == sum(len(record["masks"]) for record in records) and tally.read <= 3
        assert [problem for _, problems in check_records(records) for problem in problems] == []


def test_an_unknown_form_is_answered_with_the_known_ones(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [{"image": jpeg(), "caption": "a"}])
    with pytest.raises(DataError, match="image, caption; expected those of one form .answers: image, answer"):
        list(read_refcoco_parquet(tmp_path, tally=Tally()))
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="not readable"):
        list(read_refcoco_parquet(tmp_path, tally=Tally()))
    with pytest.raises(DataError, match="no file"):
        list(read_refcoco_parquet(tmp_path / "none", tally=Tally()))


@settings(max_examples=40)
@given(st.randoms(use_true_random=False))
def test_spoilt_rows_of_parquet_do_not_stop_the_others(tmp_path_factory, draw):
    root = tmp_path_factory.mktemp("parquet")
    rows = [raw_row(1, 1, "left cup"), raw_row(2, 2, "dog"), raw_row(1, 3, "cup")]
    spoil = draw.choice(("raw_anns", "raw_image_info"))
    rows[1][spoil] = draw.choice([json.dumps(spoilt(json.loads(rows[1][spoil]), draw)), "{", "", "[]", "7", None])
    write_parquet(root / "data/train-0.parquet", rows)
    (root / "train2014").mkdir()
    for number in (1, 2):
        (root / "train2014" / file_name(number)).write_bytes(jpeg(seed=number))
    read_all(read_refcoco_parquet, root, 3)
