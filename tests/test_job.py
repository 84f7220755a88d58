"""A job gives the same bytes whoever does it and whatever is killed on the way."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from shard_samples import folder_of, sample, samples, tiny_vqvae

from perceptio.data import job
from perceptio.data.job import main, run_job
from perceptio.data.label import PROBLEM, Labeller
from perceptio.data.manifest import read_manifest
from perceptio.data.record import DataError
from perceptio.data.shards import read_shards, write_shards

ROWS, SHARDS = 40, 8


@dataclass
class Marker:
    """Writes into each row what it is told, drops every seventh; may take its time, and may kill its process once."""

    text: str = "seen"
    seconds: float = 0.0
    kill_at: str = ""
    once: str = ""  # a file that says that the killing is done

    def __call__(self, batch: dict) -> dict:
        time.sleep(self.seconds)
        if self.kill_at in batch["id"] and not (self.once and Path(self.once).exists()):
            if self.once:
                Path(self.once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        extra = [json.dumps({"mark": self.text, "id": name}) for name in batch["id"]]
        problems = ["unlucky: a seventh" if int(name[-4:]) % 7 == 6 else None for name in batch["id"]]
        return {**batch, "extra": extra, PROBLEM: problems}

    def describe(self) -> dict:
        return {"function": "marker", "text": self.text}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("job") / "in", ROWS, rows_per_shard=ROWS // SHARDS, codes=False)


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    """What one process that nobody disturbs makes of it."""
    out = tmp_path_factory.mktemp("job-expected") / "out"
    run_job(folder, out, Marker(), batch_size=2)
    return files(out)


def files(out: Path) -> dict[str, bytes]:
    """The data set: everything but the notes of the job."""
    found = [path for path in sorted(out.rglob("*")) if path.is_file() and job.NOTES not in path.parts]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


def notes(out: Path) -> list[Path]:
    return sorted((out / job.NOTES).glob("*.parquet.json"))


def test_every_row_is_kept_or_dropped_with_a_reason(folder, expected, tmp_path):
    manifest = run_job(folder, tmp_path, Marker(), batch_size=2)
    tally = manifest["splits"]["train"]["tally"]
    assert (tally["read"], tally["kept"], tally["dropped"]) == (ROWS, 35, {"unlucky": 5})
    assert tally["examples"]["unlucky"][0] == "row-0006: a seventh"
    rows = list(read_shards(tmp_path, verify=True))
    assert len(rows) == 35 and all(json.loads(row["extra"]) == {"mark": "seen", "id": row["id"]} for row in rows)
    assert files(tmp_path) == expected and len(notes(tmp_path)) == SHARDS
    assert manifest["splits"]["train"]["earlier"] == [read_manifest(folder)["splits"]["train"]["tally"]]


def test_a_second_run_does_nothing_and_a_lost_shard_is_done_again(folder, expected, tmp_path):
    run_job(folder, tmp_path, Marker(), batch_size=2)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    run_job(folder, tmp_path, Marker(), batch_size=2)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    first, second, *_ = sorted(times)
    first.unlink()
    second.write_bytes(b"half")
    run_job(folder, tmp_path, Marker(), batch_size=2)
    assert files(tmp_path) == expected


def test_two_processes_of_which_one_is_killed_give_the_same_bytes(folder, expected, tmp_path):
    killer = Marker(kill_at="row-0013", once=str(tmp_path / "killed"))
    run_job(folder, tmp_path / "out", killer, workers=2, batch_size=2)
    assert (tmp_path / "killed").exists() and files(tmp_path / "out") == expected


def test_two_workers_of_ray_of_which_one_is_killed_give_the_same_bytes(folder, expected, tmp_path):
    """About 20 s: Ray starts, and its workers import torch, one of them twice."""
    pytest.importorskip("ray", reason="Ray is not installed: the extra `label`")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from ray import cloudpickle; import test_job; cloudpickle.register_pickle_by_value(test_job)\n"
        "from perceptio.data.job import run_job\n"
        "killer = test_job.Marker(kill_at='row-0013', once=sys.argv[4])\n"
        "run_job(sys.argv[2], sys.argv[3], killer, engine='ray', workers=2, batch_size=2)\n"
    )
    paths = [Path(__file__).parent, folder, tmp_path / "out", tmp_path / "killed"]
    run = subprocess.run([sys.executable, "-c", script, *map(str, paths)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path / "killed").exists() and files(tmp_path / "out") == expected


def killed_after(seconds: float, folder: Path, out: Path) -> bool:
    """Run the job in a process of its own and kill that; whether it was still at work."""
    process = multiprocessing.get_context("fork").Process(
        target=run_job, args=(folder, out, Marker(seconds=0.02)), kwargs={"batch_size": 2}
    )
    process.start()
    process.join(seconds)
    running = process.is_alive()
    process.kill()
    process.join()
    return running


def test_a_job_that_is_killed_again_and_again_ends_with_the_same_bytes(folder, expected, tmp_path):
    out = tmp_path / "out"
    killed = [killed_after(0.03 + 0.05 * attempt, folder, out) for attempt in range(6)]
    assert sum(killed) >= 3 and not (out / "manifest.json").exists() or len(notes(out)) == SHARDS
    for note in notes(out):  # what is noted is whole
        entry = json.loads(note.read_text())["total"]["shards"][0]
        assert (out / entry["file"]).stat().st_size == entry["bytes"]
    run_job(folder, out, Marker(), batch_size=2)
    assert files(out) == expected


def test_a_damaged_shard_is_named_and_the_others_are_done(tmp_path, expected):
    folder = folder_of(tmp_path / "in", ROWS, rows_per_shard=ROWS // SHARDS, codes=False)
    path = folder / "data/train-00002-of-00008.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"?")
    with pytest.raises(DataError, match=r"1 of 8 shards.*\n.*train-00002-of-00008\.parquet.*SHA-256"):
        run_job(folder, tmp_path / "out", Marker(), batch_size=2)
    assert len(notes(tmp_path / "out")) == SHARDS - 1 and not (tmp_path / "out/manifest.json").exists()
    path.write_bytes(whole)
    run_job(folder, tmp_path / "out", Marker(), batch_size=2)
    assert files(tmp_path / "out") == expected


@pytest.mark.slow
def test_a_shard_that_kills_every_worker_is_given_up_and_named(folder, tmp_path, monkeypatch):
    """About a minute: every pool of workers imports torch anew."""
    (tmp_path / "out" / job.NOTES).mkdir(parents=True)
    with pytest.raises(DataError, match=r"1 of 8 shards.*\n.*train-00002-of-00008.parquet: \d+ workers died of it"):
        run_job(folder, tmp_path / "out", Marker(kill_at="row-0013"), workers=2, batch_size=2)
    assert len(notes(tmp_path / "out")) == SHARDS - 1


class FromNowhere(Marker):
    """Of a module that a fresh process has not."""

    __module__ = "module_of_nobody"


@pytest.mark.slow
def test_workers_that_never_start_end_the_job(folder, tmp_path, monkeypatch):
    """About 15 s: two pools of workers import torch, and then cannot find the function."""
    nobody = types.ModuleType("module_of_nobody")
    nobody.FromNowhere = FromNowhere
    monkeypatch.setitem(sys.modules, "module_of_nobody", nobody)
    with pytest.raises(RuntimeError, match="died before they began a shard"):
        run_job(folder, tmp_path, FromNowhere(), workers=2)


def loses(batch: dict) -> dict:
    return {name: values[1:] for name, values in {**batch, PROBLEM: [None] * len(batch["id"])}.items()}


def test_a_function_that_loses_rows_is_a_mistake(folder, tmp_path):
    with pytest.raises(RuntimeError, match="4 rows for 5.*expected the same rows"):
        run_job(folder, tmp_path, loses)
    assert not list(tmp_path.rglob("*.incomplete"))


def test_one_folder_holds_one_job(folder, tmp_path):
    run_job(folder, tmp_path / "out", Marker())
    with pytest.raises(DataError, match="another job .text 'seen'., expected 'new'"):
        run_job(folder, tmp_path / "out", Marker("new"))
    with pytest.raises(DataError, match="both input and output"):
        run_job(folder, folder, Marker())
    folder_of(tmp_path / "other", 2)
    with pytest.raises(DataError, match="data set that no job wrote"):
        run_job(folder, tmp_path / "other", Marker())
    with pytest.raises(ValueError, match="'threads'"):
        run_job(folder, tmp_path / "x", Marker(), engine="threads")


def test_two_jobs_do_not_write_to_one_folder(folder, tmp_path):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=run_job, args=(folder, tmp_path, Marker(seconds=0.2)), kwargs={"batch_size": 2})
    process.start()
    try:
        while not (tmp_path / job.NOTES / "job.json").exists():
            time.sleep(0.01)
        with pytest.raises(DataError, match="another job is writing"):
            run_job(folder, tmp_path, Marker(), batch_size=2)
    finally:
        process.kill()
        process.join()
    run_job(folder, tmp_path, Marker(), batch_size=2)


def test_a_changed_input_is_done_again(tmp_path):
    folder_of(tmp_path / "in", 10, codes=False)
    run_job(tmp_path / "in", tmp_path / "out", Marker())
    write_shards(samples(4, codes=False), tmp_path / "in", overwrite=True)
    assert run_job(tmp_path / "in", tmp_path / "out", Marker())["splits"]["train"]["tally"]["read"] == 4


def test_no_rows_and_shards_of_which_nothing_is_left(tmp_path):
    write_shards([], tmp_path / "none")
    assert run_job(tmp_path / "none", tmp_path / "out", Marker())["splits"]["train"]["rows"] == 0
    write_shards([sample(6), sample(13)], tmp_path / "unlucky", rows_per_shard=1)
    manifest = run_job(tmp_path / "unlucky", tmp_path / "out2", Marker())
    assert manifest["splits"]["train"]["tally"]["dropped"] == {"unlucky": 2} and not list(
        read_shards(tmp_path / "out2")
    )


def test_the_command_labels_and_says_what_it_did(tmp_path, capsys):
    rows = [*samples(5, codes=False), sample(5, codes=False, mapped=False)]
    write_shards(rows, tmp_path / "in", rows_per_shard=2)
    tiny_vqvae().save_pretrained(tmp_path / "vqvae")
    options = ["--in", tmp_path / "in", "--out", tmp_path / "out", "--vqvae", tmp_path / "vqvae"]
    assert main([str(option) for option in options]) == 0
    assert "train: 5 of 6 kept; dropped: 1 no depth" in capsys.readouterr().out
    codebook = tiny_vqvae().codebook_hash()
    labelled = list(read_shards(tmp_path / "out", codebook=codebook))
    assert [len(row["depth_codes"]) for row in labelled] == [9] * 5
    assert read_manifest(tmp_path / "out")["job"]["codebook"] == codebook


def test_the_command_ends_with_one_line_on_wrong_input(tmp_path, capsys):
    assert main(["--in", str(tmp_path), "--out", str(tmp_path / "out"), "--vqvae", str(tmp_path)]) == 2
    assert "no manifest.json" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "Run the same command again" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_labelling_by_ray_and_by_one_process_gives_the_same_bytes(tmp_path):
    """About 25 s: as the command, with real models, in fresh processes."""
    pytest.importorskip("ray", reason="Ray is not installed: the extra `label`")
    folder_of(tmp_path / "in", ROWS, rows_per_shard=5, codes=False)
    tiny_vqvae().save_pretrained(tmp_path / "vqvae")
    run_job(tmp_path / "in", tmp_path / "local", Labeller(str(tmp_path / "vqvae")))
    command = [sys.executable, "-m", "perceptio.data.job", "--engine", "ray", "--workers", "2"]
    paths = ["--in", tmp_path / "in", "--out", tmp_path / "ray", "--vqvae", tmp_path / "vqvae"]
    run = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert files(tmp_path / "ray") == files(tmp_path / "local")
