"""BLINK and SEED-Bench in the layouts in which they are published."""

import json

import pyarrow as pa
import pytest
from referring_samples import jpeg
from test_choice_letters import evaluate, figures
from test_sources_refcoco_parquet import IMAGE, write_parquet

from perceptio.data.record import DataError
from perceptio.data.tally import Tally
from perceptio.evaluation.benchmark import open_benchmark

DEPTH_PROMPT = (
    "Two points are circled on the image, labeled by A and B beside each circle. "
    "Which point is closer to the camera?\n"
    "Select from the following choices.\n(A) A is closer\n(B) B is closer"
)


def cell(seed: int) -> dict:
    return {"bytes": jpeg(seed=seed), "path": None}


def blink_row(subtask: str, number: int, answer: str, pictures: int = 1, choices=("A is closer", "B is closer")):
    images = {f"image_{i + 1}": cell(10 * number + i) if i < pictures else None for i in range(4)}
    return {
        "idx": f"val_{subtask}_{number}",
        "sub_task": subtask,
        "question": "Which point is closer?",
        **images,
        "choices": list(choices),
        "answer": answer,
        "prompt": DEPTH_PROMPT,
    }


def write_blink(folder, rows, split="val") -> None:
    kinds = {f"image_{i}": IMAGE for i in range(1, 5)} | {"choices": pa.list_(pa.string())}
    for subtask in {row["sub_task"] for row in rows}:
        part = [row for row in rows if row["sub_task"] == subtask]
        write_parquet(folder / subtask / f"{split}-00000-of-00001.parquet", part, **kinds)


@pytest.fixture
def blink(tmp_path):
    rows = [blink_row("Relative_Depth", i, "(A)" if i % 4 else "(B)") for i in range(1, 5)]
    rows += [blink_row("Jigsaw", 1, "(B)", pictures=3), blink_row("Multi-view_Reasoning", 1, "(B)", pictures=2)]
    write_blink(tmp_path / "blink", rows)
    hidden = [{**blink_row("Jigsaw", 2, "hidden"), "idx": "test_Jigsaw_2"}]
    write_blink(tmp_path / "blink", hidden, "test")
    return tmp_path / "blink"


def test_the_published_prompt_is_asked_with_all_pictures(blink):
    items = list(open_benchmark("blink").items(blink, "val", Tally()))
    assert [item.id.removeprefix("val_") for item in items] == [
        "Jigsaw_1",
        "Multi-view_Reasoning_1",
        *(f"Relative_Depth_{i}" for i in range(1, 5)),
    ]
    assert {item.question for item in items} == {DEPTH_PROMPT}
    assert [len(item.pictures) for item in items] == [3, 2, 1, 1, 1, 1]
    assert [item.perception for item in items] == ["none"] * 2 + ["seg+depth"] * 4
    assert items[0].pictures == tuple(jpeg(seed=10 + i) for i in range(3))


def test_subtasks_count_the_same_in_the_mean_and_not_in_all(blink, tmp_path):
    found = evaluate("blink", blink, tmp_path / "out", "(A) A is closer")
    assert figures(found) == pytest.approx(
        {
            "Jigsaw": 0,
            "Multi-view_Reasoning": 0,
            "Relative_Depth": 75,
            "mean of 3 subtasks": 25,
            "all questions": 50,
        }
    )
    one = evaluate("blink", blink, tmp_path / "one", "B", split="Relative_Depth")
    assert figures(one) == {"Relative_Depth": 25} and one["items"] == 4


def test_a_subtask_alone_may_be_the_folder(blink, tmp_path):
    assert figures(evaluate("blink", blink / "Relative_Depth", tmp_path / "out")) == {"Relative_Depth": 100}


def test_rows_that_cannot_be_used_are_told_together_before_anything_is_asked(tmp_path):
    rows = [
        blink_row("Counting", 1, "(C)"),
        {**blink_row("Counting", 2, "(A)"), "idx": "val_Cooking_2"},
        {**blink_row("Counting", 3, "(A)"), "prompt": " "},
        blink_row("Counting", 4, "(A)", choices=["only"]),
        blink_row("Counting", 5, "(A)"),
        blink_row("Counting", 5, "(A)"),
    ]
    write_blink(tmp_path, rows)
    with pytest.raises(DataError) as caught:
        next(open_benchmark("blink").items(tmp_path, "val", Tally()))
    problems = caught.value.problems
    fields = [(0, "answer"), (1, "idx"), (2, "prompt"), (3, "choices"), (5, "idx")]
    assert [(p.row, p.field) for p in problems] == fields
    assert problems[0].found == "'(C)'" and problems[0].expected == "one of A, B"
    assert problems[0].file.endswith("Counting/val-00000-of-00001.parquet")


