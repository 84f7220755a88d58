import json
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard
from PIL import Image
from shard_samples import CODEBOOK, HEIGHT, WIDTH, folder_of, sample, samples

from perceptio.data.card import card_data, size_category, write_card
from perceptio.data.manifest import read_manifest
from perceptio.data.masks import encode_mask
from perceptio.data.record import COLUMNS, DataError, assistant, user
from perceptio.data.shards import read_shards, write_shards
from perceptio.data.tally import Tally
from perceptio.data.thumbnail import mask_preview
from perceptio.drawing import MASK_COLOURS


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def decode(item: dict) -> Image.Image:
    return Image.open(BytesIO(item["bytes"]))


def test_reading_gives_what_was_written_and_a_preview(tmp_path):
    folder_of(tmp_path, 25, rows_per_shard=10)
    rows = list(read_shards(tmp_path, verify=True))
    assert [row.pop("mask_preview") is not None for row in rows] == [True] * 25
    expected = list(samples(25))
    for row in expected:
        row.pop("mask_preview")
    assert rows == expected
    assert [entry["rows"] for entry in read_manifest(tmp_path)["splits"]["train"]["shards"]] == [10, 10, 5]


def test_the_same_records_give_the_same_bytes(tmp_path):
    first, second = folder_of(tmp_path / "a", 25), folder_of(tmp_path / "b", 25)
    assert files(first) == files(second)
    assert set(files(first)) == {"manifest.json", *(f"data/train-0000{i}-of-00002.parquet" for i in range(2))}


def test_a_shard_ends_with_the_row_that_fills_it(tmp_path):
    manifest = write_shards(samples(12), tmp_path, bytes_per_shard=2 * len(sample(0)["image"]["bytes"]))
    shards = manifest["splits"]["train"]["shards"]
    assert sum(entry["rows"] for entry in shards) == 12 and max(entry["rows"] for entry in shards) <= 2


def test_row_groups_are_small_and_paged_and_pictures_are_stored_as_they_are(tmp_path):
    folder_of(tmp_path, 20)
    with pq.ParquetFile(tmp_path / "data/train-00000-of-00001.parquet") as file:
        metadata = file.metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [7, 7, 6]
    columns = [metadata.row_group(0).column(i) for i in range(metadata.num_columns)]
    assert all(column.has_offset_index for column in columns)
    assert {c.path_in_schema: c.compression for c in columns}["image.bytes"] == "UNCOMPRESSED"


LOAD = """
import sys, datasets
folder = sys.argv[1]
for streaming in (False, True):
    rows = datasets.load_dataset(folder, split="train", streaming=streaming, cache_dir=sys.argv[2])
    row = next(iter(rows))
    assert (row["image"].mode, row["image"].size) == ("RGB", (64, 48)), row["image"]
    assert row["depth"].mode.startswith("I;16") and row["depth"].getextrema() == (1, 65535)
    assert row["mask_preview"].mode == "P"
    assert row["messages"][1] == {"role": "assistant", "content": "There.", "perception": "seg+depth"}
    assert row["masks"][0]["size"] == [48, 64] and row["depth_codes"] == [0] * 9
    assert sum(1 for _ in rows) == 25
print("loaded")
"""


@pytest.mark.parametrize("with_card", [False, True])
def test_datasets_loads_the_folder_in_a_fresh_process(tmp_path, with_card):
    folder_of(tmp_path / "set", 25)
    if with_card:
        write_card(tmp_path / "set")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "set"), str(tmp_path / "cache")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout.strip() == "loaded", run.stderr[-2000:]


def test_splits_are_added_and_replaced_only_on_demand(tmp_path):
    folder_of(tmp_path, 25)
    before = files(tmp_path)
    with pytest.raises(DataError, match="already has 25 rows of the split 'train'.*overwrite=True"):
        write_shards(samples(3), tmp_path)
    assert files(tmp_path) == before
    write_shards(samples(4, split="validation"), tmp_path, split="validation")
    manifest = write_shards(samples(3), tmp_path, overwrite=True)
    assert {name: entry["rows"] for name, entry in manifest["splits"].items()} == {"train": 3, "validation": 4}
    assert len(list(read_shards(tmp_path))) == 7 and len(list(read_shards(tmp_path, "validation"))) == 4
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "train-00000-of-00001.parquet",
        "validation-00000-of-00001.parquet",
    ]


def failing(count: int):
    yield from samples(count)
    raise OSError("the source broke off")


