"""HardBLINK in the published layout: read, scored, refused; and built anew."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from referring_samples import jpeg
from test_choice_letters import Says, evaluate, figures

from perceptio.data.depths import encode_depth
from perceptio.data.record import DataError
from perceptio.data.tally import Tally
from perceptio.evaluation.benchmark import open_benchmark
from perceptio.evaluation.choice.hardblink import files_of
from perceptio.evaluation.choice.hardblink_build import build, choose, main, maps_in, maps_of
from perceptio.world.marks import BAND, SIDE

QUESTION = (
    "Multiple points are circled on the image, labeled by letters beside each circle. Which point is the closest?"
)
KEYS = {3: "BCA", 4: "DBB", 5: "BAE"}


def write_lines(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_hardblink(folder, keys=KEYS) -> None:
    for level, letters in keys.items():
        questions, answers, images = files_of(folder, level)
        ids = [7, 31, 58]
        asked = [{"question_id": i, "image": f"{i}.png", "text": QUESTION, "category": "count"} for i in ids]
        write_lines(questions, asked)
        rows = [{"question_id": i, "text": f"({a})", "category": "count"} for i, a in zip(ids, letters, strict=True)]
        write_lines(answers, rows[::-1])
        images.mkdir(parents=True)
        for i in ids:
            (images / f"{i}.png").write_bytes(jpeg(seed=10 * level + i))


@pytest.fixture
def data(tmp_path):
    write_hardblink(tmp_path / "hardblink")
    return tmp_path / "hardblink"


def test_questions_are_asked_in_the_published_words_and_order(data):
    items = list(open_benchmark("hardblink").items(data, "all", Tally()))
    assert [item.id for item in items] == [f"{level}/{i}" for level in (3, 4, 5) for i in (7, 31, 58)]
    assert {item.question for item in items} == {QUESTION} and {item.perception for item in items} == {"seg+depth"}
    assert [item.truth["letter"] for item in items] == list("BCADBBBAE")
    assert items[4].pictures == ((data / "images/blink4pointscenter/31.png").read_bytes(),)
    assert [item.group for item in items] == ["7", "31", "58"] * 3, "one photo is in all three"


def test_every_level_has_a_figure_and_their_mean_another(data, tmp_path):
    results = evaluate("hardblink", data, tmp_path / "out", lambda item: "(B)")
    third = 100 / 3
    assert figures(results) == pytest.approx(
        {"3 points": third, "4 points": 2 * third, "5 points": third, "mean": 4 * third / 3}
    )
    assert all(figure["low"] < figure["value"] < figure["high"] for figure in results["figures"])
    assert figures(evaluate("hardblink", data, tmp_path / "4", split="4")) == {"4 points": 100}


def test_letters_beyond_the_points_are_invalid(data, tmp_path):
    results = evaluate("hardblink", data, tmp_path / "out", "E")
    assert figures(results, "invalid") == {"3 points": 3, "4 points": 3, "5 points": 0, "mean": 6}
    assert figures(results)["5 points"] == pytest.approx(100 / 3) and results["invalid"] == {
        "no letter that can be read": 6
    }


def test_a_run_that_was_broken_off_goes_on(data, tmp_path):
    evaluate("hardblink", data, tmp_path / "whole", batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        evaluate("hardblink", data, tmp_path / "out", predictor=Says("(A)", fail_at=4), batch_size=2)
    again = Says("(B)")
    evaluate("hardblink", data, tmp_path / "out", predictor=again, batch_size=2)
    assert [item.id for item in again.asked] == ["4/31", "4/58", "5/7", "5/31", "5/58"]
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == ["(A)"] * 4 + ["(B)"] * 5


def test_everything_wrong_is_told_at_once_with_file_line_field_and_remedy(data):
    questions, answers, images = files_of(data, 4)
    (images / "58.png").unlink()
    rows = [{"question_id": 7, "text": "(E)"}, {"question_id": 99, "text": "(A)"}, {"question_id": 58, "text": "(A)"}]
    write_lines(answers, rows)
    with pytest.raises(DataError) as caught:
        list(open_benchmark("hardblink").items(data, "all", Tally()))
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert f"{questions}, row 1, field `text`: '(E)'; expected one of A, B, C, D" in text
    assert f"row 2, field `question_id`: question 31; expected one answer to each question in {answers}" in text
    assert re.search(r"row 3, field `image`: '58.png': No such file", text)
    assert f"{answers}, row 2, field `question_id`: answer 99" in text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: files_of(data, 5)[1].unlink(), r"blink_5pointscenter_answers.jsonl.*missing.*--split"),
        (lambda data: files_of(data, 3)[0].write_text('{"question_id": 7}\nno json\n'), "row 2, field `line`: 'no js"),
        (lambda data: files_of(data, 3)[0].write_bytes(b"\xff\xfe"), "not readable.*expected text in UTF-8"),
    ],
)
def test_broken_files_are_named(data, spoil, message):
    spoil(data)
    with pytest.raises(DataError, match=message):
        list(open_benchmark("hardblink").items(data, "all", Tally()))


def test_another_folder_is_told_what_is_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="notes.txt; expected the folders questions, answers and images"):
        list(open_benchmark("hardblink").items(tmp_path, "all", Tally()))


def test_a_line_ends_at_its_end_and_a_byte_order_mark_is_no_text(data):
    """U+2028 ends a line for Python, and stands unescaped in published files."""
    questions, *_ = files_of(data, 3)
    text = questions.read_text("utf-8").replace("circled on", "circled\u2028on")
    questions.write_text("\ufeff" + text, encoding="utf-8")
    items = list(open_benchmark("hardblink").items(data, "3", Tally()))
    assert len(items) == 3 and all("\u2028" in item.question for item in items)


def test_a_picture_outside_of_the_folder_is_refused(data):
    questions, *_ = files_of(data, 3)
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    write_lines(questions, [{**row, "image": f"../blink4pointscenter/{row['image']}"} for row in rows])
    with pytest.raises(DataError, match="leads out"):
        list(open_benchmark("hardblink").items(data, "3", Tally()))


# Built anew


def ramp(height: int = 120, width: int = 160) -> np.ndarray:
    """Nearer to the right."""
    return np.tile(np.linspace(0, 1, width, dtype=np.float32), (height, 1))


@pytest.mark.parametrize("count", [3, 4, 5])
def test_points_are_apart_in_place_and_in_depth_the_nearest_first(count):
    depth = ramp()
    depth[:60] = np.nan
    for seed in range(20):
        points = np.array(choose(np.random.default_rng(seed), depth, count, BAND))
        values = depth[(points[:, 1] + 0.5).astype(int) * 120 // SIDE, (points[:, 0] + 0.5).astype(int) * 160 // SIDE]
        assert (np.diff(values) <= -20 / 255 + 1e-6).all() and (values > 0).all()
        assert (points[:, 0] >= 10).all() and (points[:, 0] <= 325).all()
        assert (points[:, 1] >= 95).all() and (points[:, 1] <= 224).all()
        gaps = np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1))
        assert gaps[~np.eye(count, dtype=bool)].min() >= 20


def test_a_flat_map_has_no_points():
    assert choose(np.random.default_rng(0), np.full((8, 8), 0.5), 3, BAND) is None


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a", "b", "flat"):
        Image.new("RGB", (80, 60), (90, 90, 90)).save(folder / f"{name}.png")
    return folder


def depth_of(path) -> np.ndarray:
    return np.full((60, 80), 0.5) if path.stem == "flat" else ramp()


def test_what_is_built_is_evaluated_and_its_answer_lies_nearest(photos, tmp_path):
    tally = build(photos, tmp_path / "built", depth_of, seed=1)
    assert tally.kept == 6 and dict(tally.dropped) == {f"no {level} points": 1 for level in (3, 4, 5)}
    items = list(open_benchmark("hardblink").items(tmp_path / "built", "all", Tally()))
    assert [item.id for item in items] == [f"{level}/{i}" for level in (3, 4, 5) for i in (0, 1)]
    assert len({item.truth["letter"] for item in items}) > 1, "letters are shuffled"
    assert figures(evaluate("hardblink", tmp_path / "built", tmp_path / "out"))["mean"] == 100
    picture = np.asarray(Image.open(files_of(tmp_path / "built", 5)[2] / "0.png"))
    red = (picture[..., 0] > 200) & (picture[..., 1] < 60)
    assert picture.shape == (SIDE, SIDE, 3) and 5 * 12 < red.sum() < 5 * 60, "five rings"


def test_seeds_decide(photos, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        build(photos, tmp_path / name, depth_of, seed)
    pictures = {n: (files_of(tmp_path / n, 3)[2] / "0.png").read_bytes() for n in ("one", "again", "two")}
    assert pictures["one"] == pictures["again"] != pictures["two"]


def test_maps_from_a_folder_and_from_a_teacher(photos, tmp_path):
    maps = tmp_path / "maps"
    maps.mkdir()
    (maps / "a.png").write_bytes(encode_depth(ramp()))
    assert np.corrcoef(maps_in(maps)(photos / "a.png").ravel(), ramp().ravel())[0, 1] > 0.99
    with pytest.raises(DataError, match="field `b`: no map; expected b.png"):
        maps_in(maps)(photos / "b.png")

    def teacher(pictures):
        return [1 / (ramp(30, 40) + 0.1) for _ in pictures]

    teacher.kind = "metres"
    assert np.all(np.diff(maps_of(teacher)(photos / "a.png")[0]) >= 0), "metres are turned round"


def test_the_command_writes_a_new_folder_only(photos, tmp_path, capsys):
    for name in ("a", "b", "flat"):
        (tmp_path / f"{name}.png").write_bytes(encode_depth(ramp()))
    arguments = [str(photos), str(tmp_path / "built"), "--depths", str(tmp_path)]
    main(arguments)
    assert "hardblink: 9 of 9 kept" in capsys.readouterr().err
    with pytest.raises(DataError, match="not empty; expected a new folder"):
        main(arguments)
