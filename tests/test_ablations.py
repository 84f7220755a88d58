"""The comparison of Perceptio with less of itself: what is asked for, and what is made of the figures."""

import importlib.util
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

from perceptio.data.recipe import read_recipe
from perceptio.evaluation.benchmark import Judgement
from perceptio.train_sft import parse


@pytest.fixture(scope="module")
def ablations(request):
    spec = importlib.util.spec_from_file_location("ablations", request.config.rootpath / "bench" / "ablations.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablations"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(ablations, request):
    return ablations.read_config(request.config.rootpath / "recipes" / "ablations" / "tiny.yaml")


def split(percent: float, right: str = "") -> dict:
    """right: a digit for each question; the first ones found, if none are given."""
    found = int(percent / 10)
    return {"closest point": {"value": percent, "n": 10, "right": right or "1" * found + "0" * (10 - found)}}


@pytest.fixture
def results():
    seeds = {"0": {"points3": split(90.0), "lure": split(80.0), "refer": {"cIoU": {"value": 70.0, "n": 5}}},
             "1": {"points3": split(80.0), "lure": split(70.0)}}  # fmt: skip
    without = {"0": {"points3": split(50.0), "lure": split(50.0)}}
    codes = {"own": {"points3": split(80.0)}, "random": {"points3": split(40.0)}}
    return {"variants": {"all": seeds, "no depth span": without}, "codes": {"with": codes}}


def test_every_variant_is_a_run_that_can_be_read(ablations, config, tmp_path, monkeypatch):
    """train_sft.py reads each one's arguments; without spans no record has a span, nor is one given."""
    ran = []
    monkeypatch.setattr(ablations, "run", lambda *words: ran.append(words))
    monkeypatch.chdir(ablations.ROOT)
    for name, changes in config["variants"].items():
        changes = {key: value for key, value in (changes or {}).items() if key != "eval"}
        ablations.train(changes, 1, config, tmp_path / name)
        words = [str(word) for word in ran[-1]]
        run, arguments = parse([*words[words.index("train_sft.py") + 1 :]])
        assert arguments.seed == 1 and arguments.bf16 and run.samples == config["train"]["samples"]
        recipe = read_recipe(run.data)
        sources = recipe.sources
        assert Path(recipe.root) == ablations.ROOT / config["scenes"]["root"]
        left_out = changes.get("without", "")
        own = {source.name: source.without or "" for source in read_recipe(config["train"]["data"]).sources}
        for source in sources:
            parts = {part for some in (own[source.name], left_out) for part in some.split("+") if part}
            assert set(filter(None, (source.without or "").split("+"))) == parts
        given = {source.name for source in sources} & {"given", "given-things"}
        assert given == (set() if "depth" in left_out else {"given", "given-things"})
        for key in changes.keys() - {"without"}:
            assert getattr(arguments, key) == changes[key]
        assert Path(arguments.output_dir) == tmp_path / name / "run"
    assert len({words[words.index("--config") + 1] for words in ran}) == len(config["variants"]) >= 9


def test_a_run_that_is_done_is_not_run_again(ablations, config, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "run", None)
    model = tmp_path / "all-0" / "run" / "model"
    model.mkdir(parents=True)
    (model / "manifest.json").write_text("{}")
    assert ablations.train({}, 0, config, tmp_path / "all-0") == model
    (tmp_path / "eval").mkdir(parents=True)
    figures = [{"name": "lure: closest point", "value": 50.0, "n": 2, "low": 10.0, "high": 90.0}]
    (tmp_path / "eval" / "results.json").write_text(json.dumps({"figures": figures}))
    asked = (("b", "points", False), ("a", "points", True), ("c", "count", True))
    judged = [Judgement(name, {"split": "lure", "kind": kind, "right": right}) for name, kind, right in asked]
    (tmp_path / "eval" / "judgements.jsonl").write_text("".join(json.dumps(asdict(one)) + "\n" for one in judged))
    found = ablations.ask(model, "data", ["lure"], tmp_path / "eval")
    assert found == {"lure": {"closest point": {"value": 50.0, "n": 2, "right": "10"}}}


def test_variants_and_seeds_may_be_added_and_other_runs_are_left_alone(ablations, config, tmp_path, monkeypatch):
    """A run stands for its start, its settings and its change; one of others is neither taken nor written over."""
    ran = []

    def train(changes, seed, config, folder):
        ran.append((changes, seed))
        return folder / "run" / "model"

    monkeypatch.setattr(ablations, "train", train)
    monkeypatch.setattr(ablations, "ask", lambda *words: {"lure": split(50.0)})
    monkeypatch.setattr(ablations, "RESULTS", tmp_path / "ablations.json")
    monkeypatch.setattr(ablations, "run", lambda *words: None)
    monkeypatch.setattr(ablations, "make_held_out", lambda data: None)
    config |= {"seeds": [0], "variants": {"all": {}, "no marker loss": {"depth_marker_weight": 0.0}}}
    results = {"codes": {"with": {}}}
    ablations.ablate(config, tmp_path, results)
    ablations.ablate(config, tmp_path, results)
    assert ran == [({}, 0), ({"depth_marker_weight": 0.0}, 0)]
    assert json.loads((tmp_path / "ablations.json").read_text("utf-8")) == results
    rows = {name: dict(seeds) for name, seeds in results["variants"].items()}
    shutil.rmtree(tmp_path / "no-marker-loss-0")
    variants = {**config["variants"], "no marker loss": {"depth_marker_weight": 0.5}, "no count loss": {}}
    ablations.ablate(config | {"variants": variants}, tmp_path, results)
    assert ran[2:] == [({"depth_marker_weight": 0.5}, 0), ({}, 0)] and results["variants"]["all"] == rows["all"]
    shutil.rmtree(tmp_path / "all-0")  # what is in the results is not run again, wherever it was run
    ablations.ablate(config | {"seeds": [0, 1], "variants": variants}, tmp_path, results)
    assert [seed for _, seed in ran[4:]] == [1, 1, 1]
    assert {name: sorted(rows) for name, rows in results["variants"].items()} == {
        "all": ["0", "1"],
        "no marker loss": ["0", "1"],
        "no count loss": ["0", "1"],
    }
    other = config | {"train": config["train"] | {"samples": 16}}
    with pytest.raises(SystemExit, match="all-1 is of other settings or another model"):
        ablations.ablate(other | {"seeds": [1]}, tmp_path, results)
    made = json.loads((tmp_path / "all-1" / "made.json").read_text("utf-8"))
    assert made["settings"]["train"] == config["train"]
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "of-before.json").write_text("{}")
    with pytest.raises(SystemExit, match="codes is of other settings or another model"):
        ablations.claim(tmp_path / "codes", {})


