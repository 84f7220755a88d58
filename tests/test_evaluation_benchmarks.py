"""Each benchmark on a handful of items: what it asks, and that the truth scores full marks and silence none."""

import json

import numpy as np
import pytest
from evaluation_samples import Oracle, Silent, write_world
from referring_samples import OTHER, annotation, file_name, picture, ref, write_grefcoco, write_refer
from test_sources_refcoco_parquet import answers_row, write_parquet

from perceptio.data.masks import encode_mask
from perceptio.data.record import DataError
from perceptio.data.tally import Tally
from perceptio.evaluation import BENCHMARKS
from perceptio.evaluation.benchmark import Item, Prediction, open_benchmark
from perceptio.evaluation.referring import judge_mask
from perceptio.evaluation.run import Settings, run_benchmark


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_world(folder)
    return folder


@pytest.fixture
def refer(tmp_path):
    refs = [
        ref(1, 1, 11, "The red cup.", "cup on the left", split="val"),
        ref(2, 1, 12, "dog", split="val"),
        ref(3, 2, 13, "cup", split="testA"),
    ]
    annotations = [annotation(11, 1), annotation(12, 1, OTHER, 2), annotation(13, 2)]
    for dataset, split_by in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")):
        write_refer(tmp_path, refs, annotations, [picture(1), picture(2)], dataset, split_by)
    return tmp_path


def evaluate(name: str, data, out, predictor, split=None, **settings) -> dict:
    benchmark = open_benchmark(name)
    return run_benchmark(benchmark, predictor, data, out, Settings(split or benchmark.splits[0], **settings), {})


def values(results: dict) -> dict:
    return {figure["name"]: figure["value"] for figure in results["figures"]}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_name_opens_a_benchmark(name):
    benchmark = open_benchmark(name)
    assert benchmark.name == name and benchmark.splits and set(benchmark.needs) <= {"seg", "depth"}


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'refcocoo', expected one of refcoco, refcoco\+"):
        open_benchmark("refcocoo")


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog"])
def test_the_truth_scores_full_marks_on_refer(refer, tmp_path, name):
    results = evaluate(name, refer, tmp_path / "out", Oracle())
    assert results["items"] == 3 and set(values(results).values()) == {100} and results["invalid"] == {}
    questions = [json.loads(line)["id"] for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert questions == [f"{name}/{'umd' if name[-1] == 'g' else 'unc'}/val/1/{end}" for end in ("1/0", "1/1", "2/0")]


def test_the_same_from_parquet(tmp_path):
    rows = [answers_row(1, 11, "The red cup.", "cup"), answers_row(2, 12, "dog")]
    write_parquet(tmp_path / "val-00000-of-00001.parquet", rows)
    results = evaluate("refcoco", tmp_path, tmp_path / "out", Oracle())
    assert results["items"] == 3 and set(values(results).values()) == {100}


def test_every_sentence_is_a_query_in_the_published_words(refer):
    items = list(open_benchmark("refcoco").items(refer, "val", Tally()))
    assert [item.question for item in items][:2] == [
        "Please segment the red cup in this image.",
        "Please segment cup on the left in this image.",
    ]
    assert {item.perception for item in items} == {"seg"} and len({item.group for item in items}) == 1


def test_silence_scores_nothing_and_is_counted(refer, tmp_path):
    results = evaluate("refcoco", refer, tmp_path / "out", Silent())
    assert set(values(results).values()) == {0} and results["invalid"] == {"no [SEG]": 3}
    assert all(figure["invalid"] == 3 for figure in results["figures"])


def test_splits_are_the_published_ones(refer, tmp_path):
    assert evaluate("refcoco", refer, tmp_path / "a", Oracle(), "testA")["items"] == 1
    with pytest.raises(ValueError, match="refcocog has no split 'testA', expected one of val, test"):
        evaluate("refcocog", refer, tmp_path / "b", Oracle(), "testA")


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("test,nope", "world has no split 'nope'"),
        ("all,test", "'all' alone"),
        ("test,test", "once each"),
        ("test,", "split ''"),
    ],
)
def test_several_splits_are_named_with_commas(tmp_path, split, said):
    write_world(tmp_path / "world", 2, ("test", "lure", "absent"))
    both = evaluate("world", tmp_path / "world", tmp_path / "both", Oracle(), "lure,absent")
    found = {figure["name"].split(": ")[0] for figure in both["figures"]}
    assert found == {"lure", "absent"} and both["split"] == "lure,absent"
    with pytest.raises(ValueError, match=said):
        evaluate("world", tmp_path / "world", tmp_path / "bad", Oracle(), split)


def test_a_mask_that_the_object_score_holds_back_counts_for_one_figure_alone(refer, tmp_path):
    class Doubtful(Oracle):
        def _one(self, item, mode):
            found = super()._one(item, mode)
            found.masks[0]["object_score"] = 0.3
            return found

    found = values(evaluate("refcoco", refer, tmp_path / "out", Doubtful()))
    assert found["cIoU"] == found["gIoU"] == found["seen to be there"] == 0
    assert found["cIoU whatever the object score"] == 100


def test_a_union_is_taken_of_all_masks():
    left, right = np.zeros((2, 4, 4), bool)
    left[:, :2], right[:, 2:] = True, True
    item = Item("a", "?", truth={"mask": encode_mask(left | right)})
    masks = [{**encode_mask(mask), "score": 1, "object_score": score} for mask, score in ((left, 0.9), (right, 0.6))]
    assert judge_mask(item, Prediction("a", "seg", masks=masks)).values["iou"] == 1
    masks[1]["object_score"] = 0.4
    assert judge_mask(item, Prediction("a", "seg", masks=masks)).values["iou"] == 0.5