def test_writing_that_breaks_off_leaves_nothing_that_counts(tmp_path):
    with pytest.raises(OSError, match="broke off"):
        write_shards(failing(25), tmp_path / "new", rows_per_shard=10)
    assert files(tmp_path / "new") == {}
    folder_of(tmp_path / "old", 5)
    before = files(tmp_path / "old")
    with pytest.raises(OSError, match="broke off"):
        write_shards(failing(25), tmp_path / "old", rows_per_shard=10, overwrite=True)
    assert files(tmp_path / "old") == before


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from shard_samples import sample
from perceptio.data.shards import write_shards
def rows():
    for number in range(40):
        if number == 25:
            os.kill(os.getpid(), signal.SIGKILL)
        yield sample(number)
write_shards(rows(), sys.argv[1], rows_per_shard=10)
"""


def test_a_killed_writer_leaves_no_data_set_and_its_remains_are_cleared(tmp_path):
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)])
    assert run.returncode == -9
    assert list(tmp_path.rglob("*.incomplete")) and not list(tmp_path.rglob("*.parquet"))
    with pytest.raises(DataError, match=r"no manifest\.json"):
        next(read_shards(tmp_path))
    folder_of(tmp_path, 40)
    assert not list(tmp_path.rglob("*.incomplete"))


def damage_missing(path):
    path.unlink()


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage, found", [(damage_missing, "missing"), (damage_cut, "bytes"), (damage_bit, "SHA-256")]
)
def test_a_damaged_shard_is_named(tmp_path, damage, found):
    folder_of(tmp_path, 25, rows_per_shard=10)
    damage(tmp_path / "data/train-00001-of-00003.parquet")
    rows = read_shards(tmp_path, verify=True)
    assert [next(rows)["id"] for _ in range(10)][-1] == "row-0009"
    with pytest.raises(DataError, match=f"train-00001-of-00003.parquet.*{found}"):
        next(rows)


def test_a_file_that_is_no_parquet_is_named_without_checksums_too(tmp_path):
    folder_of(tmp_path, 5)
    path = tmp_path / "data/train-00000-of-00001.parquet"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match="train-00000-of-00001.parquet.*damaged"):
        list(read_shards(tmp_path))


def test_codes_of_two_codebooks_do_not_mix(tmp_path):
    rows = [*samples(3), sample(3, depth_codebook="feedfeedfeedfeed")]
    with pytest.raises(DataError, match=rf"row 3.*feedfeedfeedfeed.*expected {CODEBOOK}"):
        write_shards(rows, tmp_path / "one")
    with pytest.raises(DataError, match="feedfeedfeedfeed.*row-0003"):  # in a shard of its own as well
        write_shards(rows, tmp_path / "two", rows_per_shard=3)
    with pytest.raises(DataError, match="hash of the codebook"):
        write_shards([sample(0, depth_codebook=None)], tmp_path / "three")
    folder_of(tmp_path / "four", 3)
    other = (sample(i, split="test", depth_codebook="feedfeedfeedfeed") for i in range(2))
    with pytest.raises(DataError, match="feedfeedfeedfeed"):
        write_shards(other, tmp_path / "four", split="test")


def test_codes_of_another_codebook_are_not_read(tmp_path):
    folder_of(tmp_path, 3)
    assert len(list(read_shards(tmp_path, codebook=CODEBOOK))) == 3
    with pytest.raises(DataError, match=f"{CODEBOOK}, expected feedfeedfeedfeed"):
        next(read_shards(tmp_path, codebook="feedfeedfeedfeed"))


@pytest.mark.parametrize(
    "record, text",
    [
        (lambda: sample(1, split="test"), "row 0.*`split`.*'test'.*expected 'train'"),
        (lambda: {**sample(1), "colour": 1}, "row 0.*'colour'"),
        (lambda: sample(1, depth_codes=[40_000] * 9), "`depth_codes`.*row-0001"),
        (lambda: {**sample(1), "source": 7}, "`source`.*row-0001"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, record, text):
    with pytest.raises(DataError, match=text):
        write_shards([record()], tmp_path)
    assert files(tmp_path) == {}


def test_a_split_is_called_by_one_word(tmp_path):
    with pytest.raises(DataError, match="'val-seen'.*rename"):
        write_shards([], tmp_path, split="val-seen")


def test_no_records_and_text_alone(tmp_path):
    assert write_shards([], tmp_path / "none")["splits"]["train"]["rows"] == 0
    assert list(read_shards(tmp_path / "none")) == []
    text = sample(0, image=None, masks=[], codes=False, mapped=False, messages=[user("2 + 2?"), assistant("4.")])
    write_shards([text], tmp_path / "text")
    assert list(read_shards(tmp_path / "text")) == [text]


def test_the_manifest_counts_and_keeps_the_tally(tmp_path):
    tally = Tally("refcoco")
    tally.keep(3)
    tally.drop("no picture", "7")
    rows = [sample(0), sample(1, source="world", licence="MIT"), sample(2, codes=False, mapped=False)]
    entry = write_shards(rows, tmp_path, tally=tally)["splits"]["train"]
    assert entry["sources"] == {"own": {"CC-BY-4.0": 2}, "world": {"MIT": 1}}
    assert [entry[key] for key in ("rows", "pictures", "masks", "depth", "depth_codes")] == [3, 3, 3, 2, 2]
    assert entry["perception"] == {"seg+depth": 3} and entry["tally"] == tally.to_dict()
    assert read_manifest(tmp_path)["columns"] == list(COLUMNS)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda m: m["splits"]["train"]["shards"][0].update(file="../x.parquet"), "do not trust it"),
        (lambda m: m["splits"]["train"]["shards"][0].update(file="/etc/passwd"), "do not trust it"),
        (lambda m: m.update(format=99), "format 99, expected 1"),
        (lambda m: m.pop("splits"), "no manifest of shards"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(tmp_path, change, text):
    folder_of(tmp_path, 3)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=text):
        next(read_shards(tmp_path))


def test_the_preview_shows_each_mask_in_its_colour_over_grey():
    record = sample(0, image=None)
    picture = decode(mask_preview(record))
    assert (picture.mode, picture.size) == ("P", (WIDTH, HEIGHT))
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels[40, 60].tolist() == [0, 0, 0]
    assert pixels[16, 20].argmax() == np.argmax(MASK_COLOURS[0]) and pixels[16, 20].max() > 80
    over_photo = np.asarray(decode(mask_preview(sample(0))).convert("RGB")).astype(int)
    outside = over_photo[30:, 50:].reshape(-1, 3)
    assert (outside == outside[:, :1]).all() and outside.std() > 10  # the photo, in grey
    damaged = sample(0, image=b"\xff\xd8 no picture")
    assert mask_preview(damaged)["bytes"] == mask_preview(record)["bytes"]
    assert mask_preview(sample(0, masks=[])) is None


def test_a_large_picture_has_a_small_preview():
    mask = np.zeros((1200, 1600), bool)
    mask[300:900, 400:1200] = True
    picture = decode(mask_preview({**sample(0, image=None), "masks": [encode_mask(mask)]}))
    assert picture.size == (256, 192)


def test_the_card_says_what_the_manifest_says(tmp_path):
    folder_of(tmp_path / "things", 25)
    write_shards([sample(7, split="test", licence="odd")], tmp_path / "things", split="test")
    path = write_card(tmp_path / "things")
    card = DatasetCard.load(path)
    assert card.data.pretty_name == "things" and card.data.size_categories == ["n<1K"]
    assert card.data.license == "other" and card.data.annotations_creators == ["machine-generated"]
    assert [item["split"] for item in card.data.configs[0]["data_files"]] == ["test", "train"]
    assert [item["name"] for item in card.data.dataset_info["features"]] == list(COLUMNS)
    assert {s["name"]: s["num_examples"] for s in card.data.dataset_info["splits"]} == {"train": 25, "test": 1}
    assert "| train | 25 | 25 | 25 | 25 | 25 |" in card.text and CODEBOOK in card.text
    assert "| own | CC-BY-4.0 | 0 | 25 |" in card.text and "| own | odd | 1 | 0 |" in card.text
    before = path.read_bytes()
    assert write_card(tmp_path / "things").read_bytes() == before


def test_the_example_of_the_card_runs(tmp_path):
    folder_of(tmp_path / "things", 5)
    code = re.search(r"```python\n(.*?)```", write_card(tmp_path / "things").read_text(), re.DOTALL)[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and "JpegImageFile" in run.stdout, run.stderr[-2000:]


def test_a_card_that_a_person_wrote_is_kept(tmp_path):
    folder_of(tmp_path, 3)
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(DataError, match=r"README\.md was written by hand.*overwrite"):
        write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    write_card(tmp_path, overwrite=True)
    assert card_data("x", read_manifest(tmp_path)).license == "cc-by-4.0"


def test_sizes_are_named_as_the_hub_does():
    assert [size_category(n) for n in (999, 1_000, 99_999, 2_000_000)] == [
        "n<1K",
        "1K<n<10K",
        "10K<n<100K",
        "1M<n<10M",
    ]
