"""The stages of perceptio-tiny: in order, each once, stopped in time and gone on with."""

import sys
from pathlib import Path

import pytest
import yaml
from trl import TrlParser

from perceptio.cli import build_parser
from perceptio.data.recipe import read_recipe
from perceptio.hub import train_tiny
from perceptio.hub.tiny_data import GIVEN, KINDS, PARTS, part_folder
from perceptio.hub.train_tiny import MORE_TO_DO, Stage, main, stages
from perceptio.teachers.sam import SamTrainingConfig
from perceptio.teachers.vision import VisionTrainingConfig
from perceptio.train_sft import parse

COUNT = "import sys; open(sys.argv[1], 'a').write('x')"
# Counts up to 3, one a start; a SIGTERM ends it as it ends a training.
SLOW = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
path = pathlib.Path(sys.argv[1])
steps = len(path.read_text()) if path.exists() else 0
path.write_text("x" * (steps + 1))
if steps < 2:
    time.sleep(60)
"""


def stage(name: str, script: str, file: Path, size: int = 1) -> Stage:
    def done() -> bool:
        return file.exists() and len(file.read_text()) >= size

    return Stage(name, (sys.executable, "-c", script, str(file)), done)


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch, capfd):
    first, second = (stage(name, COUNT, tmp_path / name) for name in ("first", "second"))
    monkeypatch.setattr(train_tiny, "stages", lambda **_: [first, second])
    (tmp_path / "first").write_text("before")
    assert main([]) == 0 == main([])
    assert (tmp_path / "first").read_text() == "before" and (tmp_path / "second").read_text() == "x"
    assert "== second" in (said := capfd.readouterr().out) and "== first" not in said


def test_a_stage_that_fails_ends_the_run(tmp_path, monkeypatch):
    bad = Stage("bad", (sys.executable, "-c", "import sys; sys.exit(3)"), lambda: False)
    monkeypatch.setattr(train_tiny, "stages", lambda **_: [bad, stage("after", COUNT, tmp_path / "after")])
    assert main([]) == 3 and not (tmp_path / "after").exists()


def test_it_stops_in_time_and_goes_on(tmp_path, monkeypatch):
    slow, after = stage("slow", SLOW, tmp_path / "slow", 3), stage("after", COUNT, tmp_path / "after")
    monkeypatch.setattr(train_tiny, "stages", lambda **_: [slow, after])
    monkeypatch.setattr(train_tiny, "PATIENCE", 10)
    for count in (1, 2):
        assert main(["--minutes", str((5 + 4) / 60)]) == MORE_TO_DO
        assert len((tmp_path / "slow").read_text()) == count and not (tmp_path / "after").exists()
    assert main(["--minutes", "1"]) == 0
    assert (tmp_path / "after").read_text() == "x"


def test_every_stage_is_a_command_that_there_is(request, monkeypatch):
    """Each one's own parser takes its words, and what one stage leaves is what a later one reads."""
    root = request.config.rootpath
    monkeypatch.chdir(root)
    left_before: set[str] = set()
    for entry in stages():
        words = list(entry.words[1:])
        if words[:2] == ["-m", "perceptio"]:
            build_parser().parse_args(words[2:])
        elif entry.name.startswith(("segmenter", "vision tower")):
            module = next(word for word in words if word.startswith("perceptio.teachers"))
            kind = SamTrainingConfig if module.endswith("sam") else VisionTrainingConfig
            (config,) = TrlParser((kind,)).parse_args_and_config(words[words.index(module) + 1 :])
            assert Path(config.output_dir, "model", "evaluation.json") in reads(entry)
            before = [config.start and Path(config.start), config.scenes_folder and Path(config.scenes_folder).parent]
            assert {str(path) for path in filter(None, before)} <= left_before
            left_before |= {config.output_dir, str(Path(config.output_dir, "model"))}
    tuned = yaml.safe_load((root / "recipes" / "perceptio-tiny.yaml").read_text())
    recipe = read_recipe(root / tuned["data"])
    assert tuned["model"] == str(train_tiny.OUT / "base") and tuned["output_dir"] == str(train_tiny.OUT / "run")
    learned = next(entry for entry in stages() if entry.name == "scenes to learn from")
    made = {Path(learned.words[-1]) / "*" / kind for kind in (*KINDS, "things", *GIVEN)}
    assert {Path(recipe.root) / source.path for source in recipe.sources} == made


