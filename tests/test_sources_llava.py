"""LLaVA's instruction mix in its published layout, and the reader of long JSON files under it."""

import json
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from PIL import Image

from perceptio.data.record import DataError
from perceptio.data.sources import json_stream
from perceptio.data.sources.conversations import take_out_mark
from perceptio.data.sources.json_stream import read_rows, read_section
from perceptio.data.sources.llava import read_llava, read_llava_parquet
from perceptio.data.tally import Tally
from perceptio.data.validate import check_records

HUMAN, GPT = "human", "gpt"


def talk(*turns):
    return [{"from": speaker, "value": text} for speaker, text in turns]


def jpeg(size=(24, 16)) -> bytes:
    file = BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A root with two pictures as published, one that is cut off, and one outside of it."""
    for name in ("coco/train2017/000000000009.jpg", "textvqa/train_images/a.jpg"):
        (tmp_path / "mix" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mix" / name).write_bytes(jpeg())
    (tmp_path / "mix/coco/train2017/cut.jpg").write_bytes(jpeg()[:-200])
    (tmp_path / "outside.jpg").write_bytes(jpeg())
    return tmp_path / "mix"


def read(folder, rows, **options):
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(rows), "utf-8")
    tally = Tally("llava")
    records = list(read_llava(folder, tally=tally, **options))
    tally.check(len(rows))
    assert [problem for _, problems in check_records(records) for problem in problems] == []
    assert len(records) == tally.kept
    return records, tally


COCO = "coco/train2017/000000000009.jpg"
ASK = talk((HUMAN, "<image>\nWhat is it?"), (GPT, "A cup."))


def test_a_conversation_about_a_picture_keeps_its_turns_and_the_published_bytes(folder):
    turns = talk((HUMAN, "<image>\nWhat is it?"), (GPT, "A cup."), (HUMAN, "Which colour?"), (GPT, " Red. "))
    records, _ = read(folder, [{"id": "000000000009", "image": COCO, "conversations": turns}])
    assert [(m["role"], m["content"], m["perception"]) for m in records[0]["messages"]] == [
        ("user", "What is it?", None),
        ("assistant", "A cup.", "none"),
        ("user", "Which colour?", None),
        ("assistant", "Red.", "none"),
    ]
    assert records[0]["image"]["bytes"] == (folder / COCO).read_bytes()
    assert json.loads(records[0]["extra"]) == {"id": "000000000009"}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<image>\nWhat?", "What?"),
        ("What?\n<image>", "What?"),
        ("Look at <image> here.", "Look at here."),
        ("First line.\n<image>\nSecond.", "First line.\nSecond."),
        ("What?", "What?"),
    ],
)
def test_the_mark_leaves_the_question_wherever_it_stood(text, expected):
    assert take_out_mark(text, has_picture=True) == expected


def test_rows_with_one_id_get_one_of_their_own(folder):
    """Of the published rows about one picture many have its number as their id."""
    records, _ = read(folder, [{"id": "1", "image": COCO, "conversations": ASK}] * 3)
    assert len({record["id"] for record in records}) == 3


def test_text_without_a_picture_is_kept_or_dropped_as_asked(folder):
    rows = [{"id": "x", "model": "gpt-4", "conversations": talk((HUMAN, "Hello"), (GPT, "Hi."))}]
    records, _ = read(folder, rows)
    assert records[0]["image"] is None and json.loads(records[0]["extra"])["model"] == "gpt-4"
    assert read(folder, rows, text_only=False)[1].dropped == {"no picture": 1}


ODD = {
    "does not start with a question": {"image": COCO, "conversations": talk((GPT, "A cup."), (HUMAN, "What?"))},
    "two questions in a row": {"image": COCO, "conversations": talk((HUMAN, "<image>\nA"), (HUMAN, "B"), (GPT, "C"))},
    "two answers in a row": {"image": COCO, "conversations": talk((HUMAN, "<image>\nA"), (GPT, "B"), (GPT, "C"))},
    "does not end with an answer": {"image": COCO, "conversations": [*ASK, *talk((HUMAN, "And?"))]},
    "empty answer": {"image": COCO, "conversations": talk((HUMAN, "<image>\nA"), (GPT, " \n"))},
    "empty question": {"image": COCO, "conversations": talk((HUMAN, "<image>\n"), (GPT, "A cup."))},
    "several pictures": {"image": COCO, "conversations": talk((HUMAN, "<image><image>\nA"), (GPT, "B"))},
    "an image mark past the first question": {
        "image": COCO,
        "conversations": [*ASK, *talk((HUMAN, "<image>"), (GPT, "B"))],
    },
    "an image mark and no picture": {"conversations": ASK},
    "unknown speaker": {"image": COCO, "conversations": talk(("bing", "A"), (GPT, "B"))},
    "a turn without text": {"image": COCO, "conversations": talk((HUMAN, None), (GPT, "B"))},
    "no conversation": {"image": COCO, "conversations": []},
    "picture missing": {"image": "coco/train2017/none.jpg", "conversations": ASK},
    "picture damaged": {"image": "coco/train2017/cut.jpg", "conversations": ASK},
    "path outside the folder": {"image": "../outside.jpg", "conversations": ASK},
    "no name of a picture": {"image": ["a.jpg", "b.jpg"], "conversations": ASK},
    "messages not usable": {"image": COCO, "conversations": talk((HUMAN, "<image>\nA"), (GPT, "half \ud83d"))},
    "not an object": "a text",
}


def test_every_odd_row_is_dropped_with_its_reason(folder):
    records, tally = read(folder, [*ODD.values(), {"id": "good", "image": COCO, "conversations": ASK}])
    assert tally.dropped == dict.fromkeys(ODD, 1)
    assert [json.loads(record["extra"])["id"] for record in records] == ["good"]
    assert tally.examples["path outside the folder"][0].startswith("row 14")


def test_a_link_out_of_the_folder_is_not_followed(folder):
    (folder / "link.jpg").symlink_to(folder.parent / "outside.jpg")
    _, tally = read(folder, [{"image": "link.jpg", "conversations": ASK}])
    assert tally.dropped == {"path outside the folder": 1}


def parquet(folder, rows):
    (folder / "data").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "train-00000-of-00001.parquet")


def test_the_hub_s_parquet_gives_the_same_records(folder):
    stored = {"bytes": (folder / COCO).read_bytes(), "path": "000000000009.jpg"}
    parquet(
        folder,
        [
            {"id": "1", "image": stored, "conversations": ASK},
            {"id": "2", "image": {"bytes": None, "path": COCO}, "conversations": ASK},
            {"id": "3", "image": None, "conversations": talk((HUMAN, "Hello"), (GPT, "Hi."))},
            {"id": "4", "image": {"bytes": b"no picture", "path": "x"}, "conversations": ASK},
        ],
    )
    tally = Tally()
    records = list(read_llava_parquet(folder, tally=tally))
    assert (tally.kept, tally.dropped) == (3, {"picture damaged": 1})
    from_json, _ = read(folder, [{"id": "1", "image": COCO, "conversations": ASK}])
    assert records[0]["messages"] == records[1]["messages"] == from_json[0]["messages"]
    assert records[0]["image"] == records[1]["image"] == from_json[0]["image"]


def test_a_data_set_is_read_without_decoding_its_pictures(folder):
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    features = Features(
        {"image": ImageFeature(), "conversations": List({"from": Value("string"), "value": Value("string")})}
    )
    dataset = Dataset.from_list(
        [{"image": {"bytes": (folder / COCO).read_bytes(), "path": None}, "conversations": ASK}], features
    )
    tally = Tally()
    records = list(read_llava_parquet(dataset, tally=tally))
    assert tally.kept == 1 and records[0]["image"]["bytes"] == (folder / COCO).read_bytes()


def test_a_damaged_parquet_file_is_named(folder):
    parquet(folder, [{"id": "1", "image": None, "conversations": ASK}])
    path = folder / "data" / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="train-00000-of-00001.parquet.*fetch it again"):
        list(read_llava_parquet(folder, tally=Tally()))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_long_array_is_read_piece_by_piece(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    rows = [{"a": [1, {"b": "] , }"}], "ü": '\\"é\n'}, [], "text", 12345, -1.5e3, None, True, {}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), "utf-8-sig")
    assert list(read_rows(path)) == rows
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert list(read_rows(tmp_path / "rows.jsonl")) == rows
    path.write_text(json.dumps({"info": {"year": 1}, "images": rows, "n": 3, "annotations": [4, 5], "empty": []}))
    assert list(read_section(path, "images")) == rows and list(read_section(path, "annotations")) == [4, 5]
    assert list(read_section(path, "empty")) == []
    with pytest.raises(DataError, match="no key 'masks'"):
        list(read_section(path, "masks"))


@pytest.mark.parametrize(
    "text, found",
    [
        ('[{"a": 1}, {"a": ', "no JSON"),
        ('[{"a": 1} {"a": 2}]', "'{'"),
        ('[{"a": 1}', "the end of the file"),
        ('{"a": 1}', "'{'"),
        ("", "the end of the file"),
        ("[" * 100_000, "cannot be read"),
        ("[" + "9" * 5000 + "]", "cannot be read"),
        (b'["\xff"]', "no UTF-8"),
    ],
)
def test_a_broken_file_is_named_with_its_row(tmp_path, text, found):
    path = tmp_path / "rows.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError, match=found) as raised:
        list(read_rows(path))
    assert "rows.json" in str(raised.value) and "fetch" in str(raised.value)


def test_a_file_of_the_published_size_is_never_held_whole(tmp_path, monkeypatch):
    """The buffer stays near one chunk, whatever the file has."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"row": n, "text": "x" * 100} for n in range(20_000)]))
    monkeypatch.setattr(json_stream, "CHUNK", 10_000)
    longest = 0
    more = json_stream._Text._more

    def watched(self, count=None):
        nonlocal longest
        result = more(self, count or json_stream.CHUNK)
        longest = max(longest, len(self.buffer))
        return result

    monkeypatch.setattr(json_stream._Text, "_more", watched)
    assert sum(1 for _ in read_rows(path)) == 20_000
    assert longest < 40_000 < path.stat().st_size
