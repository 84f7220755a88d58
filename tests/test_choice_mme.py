"""MME: accuracy, accuracy+ and the scores, from the Hub's table and from the official folder."""

import pytest
from referring_samples import jpeg
from test_choice_letters import evaluate, figures
from test_sources_refcoco_parquet import IMAGE, write_parquet

from perceptio.data.record import DataError
from perceptio.data.tally import Tally
from perceptio.evaluation.benchmark import open_benchmark

FLAT, NESTED = "existence", "artwork"  # how the official folder has them
PICTURES = {FLAT: ("0001", "0002", "0003"), NESTED: ("0004",), "code_reasoning": ("0005", "0006")}


def asked(category: str, stem: str) -> list[tuple[str, str]]:
    return [(f"Is {stem} {word}? Please answer yes or no.", answer) for word, answer in (("so", "Yes"), ("not", "No"))]


def write_folder(folder) -> None:
    for category, stems in PICTURES.items():
        root = folder / category
        texts, images = (root / "questions_answers_YN", root / "images") if category == NESTED else (root, root)
        for place in (texts, images):
            place.mkdir(parents=True, exist_ok=True)
        for stem in stems:
            lines = "".join(f"{question}\t{answer}\n" for question, answer in asked(category, stem))
            (texts / f"{stem}.txt").write_text(lines, encoding="utf-8")
            (images / f"{stem}{'.png' if category == 'code_reasoning' else '.jpg'}").write_bytes(jpeg(seed=int(stem)))
    (folder / "eval_tool").mkdir()


def table_rows() -> list[dict]:
    return [
        {
            "question_id": f"{category}/{stem}",
            "image": {"bytes": jpeg(seed=int(stem)), "path": None},
            "question": question,
            "answer": answer,
            "category": category,
        }
        for category, stems in sorted(PICTURES.items())
        for stem in stems
        for question, answer in asked(category, stem)
    ]


def write_hub(folder, rows=None) -> None:
    write_parquet(folder / "data" / "test-00000-of-00002.parquet", (rows or table_rows())[:5], image=IMAGE)
    write_parquet(folder / "data" / "test-00001-of-00002.parquet", (rows or table_rows())[5:], image=IMAGE)


@pytest.mark.parametrize("write", [write_folder, write_hub])
def test_both_layouts_give_the_same_items(tmp_path, write):
    write(tmp_path)
    items = list(open_benchmark("mme").items(tmp_path, "test", Tally()))
    assert [(item.id, item.truth["yes"]) for item in items[:4]] == [
        ("artwork/0004/0", True),
        ("artwork/0004/1", False),
        ("code_reasoning/0005/0", True),
        ("code_reasoning/0005/1", False),
    ]
    assert len(items) == 12 and items[0].question == "Is 0004 so? Please answer yes or no."
    assert [item.pictures[0] for item in items] == [jpeg(seed=int(item.id[-6:-2])) for item in items]
    assert len({item.group for item in items}) == 6


def run(tmp_path, answer, **settings) -> dict:
    write_folder(tmp_path / "mme")
    return evaluate("mme", tmp_path / "mme", tmp_path / "out", answer, **settings)


def test_all_right_scores_two_hundred_for_each_category(tmp_path):
    results = run(tmp_path, lambda item: item.truth["answer"])
    found = figures(results)
    assert found["perception score, of 400"] == 400 and found["cognition score, of 200"] == 200
    assert {value for name, value in found.items() if "score" not in name} == {100}
    assert figures(results, "unit")["perception score, of 400"] == ""


def test_always_yes_is_half_right_and_never_both(tmp_path):
    found = figures(run(tmp_path, "Yes"))
    assert found == {
        "perception score, of 400": 100,
        "cognition score, of 200": 50,
        **{f"{category}, accuracy": 50 for category in PICTURES},
        **{f"{category}, accuracy+": 0 for category in PICTURES},
    }


def test_scores_by_hand(tmp_path):
    """existence: 5 of 6 and 2 of 3 pictures; artwork: 1 of 2 and none; code_reasoning: all."""
    wrong = {"existence/0002/1", "artwork/0004/0"}
    flipped = {"Yes": "No.", "No": "yes"}
    results = run(tmp_path, lambda item: flipped[item.truth["answer"]] if item.id in wrong else item.truth["answer"])
    found = figures(results)
    existence, artwork = 100 * (5 / 6 + 2 / 3), 50
    assert found["existence, accuracy+"] == pytest.approx(200 / 3)
    assert found["perception score, of 400"] == pytest.approx(existence + artwork)
    assert found["cognition score, of 200"] == 200
    for figure in results["figures"]:
        assert figure["low"] <= figure["value"] <= figure["high"]
    perception = results["figures"][0]
    assert (perception["name"], perception["n"]) == ("perception score, of 400", 4)
    assert perception["low"] < 150 and 250 < perception["high"] <= 400


def test_unreadable_answers_are_wrong_and_counted(tmp_path):
    results = run(tmp_path, lambda item: "Yes it is" if item.truth["yes"] else "No")
    assert figures(results)["existence, accuracy"] == 50 and figures(results)["existence, accuracy+"] == 0
    assert figures(results, "invalid")["existence, accuracy"] == 3
    assert figures(results, "invalid")["existence, accuracy+"] == 3
    assert results["invalid"] == {"neither yes nor no": 6}


def test_half_a_picture_has_no_score(tmp_path):
    results = run(tmp_path, lambda item: item.truth["answer"], limit=5)
    assert figures(results, "n") == {
        "perception score, of 200": 1,
        "cognition score, of 200": 1,
        "artwork, accuracy": 2,
        "artwork, accuracy+": 1,
        "code_reasoning, accuracy": 3,
        "code_reasoning, accuracy+": 1,
    }


def test_wrong_files_of_the_folder_are_told_together(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "existence" / "0001.jpg").unlink()
    (tmp_path / "existence" / "0002.txt").write_text("Is it so?\tYes\nIs it not? No\n")
    with pytest.raises(DataError) as caught:
        next(open_benchmark("mme").items(tmp_path, "test", Tally()))
    places = [(p.file.rpartition("/")[2], p.row, p.field) for p in caught.value.problems]
    assert places == [("0001.txt", 1, "image"), ("0001.txt", 2, "image"), ("0002.txt", 2, "answer")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "field `question_id`: 1 of 'existence/0003'; expected two of each"),
        (
            lambda rows: [{**rows[0], "category": "taste"}, *rows[1:]],
            "row 0, field `category`: 'taste'; expected one of",
        ),
        (lambda rows: [{**rows[0], "answer": "maybe"}, *rows[1:]], "field `answer`: 'maybe'; expected Yes or No"),
        (lambda rows: [{**rows[0], "image": None}, *rows[1:]], "row 0, field `image`: no bytes"),
    ],
)
def test_wrong_rows_of_the_table_are_named(tmp_path, change, message):
    write_hub(tmp_path, change(table_rows()))
    with pytest.raises(DataError, match=message):
        next(open_benchmark("mme").items(tmp_path, "test", Tally()))


def test_another_folder_is_told_what_is_looked_for(tmp_path):
    (tmp_path / "Existence").mkdir()
    with pytest.raises(DataError, match="Existence; expected test-.*parquet, or a folder for each category"):
        next(open_benchmark("mme").items(tmp_path, "test", Tally()))
