"""The record and its validator: a good record passes, and each thing that is wrong is named with its place."""

import copy
from io import BytesIO

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from perceptio.data.depths import encode_depth
from perceptio.data.masks import encode_mask
from perceptio.data.record import (
    FEATURES,
    DataError,
    Problem,
    assistant,
    make_record,
    stored_size,
    upright_size,
    user,
)
from perceptio.data.tally import Tally
from perceptio.data.validate import check_record, check_records

HEIGHT, WIDTH = 24, 32


def jpeg(width=WIDTH, height=HEIGHT, orientation=1) -> bytes:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
    exif = picture.getexif()
    exif[0x0112] = orientation
    file = BytesIO()
    picture.save(file, "JPEG", exif=exif)
    return file.getvalue()


def left_half(height=HEIGHT, width=WIDTH) -> dict:
    mask = np.zeros((height, width), bool)
    mask[:, : width // 2] = True
    return encode_mask(mask)


def good() -> dict:
    """Two questions; the first answer has a second mask inside, the second is about something absent."""
    depth = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    empty = encode_mask(np.zeros((HEIGHT, WIDTH), bool))
    return make_record(
        id="a",
        image=jpeg(),
        messages=[
            user("Where is the cup?"),
            assistant("On the left, beside the pot.", "seg+depth"),
            user("And the dog?"),
            assistant("There is none.", "seg"),
        ],
        masks=[left_half(), {**left_half(), "offset": 27}, {**empty, "turn": 3}],
        depth=encode_depth(depth),
        depth_codes=range(9),
        depth_codebook="abc",
        source="own",
        licence="CC0-1.0",
        extra={"kind": "where"},
    )


def test_a_good_record_passes_and_survives_arrow():
    record = good()
    assert check_record(record, num_codes=16, span_length=9, codebook="abc") == []
    row = next(iter(Dataset.from_list([record], features=FEATURES).to_list()))
    assert row == record


def test_text_alone_and_a_rotated_picture_pass():
    assert (
        check_record(
            make_record(id="t", image=None, messages=[user("Hi"), assistant("Hello")], source="s", licence="l")
        )
        == []
    )
    turned = jpeg(orientation=6)
    assert stored_size(turned) == (WIDTH, HEIGHT, 6) and upright_size(turned) == (HEIGHT, WIDTH)
    record = make_record(
        id="r",
        image=turned,
        messages=[user("Where?"), assistant("Here.", "seg")],
        masks=[left_half(WIDTH, HEIGHT)],
        source="s",
        licence="l",
    )
    assert check_record(record) == []
    record["masks"][0].update(left_half())
    assert "as it is shown" in check_record(record)[0].found


def change(path: str, value):
    def apply(record):
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in parents:
            record = record[key]
        record[last] = value

    return apply


def drop(path: str):
    def apply(record):
        del record[path]

    return apply


def swap_masks(record):
    record["masks"][0], record["masks"][1] = record["masks"][1], record["masks"][0]


FAULTS = {
    "unknown column": (change("colour", 1), "record"),
    "column missing": (drop("masks"), "record"),
    "empty id": (change("id", " "), "id"),
    "id of another type": (change("id", 7), "id"),
    "no source": (change("source", None), "source"),
    "extra is no JSON": (change("extra", "{"), "extra"),
    "extra is a list": (change("extra", "[]"), "extra"),
    "no messages": (change("messages", []), "messages"),
    "messages is a text": (change("messages", "hi"), "messages"),
    "unknown role": (change("messages.0.role", "human"), ("messages[0].role", "messages")),
    "text is a number": (change("messages.1.content", 3), "messages[1].content"),
    "text is None": (change("messages.0.content", None), "messages[0].content"),
    "empty answer": (change("messages.1.content", " \n"), "messages[1].content"),
    "giant text": (change("messages.0.content", "a" * 200_000), "messages[0].content"),
    "NUL": (change("messages.0.content", "a\0b"), "messages[0].content"),
    "half a surrogate": (change("messages.0.content", "\ud83d"), "messages[0].content"),
    "perception of a question": (change("messages.0.perception", "seg"), "messages[0].perception"),
    "unknown perception": (change("messages.1.perception", "mask"), "messages[1].perception"),
    "answer without perception": (change("messages.1.perception", None), "messages[1].perception"),
    "two questions in a row": (change("messages.1.role", "user"), ("messages", "messages[1].perception")),
    "picture is a path": (change("image", "a.jpg"), "image"),
    "picture is text": (change("image.bytes", b"<html>"), "image"),
    "picture is cut": (change("image.bytes", jpeg()[:300]), "image"),
    "mask without picture": (change("image", None), ("masks", "depth")),
    "mask of a question": (change("masks.0.turn", 0), "masks[0].turn"),
    "mask of no turn": (change("masks.0.turn", 9), "masks[0].turn"),
    "offset at the end": (change("masks.1.offset", 28), "masks[1].offset"),
    "offset before the start": (change("masks.1.offset", -2), "masks[1].offset"),
    "offset is 0": (change("masks.1.offset", 0), "masks[1].offset"),
    "masks out of order": (swap_masks, "masks"),
    "two masks at one place": (change("masks.1.offset", -1), "masks"),
    "run lengths overrun": (change("masks.0.counts", "oooo0"), "masks[0]"),
    "mask of another size": (change("masks.0", {"turn": 1, "offset": -1, **left_half(8, 8)}), "masks[0]"),
    "mode without a mask": (lambda record: record["masks"].pop(), "messages[3].perception"),
    "mask without a mode": (change("messages.1.perception", "none"), "messages[1].perception"),
    "depth is no picture": (change("depth.bytes", b"x"), "depth"),
    "depth of 8 bits": (change("depth.bytes", jpeg()), "depth"),
    "depth of another shape": (change("depth", {"bytes": encode_depth(np.eye(24)), "path": None}), "depth"),
    "depth larger than the picture": (
        change("depth", {"bytes": encode_depth(np.zeros((48, 64))), "path": None}),
        "depth",
    ),
    "depth all holes": (change("depth", {"bytes": encode_depth(np.full((24, 32), np.nan)), "path": None}), "depth"),
    "98 codes": (change("depth_codes", [1] * 8), "depth_codes"),
    "code too high": (change("depth_codes", [16] * 9), "depth_codes"),
    "code below 0": (change("depth_codes", [-1] * 9), "depth_codes"),
    "codes are text": (change("depth_codes", "123456789"), "depth_codes"),
    "codes without a codebook": (change("depth_codebook", None), "depth_codebook"),
    "another codebook": (change("depth_codebook", "def"), "depth_codebook"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_with_its_place_and_nothing_else(fault):
    apply, field = FAULTS[fault]
    record = copy.deepcopy(good())
    apply(record)
    problems = check_record(record, "x.parquet", 7, num_codes=16, span_length=9, codebook="abc")
    assert {problem.field for problem in problems} == {*([field] if isinstance(field, str) else field)}, problems
    for problem in problems:
        assert problem.found and problem.expected and problem.remedy
        assert str(problem).startswith(f"x.parquet, row 7, field `{problem.field}`: ")


def test_depth_asked_for_and_not_given():
    record = {**good(), "depth": None, "depth_codes": None}
    assert [problem.field for problem in check_record(record)] == ["messages[1].perception"]


def test_several_faults_of_one_record_are_found_in_one_pass():
    record = good()
    record["source"], record["messages"][0]["content"], record["image"] = "", 3, {"bytes": b"", "path": None}
    assert [problem.field for problem in check_record(record)] == ["source", "messages[0].content", "image"]


def test_an_id_twice_is_a_problem_of_the_second():
    found = [len(problems) for _, problems in check_records([good(), {**good(), "id": "b"}, good()])]
    assert found == [0, 0, 1]


def test_an_error_lists_all_problems_and_crosses_processes():
    import pickle

    problems = [Problem("f", row, "mask", "a", "b", "c") for row in range(12)]
    error = DataError(problems)
    assert "12 problems" in str(error) and "row 9" in str(error) and "… and 2 more" in str(error)
    other = pickle.loads(pickle.dumps(error))  # noqa: S301 (our own bytes)
    assert str(other) == str(error) and other.problems == problems
    assert str(DataError("plain")) == str(pickle.loads(pickle.dumps(DataError("plain")))) == "plain"  # noqa: S301


def test_a_tally_holds_one_to_what_was_read():
    tally = Tally("job", examples=2)
    tally.keep(3)
    for index in range(4):
        tally.drop("no picture", f"row {index}")
    tally.check(7)
    total = Tally("all").add(tally).add(tally.to_dict())
    assert total.read == 14 and total.dropped["no picture"] == 8
    assert tally.to_dict()["examples"] == {"no picture": ["row 0", "row 1"]}
    with pytest.raises(RuntimeError, match="vanished"):
        tally.check(8)
    tally.kept -= 1
    with pytest.raises(RuntimeError, match="vanished"):
        tally.check()
