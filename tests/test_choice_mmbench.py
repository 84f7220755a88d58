"""MMBench: circular evaluation, from the official table and from the Hub's."""

import base64
import csv

import pytest
from referring_samples import jpeg
from test_choice_letters import Says, evaluate, figures
from test_sources_refcoco_parquet import IMAGE, write_parquet

from perceptio.data.record import DataError
from perceptio.data.tally import Tally
from perceptio.evaluation.benchmark import open_benchmark

WORDS = {
    241: ("oval", "circle", "square"),
    252: ("yes", "no"),
    273: ("red", "green", "blue", "grey"),
}
RIGHT = {241: "circle", 252: "yes", 273: "grey"}
ABILITY = {241: "attribute_reasoning", 252: "logic_reasoning", 273: "attribute_reasoning"}


def row(index: int, shift: int = 0) -> dict:
    """As published: a rotation has its options moved on, and an index of one million more for each."""
    words = WORDS[index][shift:] + WORDS[index][:shift]
    options = {letter: words[i] if i < len(words) else None for i, letter in enumerate("ABCD")}
    return {
        "index": index + 1_000_000 * shift,
        "question": f"Which one is {index}?",
        "hint": "Look closely." if index == 241 else None,
        **options,
        "answer": "ABCD"[words.index(RIGHT[index])],
        "category": f"category {index}",
        "image": index,
        "source": "x",
        "l2-category": ABILITY[index],
        "comment": None,
        "split": "dev",
    }


ROWS = [row(index) for index in WORDS] + [
    row(index, shift) for shift in (1, 2, 3) for index in WORDS if shift < len(WORDS[index])
]