def test_other_files_are_told_what_is_looked_for(tmp_path):
    with pytest.raises(DataError, match="nothing; expected val-.*parquet, in a folder for each subtask"):
        next(open_benchmark("blink").items(tmp_path, "val", Tally()))
    write_parquet(tmp_path / "val-0.parquet", [{"idx": "val_Jigsaw_1", "prompt": "?"}])
    with pytest.raises(DataError, match="field `columns`: idx, prompt; expected also image_1, choices, answer"):
        next(open_benchmark("blink").items(tmp_path, "val", Tally()))
    (tmp_path / "val-0.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match="not readable.*expected Parquet: fetch it again"):
        next(open_benchmark("blink").items(tmp_path, "val", Tally()))


def test_a_row_without_a_picture_is_named(tmp_path):
    write_blink(tmp_path, [blink_row("Counting", 1, "(A)", pictures=0)])
    with pytest.raises(DataError, match="row 0, field `image_1`: no bytes"):
        next(open_benchmark("blink").items(tmp_path, "val", Tally()))


# SEED-Bench


def seed_row(number: int, answer: str, dimension: int = 5, data_type: str = "image", data_id=None) -> dict:
    words = ("One", "Two", "Three", "Four")
    return {
        "answer": answer,
        **{f"choice_{letter}": word for letter, word in zip("abcd", words, strict=True)},
        "data_id": data_id or f"{number // 2}_picture",
        "data_type": data_type,
        "question": "How many towels are in the image?",
        "question_id": str(number),
        "question_type_id": dimension,
    }


SEED_ROWS = [
    seed_row(1, "A", 5),
    seed_row(2, "B", 5),
    seed_row(3, "B", 1),
    seed_row(4, "C", 10, "video", "94328.webm"),
]
SEED_QUESTION = (
    "How many towels are in the image?\nA. One\nB. Two\nC. Three\nD. Four\n"
    "Answer with the option's letter from the given choices directly."
)


def write_seed_parquet(folder, rows) -> None:
    rows = [
        {**row, "image": [cell(int(row["question_id"]) // 2)] * (8 if row["data_type"] == "video" else 1)}
        for row in rows
    ]
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", rows, image=pa.list_(IMAGE))


def write_seed_json(folder, rows, ending: str = "") -> None:
    (folder / "SEED-Bench-image").mkdir(parents=True)
    for row in rows:
        if row["data_type"] == "image":
            path = folder / "SEED-Bench-image" / f"{row['data_id']}{ending}"
            path.write_bytes(jpeg(seed=int(row["question_id"]) // 2))
    content = {"questions": rows, "question_type": {"Scene Understanding": 1, "Instances Counting": 5}}
    (folder / "SEED-Bench.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("write", [write_seed_parquet, write_seed_json, lambda f, r: write_seed_json(f, r, ".jpg")])
def test_both_layouts_give_the_same_items(tmp_path, write):
    write(tmp_path, SEED_ROWS)
    tally = Tally()
    items = list(open_benchmark("seed-bench").items(tmp_path, "image", tally))
    assert [(item.id, item.truth["letter"], item.group) for item in items] == [
        ("1", "A", "0_picture"),
        ("2", "B", "1_picture"),
        ("3", "B", "1_picture"),
    ]
    assert [item.question for item in items] == [SEED_QUESTION] * 3
    assert [item.pictures for item in items] == [(jpeg(seed=seed),) for seed in (0, 1, 1)]
    assert tally.kept == 3 and dict(tally.dropped) == {"about a video": 1}


def test_dimensions_have_their_own_figures(tmp_path):
    write_seed_json(tmp_path / "seed", SEED_ROWS)
    found = evaluate("seed-bench", tmp_path / "seed", tmp_path / "out", "B. Two")
    assert figures(found) == pytest.approx({"accuracy": 200 / 3, "Scene Understanding": 100, "Instances Counting": 50})
    assert list(figures(found)) == ["accuracy", "Scene Understanding", "Instances Counting"]
    assert evaluate("seed-bench", tmp_path / "seed", tmp_path / "x", "Two")["invalid"] == {
        "no letter that can be read": 3
    }


def test_missing_pictures_and_wrong_rows_of_seed_are_told_together(tmp_path):
    rows = [*SEED_ROWS, seed_row(5, "E"), seed_row(6, "A", 11), seed_row(7, "A", data_type="sound"), seed_row(1, "A")]
    write_seed_json(tmp_path, rows)
    (tmp_path / "SEED-Bench-image" / "1_picture").unlink()
    with pytest.raises(DataError) as caught:
        next(open_benchmark("seed-bench").items(tmp_path, "image", Tally()))
    assert [(p.row, p.field) for p in caught.value.problems] == [
        (1, "data_id"),
        (2, "data_id"),
        (4, "answer"),
        (5, "question_type_id"),
        (6, "data_type"),
        (7, "question_id"),
    ]
    assert "'1_picture': No such file" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable.*expected JSON"),
        ("[]", "field `questions`: None; expected a list"),
        ('{"questions": [1]}', "expected a list of objects"),
    ],
)
def test_a_broken_list_of_seed_is_named(tmp_path, text, message):
    (tmp_path / "SEED-Bench.json").write_text(text)
    with pytest.raises(DataError, match=message):
        next(open_benchmark("seed-bench").items(tmp_path, "image", Tally()))