def test_the_table_compares_with_the_whole(ablations, results):
    lines = ablations.table(results).splitlines()
    assert "| all | 80.0 (75.0 to 85.0) |  |  | 70.0 |  | 2 |  |" in lines
    assert any(line.startswith("| no depth span | 50.0 | -30.0 ±") for line in lines)
    assert any(line.endswith(" |  |  |  | 1 | −25.8 (Perceptio-8B) |") for line in lines)
    assert len({line.count("|") for line in lines[: lines.index("")]}) == 1
    assert any(line.startswith("| random | 40.0 | -40.0 |") for line in lines)


def test_a_difference_is_of_the_same_questions(ablations):
    """One that all runs find or miss alike says nothing of it, so that it makes it no less sure."""
    whole, alike, other = ([{"lure": split(50.0, right)}] for right in ("1111100000", "1111000000", "0000011110"))
    value, off = ablations.difference(alike, whole)
    assert value == pytest.approx(-10) and off == pytest.approx(19.6, abs=0.1)  # one question of ten
    value, more = ablations.difference(other, whole)
    assert value == pytest.approx(-10) and more > 3 * off
    assert ablations.difference(alike + whole, whole)[0] == pytest.approx(-5)
    assert ablations.difference(whole, whole) == (0, 0)


def test_the_plot_has_a_dot_for_each_run_where_it_belongs(ablations, results):
    root = ElementTree.fromstring(ablations.plot(results))
    circles = [float(node.get("cx")) for node in root.iter() if node.tag.endswith("circle")]
    assert len(circles) == 2 + 1 + 2 and circles[0] == pytest.approx(200 + 420 * 0.85, abs=0.1)
    texts = [node.text for node in root.iter() if node.tag.endswith("text")]
    assert {"all", "no depth span", "random", "80.0%", "40.0%"} <= set(texts)
    assert ElementTree.fromstring(ablations.plot({})).tag.endswith("svg")