def test_one_that_was_trained_before_is_gone_on_with(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    whole, shorter = stages(), stages(start=Path("checkpoints/some"))
    tuned = next(entry for entry in shorter if entry.name == "fine-tuning")
    names = [entry.name for entry in shorter]
    assert names == [entry.name for entry in whole][5:] and "base" not in names
    run, _ = parse(list(tuned.words[tuned.words.index("train_sft.py") + 1 :]))
    assert run.model == "checkpoints/some" and run.resume
    more = next(entry for entry in stages(more=["--samples", "32"]) if entry.name == "fine-tuning")
    assert parse(list(more.words[more.words.index("train_sft.py") + 1 :]))[0].samples == 32 != run.samples
    assert [entry.words for entry in shorter if entry is not tuned] == [
        entry.words for entry in whole[5:] if entry.name != "fine-tuning"
    ]


@pytest.mark.parametrize("cores", [1, 2, 3, 6, 64])
def test_a_step_is_the_recipes_on_any_number_of_cores(cores, request, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    words = [str(word) for word in train_tiny.fine_tuning()]
    shares = ("--nproc_per_node", "--per_device_train_batch_size", "--gradient_accumulation_steps")
    processes, records, parts = (int(words[words.index(name) + 1]) for name in shares)
    tuned = yaml.safe_load((request.config.rootpath / "recipes" / "perceptio-tiny.yaml").read_text())
    assert processes * records * parts == tuned["per_device_train_batch_size"] and processes <= cores
    for which in (("sam",), ("vision",), ("vision", "-large")):
        words_of = [str(word) for word in train_tiny.teacher(*which)]
        many, each = (int(words_of[words_of.index(field) + 1]) for field in (shares[0], shares[2]))
        recipe = yaml.safe_load((request.config.rootpath / words_of[words_of.index("--config") + 1]).read_text())
        assert many * each == recipe["gradient_accumulation_steps"] and many <= cores
    _, config = parse([*words[words.index("train_sft.py") + 1 :], "--model", "m", "--data", "d", "--full", "true"])
    assert config.compiled and config.pad_to_multiple_of == 32


def test_an_accelerator_takes_large_steps_of_records_that_other_cores_load(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    words = [str(word) for word in train_tiny.fine_tuning()]
    _, config = parse([*words[1:], "--model", "m", "--data", "d", "--full", "true", "--use_cpu", "true"])
    assert config.per_device_train_batch_size > 16 and config.dataloader_num_workers == 12


def test_scenes_are_there_when_all_parts_are(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tiny, "OUT", tmp_path)
    learned = next(entry for entry in stages() if entry.name == "scenes to learn from")
    for number in reversed(range(PARTS)):
        assert not learned.done()
        part_folder(tmp_path / "parts", number).mkdir(parents=True)
    assert learned.done()


def test_options_of_the_fine_tuning_are_handed_on(monkeypatch):
    seen = {}
    monkeypatch.setattr(train_tiny, "stages", lambda **options: seen.update(options) or [])
    assert main(["--frozen", "--", "--samples", "32"]) == 0 and seen["more"] == ["--samples", "32"] and seen["frozen"]


def reads(entry: Stage) -> list[Path]:
    """The file that a stage which leaves one behind looks for."""
    return [entry.done.__self__] if hasattr(entry.done, "__self__") else []


def test_its_arguments_are_told(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--minutes" in capsys.readouterr().out