def write_table(path, rows, replicas: bool = False) -> None:
    """replicas: the legacy form, with the picture in every row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        table.writeheader()
        for content in rows:
            whole = replicas or content["index"] == content["image"]
            picture = base64.b64encode(jpeg(seed=content["image"])).decode() if whole else content["image"]
            table.writerow({**content, "image": picture})


def write_hub(folder, rows) -> None:
    rows = [{**content, "image": {"bytes": jpeg(seed=content["image"]), "path": None}} for content in rows]
    rows = [{"L2-category" if key == "l2-category" else key: v for key, v in content.items()} for content in rows]
    rows = [{**content, "hint": content["hint"] or "nan"} for content in rows]
    write_parquet(folder / "en" / "dev-00000-of-00001.parquet", rows, image=IMAGE)


WRITERS = {
    "table": lambda folder, rows: write_table(folder / "MMBench_DEV_EN.tsv", rows),
    "legacy": lambda folder, rows: write_table(folder / "MMBench_DEV_EN_legacy.tsv", rows, replicas=True),
    "hub": write_hub,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=list(WRITERS))
@pytest.mark.parametrize("rows", [ROWS, ROWS[:3]], ids=["with rotations", "without"])
def test_all_layouts_give_the_same_passes(tmp_path, write, rows):
    write(tmp_path, rows)
    tally = Tally()
    items = list(open_benchmark("mmbench").items(tmp_path, "dev", tally))
    assert [item.id for item in items] == [
        *("241/0", "241/1", "241/2", "252/0", "252/1"),
        *(f"273/{shift}" for shift in range(4)),
    ]
    assert "".join(item.truth["letter"] for item in items) == "BACABDCBA"
    assert items[1].question == (
        "Look closely.\nWhich one is 241?\nA. circle\nB. square\nC. oval\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert items[3].question.startswith("Which one is 252?\nA. yes\nB. no\nAnswer")
    assert [item.pictures[0] for item in items] == [jpeg(seed=int(item.id[:3])) for item in items]
    assert tally.kept == 3 and tally.dropped["published rotation, made anew"] == len(rows) - 3


def test_the_passes_are_the_published_rotations(tmp_path):
    write_table(tmp_path / "MMBench_DEV_EN.tsv", ROWS)
    items = open_benchmark("mmbench").items(tmp_path, "dev", Tally())
    found = {(item.group, tuple(item.truth["options"].values()), item.truth["letter"]) for item in items}
    published = {
        (str(r["index"] % 1_000_000), tuple(r[letter] for letter in "ABCD" if r[letter]), r["answer"]) for r in ROWS
    }
    assert found == published


def circular_run(tmp_path, answer, **settings) -> dict:
    write_table(tmp_path / "data" / "MMBench_DEV_EN.tsv", ROWS)
    return evaluate("mmbench", tmp_path / "data", tmp_path / "out", answer, **settings)


def test_one_wrong_pass_fails_the_question(tmp_path):
    results = circular_run(tmp_path, lambda item: "A" if item.id == "273/2" else item.truth["answer"])
    found = figures(results)
    assert found["circular accuracy"] == pytest.approx(200 / 3) and found["vanilla accuracy"] == 100
    assert found["circular, attribute_reasoning"] == 50 and found["circular, logic_reasoning"] == 100
    assert found["circular, category 273"] == 0 and found["circular, category 241"] == 100
    assert figures(results, "n")["circular accuracy"] == 3 and results["items"] == 9


def test_who_always_says_one_letter_knows_nothing(tmp_path):
    found = figures(circular_run(tmp_path, "A"))
    assert found["circular accuracy"] == 0 and found["vanilla accuracy"] == pytest.approx(100 / 3)


def test_an_unreadable_pass_is_counted_once_for_its_question(tmp_path):
    results = circular_run(tmp_path, lambda item: "what?" if item.group == "241" else item.truth["letter"])
    assert figures(results, "invalid")["circular accuracy"] == 1
    assert figures(results, "invalid")["vanilla accuracy"] == 1
    assert results["invalid"] == {"no letter that can be read": 3}
    assert figures(results)["circular accuracy"] == pytest.approx(200 / 3)


def test_a_question_of_which_passes_are_left_out_has_no_circular_value(tmp_path):
    results = circular_run(tmp_path, lambda item: item.truth["letter"], limit=7)
    assert figures(results, "n")["circular accuracy"] == 2 and figures(results, "n")["vanilla accuracy"] == 3


def test_a_broken_run_keeps_the_rotations_in_order(tmp_path):
    write_table(tmp_path / "data" / "MMBench_DEV_EN.tsv", ROWS)
    with pytest.raises(KeyboardInterrupt):
        evaluate("mmbench", tmp_path / "data", tmp_path / "out", predictor=Says("A", fail_at=4), batch_size=2)
    again = Says("A")
    evaluate("mmbench", tmp_path / "data", tmp_path / "out", predictor=again, batch_size=2)
    assert [item.id for item in again.asked] == ["252/1", *(f"273/{shift}" for shift in range(4))]


def test_wrong_rows_of_a_table_are_told_together(tmp_path):
    rows = [
        {**row(241), "answer": "D"},
        {**row(252), "index": "x"},
        {**row(273), "B": None},
        {**row(241), "index": 5, "image": 6},
        row(252),
    ]
    write_table(tmp_path / "MMBench_DEV_EN.tsv", rows)
    with pytest.raises(DataError) as caught:
        next(open_benchmark("mmbench").items(tmp_path, "dev", Tally()))
    assert [(p.row, p.field) for p in caught.value.problems] == [(0, "answer"), (1, "index"), (2, "A … E")]
    write_table(tmp_path / "MMBench_DEV_EN.tsv", rows[3:])
    with pytest.raises(DataError, match="row 0, field `image`: 6; expected the index of a picture"):
        next(open_benchmark("mmbench").items(tmp_path, "dev", Tally()))


def test_pictures_that_are_no_base64_and_missing_columns_are_named(tmp_path):
    path = tmp_path / "MMBench_DEV_EN.tsv"
    write_table(path, ROWS)
    text = path.read_text()
    path.write_text(text.replace("/9j/", "%%%%", 1))
    with pytest.raises(DataError, match="row 0, field `image`.*expected a picture in base64"):
        next(open_benchmark("mmbench").items(tmp_path, "dev", Tally()))
    path.write_text(text.replace("\tanswer\t", "\tsolution\t", 1))
    with pytest.raises(DataError, match="expected also answer: fetch it again"):
        next(open_benchmark("mmbench").items(tmp_path, "dev", Tally()))


def test_two_data_sets_in_one_folder_are_refused_and_test_is_not_dev(tmp_path):
    write_table(tmp_path / "MMBench_TEST_EN.tsv", ROWS)
    with pytest.raises(DataError, match="MMBench_TEST_EN.tsv; expected a table as MMBench_DEV_EN.tsv"):
        next(open_benchmark("mmbench").items(tmp_path, "dev", Tally()))
    write_table(tmp_path / "MMBench_DEV_EN.tsv", ROWS)
    write_hub(tmp_path, ROWS)
    with pytest.raises(DataError, match="expected one data set: name the folder of one alone"):
        next(open_benchmark("mmbench").items(tmp_path, "dev", Tally()))
