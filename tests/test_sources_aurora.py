"""AURORA's depth files in their published layout."""

import json

import pytest
from PIL import Image

from perceptio.data.sources.ade import ANSWER
from perceptio.data.sources.aurora import read_aurora
from perceptio.data.tally import Tally
from perceptio.data.validate import check_record, check_records

CODES = [index * 7 % 128 for index in range(100)]
MARKS = "Multiple points are circled on the image, labeled by letters. Which point is the closest to the camera?"
COORDINATES = "Point A is located at (x = 73 y = 188),Point B is located at (x = 191 y = 77)."
CONCLUSION = (
    "Since point B has a higher pixel value on the depth map, the answer is that point B is closer to the camera."
)


def tokens(codes=CODES, between="") -> str:
    return between.join(["<DEPTH_START>", *(f"<DEPTH_{code}>" for code in codes), "<DEPTH_END>"])


def row(answer, question=MARKS, number="1", image="ADE_blink/ADE_train_00000639.jpg"):
    talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": number, "image": image, "conversations": talk}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "ADE_blink").mkdir()
    Image.effect_noise((336, 336), 40).convert("RGB").save(tmp_path / "ADE_blink/ADE_train_00000639.jpg")
    return tmp_path


def read(root, rows, **options):
    (root / "train_depth_20k.json").write_text(json.dumps(rows, indent=2))
    tally = Tally("aurora")
    records = list(read_aurora(root, tally=tally, **options))
    tally.check(len(rows))
    assert len(records) == tally.kept
    return records, tally


def test_the_string_leaves_a_chain_of_thought_and_its_conclusion_stays(root):
    answer = f"{COORDINATES}The depth map for the image is {tokens()}. {CONCLUSION}"
    (record,), _ = read(root, [row(answer)])
    assert record["messages"][1] == {
        "role": "assistant",
        "content": f"{COORDINATES} {CONCLUSION}",
        "perception": "depth",
    }
    assert record["depth_codes"] == CODES and record["depth_codebook"] == "aurora" and record["depth"] is None
    assert check_record(record, num_codes=128, span_length=100, codebook="aurora") == []


@pytest.mark.parametrize(
    "answer",
    [
        tokens(),
        tokens(between=" "),
        f"The depth map for the image is {tokens()}.",
        f"The depth map of the image is {tokens()}",
    ],
)
def test_depth_generation_has_a_short_answer_left(root, answer):
    (record,), _ = read(root, [row(answer, question="What is the depth map for the image?")])
    assert record["messages"][0]["content"] == "What is the depth map for the image?"
    assert record["messages"][1]["content"] == ANSWER and record["messages"][1]["perception"] == "depth"
    assert record["depth_codes"] == CODES


def test_a_direct_answer_opens_with_nothing(root):
    (record,), _ = read(root, [row("(B)")])
    assert record["messages"][1] == {"role": "assistant", "content": "(B)", "perception": "none"}
    assert record["depth_codes"] is None and record["depth_codebook"] is None


def test_the_codebook_and_the_grid_are_the_callers(root):
    (record,), _ = read(root, [row(tokens([1, 2, 3, 200]))], num_codes=256, span_length=4, codebook="0123abcd")
    assert record["depth_codes"] == [1, 2, 3, 200] and record["depth_codebook"] == "0123abcd"


def test_strings_that_are_no_map_are_dropped_by_reason(root):
    rows = [
        row(tokens(CODES[:99])),
        row(tokens([*CODES, 5])),
        row(tokens([])),
        row(tokens([*CODES[:-1], 128])),
        row("<DEPTH_START>" + "<DEPTH_3>" * 100),
        row(tokens() + tokens(CODES[::-1])),
        row("(B)", question=tokens()),
        row("(B)", image="ADE_blink/none.jpg"),
    ]
    rows = [{**entry, "id": str(number)} for number, entry in enumerate(rows)]
    _, tally = read(root, rows)
    assert tally.dropped == {
        "depth string of other than 100 codes": 3,
        "depth code past 127": 1,
        "part of a depth string": 2,
        "two different depth strings": 1,
        "picture missing": 1,
    }


def test_rows_of_ten_epochs_are_one_unless_asked_for(root):
    """The published training file holds each row once per epoch that it is in, under one id."""
    rows = [row(tokens(), number="a"), row("(B)", number="b"), row(tokens(), number="a")]
    records, tally = read(root, rows)
    assert tally.dropped == {"repeated row": 1} and len(records) == 2
    assert [json.loads(record["extra"])["id"] for record in records] == ["a", "b"]
    records, _ = read(root, rows, repeated=True)
    assert len(records) == 3
    assert [problem for _, problems in check_records(records) for problem in problems] == []
