"""The release of a finished run, small and made up: what is rounded, what is not, and what its card says."""

import json
import re
import shlex
import shutil

import pytest
import torch
from evaluation_samples import Oracle, write_world
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import InternVLVisionModel, Sam2Model

from perceptio import DepthVQVAE, PerceptioForConditionalGeneration, PerceptioProcessor
from perceptio.cli import build_parser
from perceptio.evaluation.benchmark import Figure, open_benchmark
from perceptio.evaluation.command import folder_hash
from perceptio.evaluation.run import Settings, run_benchmark
from perceptio.hub.average import main as average
from perceptio.hub.card import read_evaluations
from perceptio.hub.manifest import scan_pickles, verify_manifest
from perceptio.hub.release import main, release, shortened
from perceptio.hub.repository import Wish, build, guess_kind
from perceptio.hub.small import build_small
from perceptio.teachers.sam import sam_config
from perceptio.teachers.vision import vision_config

TEACHERS = {
    "sam-whole": {"scenes": 2000, "mean_iou_points": 0.71234},
    "vision-large": {"scenes": 2000, "colour": 0.98765},
}
LARGEST_SHARD = 15_000_000


@pytest.fixture(scope="module")
def run(tmp_path_factory, request):
    """As `perceptio.hub.train_tiny` leaves it, but that nothing was trained and an oracle was asked."""
    place, root = tmp_path_factory.mktemp("tiny"), request.config.rootpath
    torch.manual_seed(0)
    Sam2Model(sam_config(96, 16, [1, 1, 2, 1], 32)).save_pretrained(place / "sam-whole" / "model")
    InternVLVisionModel(vision_config(56, 14, 32, 2, 2)).save_pretrained(place / "vision-large" / "model")
    depth = root / "checkpoints" / "depth-tiny"
    parts = [place / name / "model" for name in TEACHERS]
    build_small(place / "run" / "model", *parts, depth, scenes=4)
    for name, figures in TEACHERS.items():
        (place / name / "model" / "evaluation.json").write_text(json.dumps(figures))
    log = [{"step": step, "loss": 1 / step, "code_accuracy": 0.1 * step, "mask_iou": 0.5} for step in (1, 2, 3)]
    (place / "run" / "checkpoint-3").mkdir()
    (place / "run" / "checkpoint-3" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    write_world(place / "held-out", 2, ("test", "lure"))
    settings = Settings(split="all", batch_size=4)
    run_benchmark(open_benchmark("world"), Oracle(), place / "held-out", place / "eval", settings, {"model": "abc"})
    return place


@pytest.fixture(scope="module")
def released(run, request):
    folder = run.parent / "perceptio-tiny"
    return release(run, folder, request.config.rootpath / "recipes" / "perceptio-tiny.yaml")


def test_half_precision_on_the_disk_is_float32_once_loaded(run, released):
    """Every weight is its rounded self; those that the codes rest on are not rounded."""
    stored = {key: weight for path in released.glob("*.safetensors") for key, weight in load_file(path).items()}
    kinds = {key: torch.float32 if key.startswith("depth_model.") else torch.float16 for key in stored}
    assert {key: weight.dtype for key, weight in stored.items()} == kinds
    assert set(kinds.values()) == {torch.float16, torch.float32}
    trained, loaded = (PerceptioForConditionalGeneration.from_pretrained(f) for f in (run / "run/model", released))
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    before = trained.state_dict()
    for key, weight in loaded.state_dict().items():
        kept = before[key] if key.startswith("depth_model.") else before[key].half().float()
        assert torch.equal(weight, kept), key


def test_the_codebook_is_that_of_the_tokenizer(run, released, request):
    frozen = DepthVQVAE.from_pretrained(request.config.rootpath / "checkpoints" / "depth-tiny")
    loaded = PerceptioForConditionalGeneration.from_pretrained(released)
    stated = json.loads((released / "config.json").read_text())["depth_config"]["codebook_hash"]
    assert loaded.depth_model.codebook_hash() == frozen.codebook_hash() == stated


def test_it_comes_in_small_shards_without_pickles_and_whole(released):
    shards = sorted(released.glob("*.safetensors"))
    assert len(shards) > 1 and max(shard.stat().st_size for shard in shards) <= LARGEST_SHARD
    assert scan_pickles(released) == [] and verify_manifest(released) == []
    assert PerceptioProcessor.from_pretrained(released).tokenizer.chat_template
    assert not [path for path in released.parent.iterdir() if path.name.endswith(".incomplete")]


def test_the_figures_of_the_card_are_those_of_the_file(run, released):
    """Every number of its tables, with the command that measures it anew; the file has them from the evaluation."""
    card, written = (released / "README.md").read_text("utf-8"), read_evaluations(released)["evaluation.json"]
    measured = json.loads((run / "eval" / "results.json").read_text("utf-8"))
    assert written["figures"] == measured["figures"] and len(measured["figures"]) > 4
    numbers = card.split("## Numbers")[1].split("\n## ")[0]
    rows = [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", numbers, flags=re.MULTILINE)]
    assert rows[2:] == [list(Figure(**figure).cells()) for figure in measured["figures"]]
    assert {row[1] for row in rows[2:]} & {"100.0%"}  # of what the oracle answers: a share is not taken twice
    command = shlex.split(re.search(r"`(perceptio eval .*)` wrote", numbers)[1])
    options = build_parser().parse_args(command[1:])
    assert (options.benchmark, options.split, options.batch_size) == ("world", "all", 4)
    assert options.data == "held-out" and options.model == "checkpoints/perceptio-tiny"
    for folder, figures in TEACHERS.items():
        shown = ", ".join(f"{key.replace('_', ' ')} {round(value, 3)}" for key, value in figures.items())
        module = folder.split("-")[0]
        assert f"{shown} (`python -m perceptio.teachers.{module} " in numbers
    assert "3 steps;" in card and "rounded to half precision" in numbers


def test_its_parts_add_up_to_its_weights(released):
    card = (released / "README.md").read_text("utf-8")
    loaded = PerceptioForConditionalGeneration.from_pretrained(released)
    stored = sum(weight.numel() for key, weight in loaded.state_dict().items() if key != "lm_head.weight")
    assert f"{stored / 1e6:,.1f} million numbers" in card
    parts = card.split("## Parts and licences")[1].split("## Citation")[0]
    shown = [float(number) for number in re.findall(r"\| ([\d.]+) M \|", parts)]
    assert sum(shown) == pytest.approx(stored / 1e6, abs=0.01 * len(shown)) and "not stated" not in parts


def test_figures_that_were_measured_on_it_come_in_afterwards(run, released, tmp_path, capsys):
    """Once or again; those of another model do not."""
    folder = shutil.copytree(released, tmp_path / "perceptio-tiny")
    model, files = folder_hash(folder), []
    for codes in ("own", "random"):
        settings, out = Settings(split="test,lure", depth_codes=codes), tmp_path / codes
        run_benchmark(open_benchmark("world"), Oracle(), run / "held-out", out, settings, {"model": model})
        files.append(str(out / "results.json"))
    for _ in range(2):
        assert main([str(folder), "--results", *files]) == 0
        assert verify_manifest(folder) == [] and folder_hash(folder) == model
        names = {"evaluation.json", "evaluation/world-test-lure.json", "evaluation/world-test-lure-random-codes.json"}
        assert set(read_evaluations(folder)) == names
        card = (folder / "README.md").read_text("utf-8")
        assert "### world, test, lure, with other depth codes" in card and "### world, all" in card
    assert main([str(folder.parent), "--results", *files]) == 2
    assert "was measured on the model" in capsys.readouterr().err


def test_the_log_goes_on_from_that_of_what_it_was_started_from(run, released, tmp_path):
    folder = tmp_path / "perceptio-tiny"
    assert main([str(run), str(folder), "--start", str(released)]) == 0
    before, after = (
        [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()] for place in (released, folder)
    )
    assert after[:3] == before and [line["step"] for line in after] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in after] == 2 * [line["loss"] for line in before]
    assert "6 steps;" in (folder / "README.md").read_text("utf-8")


def test_the_card_says_that_the_weights_are_a_mean(run, released, tmp_path):
    averaged = shutil.copytree(run, tmp_path / "run")
    model = averaged / "run" / "model"
    for name in ("first", "second"):
        shutil.copytree(model, tmp_path / name)
    assert average([str(model), str(tmp_path / "first"), str(tmp_path / "second")]) == 0
    assert main([str(averaged), str(tmp_path / "perceptio-tiny")]) == 0
    said = "The weights are the mean of 2 states of it"
    assert said in (tmp_path / "perceptio-tiny" / "README.md").read_text("utf-8")
    assert said not in (released / "README.md").read_text("utf-8")


def test_a_long_log_is_shortened_to_the_means_of_its_lines():
    """And once more when it goes on; a count is the last one."""
    log = [{"step": 20 * n, "loss": n / 3, "bad_steps": n // 50, "num_tokens": 7 * n} for n in range(1, 101)]
    short = shortened([*log, {"step": 2000, "train_runtime": 9.0}], 10)
    assert [line["step"] for line in short] == list(range(200, 2001, 200))
    assert [line["loss"] for line in short[:2]] == [1.8333, 5.1667]  # of 1 to 10 and of 11 to 20, a third
    assert [line["bad_steps"] for line in short] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]
    assert [line["num_tokens"] for line in short] == list(range(70, 701, 70))
    again = shortened([*short, *({**line, "step": line["step"] + 2000} for line in short)], 10)
    assert [line["step"] for line in again] == list(range(400, 4001, 400))
    assert again[0]["loss"] == 3.5 and shortened(short, 10) == short


def test_it_can_be_pushed_as_it_is(released, tmp_path):
    """Its licence is in its card, which then speaks of the Hub's id; the figures stay."""
    (tmp_path / "out").mkdir()
    left_out = build(guess_kind(released), released, tmp_path / "out", Wish("me/perceptio-tiny"))
    card = ModelCard.load(tmp_path / "out" / "README.md", ignore_metadata_errors=False)
    assert left_out == [] and card.data.license == "apache-2.0" and (tmp_path / "out" / "LICENSE").is_file()
    assert 'pipeline("perceptio", model="me/perceptio-tiny", trust_remote_code=True)' in card.text
    assert "perceptio eval world --model me/perceptio-tiny --split all" in card.text
    figures = read_evaluations(released)["evaluation.json"]["figures"]
    assert [result.metric_value for result in card.data.eval_results] == [figure["value"] for figure in figures]
    assert verify_manifest(tmp_path / "out") == []


def test_it_is_written_anew_in_one_piece(run, released, tmp_path, capsys):
    recipe = str(released / "recipe.yaml")
    before = {path.name: path.read_bytes() for path in released.iterdir()}
    assert main([str(run), str(released), "--recipe", recipe]) == 0
    assert {path.name: path.read_bytes() for path in released.iterdir()} == before
    unfinished = shutil.copytree(run, tmp_path / "unfinished", ignore=shutil.ignore_patterns("eval"))
    capsys.readouterr()
    assert main([str(unfinished), str(released), "--recipe", recipe]) == 2
    said = capsys.readouterr().err
    assert said.startswith("perceptio: ") and "results.json" in said and said.count("\n") == 1
    assert {path.name: path.read_bytes() for path in released.iterdir()} == before