def test_absent_things_of_grefcoco(tmp_path):
    refs = [
        ref(1, 1, [11, 12], "both", split="val", no_target=False),
        ref(2, 1, [-1], "a hat", split="val", no_target=True),
    ]
    write_grefcoco(tmp_path, refs, [annotation(11, 1), annotation(12, 1, OTHER)], [picture(1)])
    results = evaluate("grefcoco", tmp_path, tmp_path / "out", Oracle())
    found = values(results)
    assert set(found.values()) == {100} and {"gIoU", "cIoU"} < set(found)
    counts = {figure["name"]: figure["n"] for figure in results["figures"]}
    assert counts["N-acc, absent and left out"] == counts["T-acc, there and marked"] == 1

    class Everything(Oracle):
        def _one(self, item, mode):
            found = super()._one(item, mode)
            found.masks = [{**encode_mask(self.full), "score": 1.0, "object_score": 1.0}]
            return found

    Everything.full = np.ones((48, 64), bool)
    found = values(evaluate("grefcoco", tmp_path, tmp_path / "full", Everything()))
    assert found["N-acc, absent and left out"] == 0 and found["T-acc, there and marked"] == 100
    covered = 16 * 12 + 20 * 28
    assert found["gIoU"] == pytest.approx(100 * covered / (48 * 64) / 2)
    assert found["cIoU"] == pytest.approx(100 * covered / (2 * 48 * 64))
    silent = evaluate("grefcoco", tmp_path, tmp_path / "silent", Silent())
    assert set(values(silent).values()) == {0}, "who says nothing did not say that nothing is there"


def test_a_picture_that_cannot_be_read_by_the_reader_is_in_the_tally(refer, tmp_path):
    path = refer / "images/mscoco/images/train2014" / file_name(1)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="3 picture damaged"):
        evaluate("refcoco", refer, tmp_path / "out", Oracle())


# World and depth


def test_the_truth_scores_full_marks_on_every_split_of_the_world(scenes, tmp_path):
    results = evaluate("world", scenes, tmp_path / "out", Oracle())
    found = values(results)
    assert {value for name, value in found.items() if "AbsRel" not in name} == {100}
    assert all(value == pytest.approx(0, abs=1e-6) for name, value in found.items() if "AbsRel" in name)
    assert {name.partition(":")[0] for name in found} == {"test", "points3", "points4", "lure", "refer", "absent"}
    for name in ("points3: closest point", "lure: closest point", "refer: cIoU", "refer: precision at 0.9"):
        assert name in found
    assert "absent: absent, and left without a mask" in found and "absent: cIoU" not in found
    assert results["invalid"] == {}


def test_silence_on_the_world_is_wrong_everywhere(scenes, tmp_path):
    found = evaluate("world", scenes, tmp_path / "out", Silent())
    assert set(values(found).values()) == {0, None}
    assert all(figure["invalid"] > 0 for figure in found["figures"])
    assert all(value is None for name, value in values(found).items() if "AbsRel" in name)


def test_what_was_not_asked_for_has_no_figure(scenes, tmp_path):
    found = values(evaluate("world", scenes, tmp_path / "out", Oracle(), "points3", perception="none"))
    assert found == {"points3: closest point": 100}


def test_a_letter_that_is_no_option_is_invalid_and_the_mask_is_not(scenes, tmp_path):
    class Beyond(Oracle):
        def _one(self, item, mode):
            found = super()._one(item, mode)
            found.answer = "(D)"
            return found

    results = evaluate("world", scenes, tmp_path / "out", Beyond(), "points3")
    invalid = {figure["name"]: figure["invalid"] for figure in results["figures"]}
    assert invalid["points3: closest point"] == 2 and values(results)["points3: closest point"] == 0
    assert invalid["points3: whole depth spans"] == 0


def test_questions_on_one_picture_are_one_group(scenes):
    items = list(open_benchmark("world").items(scenes, "test", Tally()))
    assert len({item.group for item in items}) == 2 < len(items) == len({item.id for item in items})


def test_a_folder_of_training_scenes_is_no_test(tmp_path):
    write_world(tmp_path / "scenes", 1, ("train",))
    with pytest.raises(DataError, match="holds no split to evaluate on"):
        evaluate("world", tmp_path / "scenes", tmp_path / "out", Oracle())


def test_depth_of_any_records(scenes, tmp_path):
    results = evaluate("depth", scenes, tmp_path / "out", Oracle(), "refer")
    found = values(results)
    assert found["delta1, aligned"] == found["delta1 as it is"] == 100 and results["items"] == 2
    silent = evaluate("depth", scenes, tmp_path / "silent", Silent(), "refer")
    assert values(silent)["delta1, aligned"] == 0 and values(silent)["AbsRel, aligned"] is None
    assert all(figure["invalid"] == 2 for figure in silent["figures"])


def test_alignment_forgives_scale_and_shift_and_nothing_else(scenes, tmp_path):
    class Squeezed(Oracle):
        def decode(self, codes):
            return 0.3 * super().decode(codes) + 0.5

    found = values(evaluate("depth", scenes, tmp_path / "out", Squeezed(), "refer"))
    assert found["delta1, aligned"] == 100 and found["delta1 as it is"] < 60
