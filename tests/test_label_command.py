"""`perceptio label`: what comes out for a folder of pictures, and that nothing that happens to it loses work."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import OpenEXR
import pytest
import torch
from PIL import Image
from shard_samples import folder_of, tiny_vqvae
from teacher_samples import write_teacher

from perceptio.cli import main
from perceptio.data.depths import Scale, decode_depth, normalise
from perceptio.data.label import load_vqvae
from perceptio.data.own import RowReader
from perceptio.data.record import DataError
from perceptio.data.shards import read_shards
from perceptio.vqvae.export import export
from perceptio.vqvae.label import find_pictures
from perceptio.vqvae.maps import MapSet, write_maps
from perceptio.vqvae.teacher import ask, full_name, licence_of


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A teacher with Depth Anything's layout and a depth tokenizer, both with random weights."""
    folder = tmp_path_factory.mktemp("parts")
    write_teacher(folder / "teacher")
    tiny_vqvae().save_pretrained(folder / "vqvae")
    tiny_vqvae(1).save_pretrained(folder / "other-vqvae")
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    for number in range(10):
        path = folder / ("deep" if number % 2 else ".") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path)
    return folder


def command(parts: Path, photos: Path, out: Path, *more: str) -> list[str]:
    names = ["--teacher", str(parts / "teacher"), "--vqvae", str(parts / "vqvae"), "--batch-size", "3"]
    return ["label", "--images", str(photos), "--out", str(out), *names, *more]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_picture_gets_depth_codes_and_its_scale(parts, photos, tmp_path):
    out = tmp_path / "out"
    assert main(command(parts, photos, out)) == 0
    rows, vqvae = lines(out / "metadata.jsonl"), load_vqvae(parts / "vqvae")
    assert [row["image"] for row in rows] == sorted(str(path.relative_to(photos)) for path in photos.rglob("*.jpg"))
    for row in rows:
        depth = decode_depth((out / row["depth"]).read_bytes())
        assert depth.shape == (30, 40) and depth.min() == 0 and depth.max() == 1
        assert row["depth_codes"] == vqvae.encode(torch.from_numpy(depth)[None]).flatten().tolist()
        assert row["depth_codebook"] == vqvae.codebook_hash() and row["depth_low"] < row["depth_high"]
    note = json.loads((out / "labels.json").read_text())
    assert note["pictures"] == 10 and note["left_out"] == {} and note["codebook"] == vqvae.codebook_hash()


def test_its_output_is_what_a_tokenizer_is_trained_on(parts, photos, tmp_path):
    assert main(command(parts, photos, tmp_path / "out")) == 0
    write_maps(tmp_path / "maps", tmp_path / "out", split="all", side=24)
    maps = MapSet(tmp_path / "maps")
    assert len(maps) == 10 and maps.facts["teacher"] == "teacher"
    facts = {"maps": 10, "source": "out", "steps": 1, "teacher": "base", "teacher_licence": licence_of("base")}
    export(tiny_vqvae(), tmp_path / "frozen", training=facts)
    card = (tmp_path / "frozen" / "README.md").read_text()
    assert "the depth was seen by `base`; the licence of its weights is CC-BY-NC-4.0" in card


def test_depth_first_and_codes_of_ones_own_tokenizer_later(parts, photos, tmp_path):
    seen, labels = tmp_path / "seen", tmp_path / "labels"
    assert main(command(parts, photos, seen, "--vqvae", "none")) == 0
    assert all("depth_codes" not in row for row in lines(seen / "metadata.jsonl"))
    assert json.loads((seen / "labels.json").read_text())["codebook"] is None
    assert main(command(parts, photos, labels, "--teacher", "none", "--depth", str(seen / "depth"))) == 0
    assert main(command(parts, photos, tmp_path / "at-once")) == 0
    assert (labels / "metadata.jsonl").read_bytes() == (tmp_path / "at-once" / "metadata.jsonl").read_bytes()


def test_bad_pictures_are_listed_and_left_out(parts, photos, tmp_path, capsys):
    whole = (photos / "0.jpg").read_bytes()
    (photos / "2.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "4.jpg").write_text("no picture at all")
    out = tmp_path / "out"
    assert main(command(parts, photos, out)) == 1
    problems = lines(out / "problems.jsonl")
    assert [problem["image"] for problem in problems] == ["2.jpg", "4.jpg"]
    assert all(problem["problem"].startswith("damaged picture: ") for problem in problems)
    assert len(lines(out / "metadata.jsonl")) == 8
    assert json.loads((out / "labels.json").read_text())["left_out"] == {"damaged picture": 2}
    assert "8 pictures labelled, 2 left out" in capsys.readouterr().out


def test_a_picture_that_was_put_right_is_labelled_by_the_next_run(parts, photos, tmp_path):
    out = tmp_path / "out"
    good = (photos / "4.jpg").read_bytes()
    (photos / "4.jpg").write_text("no picture at all")
    assert main(command(parts, photos, out)) == 1
    assert main(command(parts, photos, out)) == 1 and len(lines(out / "problems.jsonl")) == 1
    (photos / "4.jpg").write_bytes(good)
    other = (out / "depth" / "0.jpg.png").stat().st_mtime_ns
    assert main(command(parts, photos, out)) == 0
    assert [row["image"] for row in lines(out / "metadata.jsonl")] == list(find_pictures(photos, out))
    assert lines(out / "problems.jsonl") == [] and json.loads((out / "labels.json").read_text())["pictures"] == 10
    assert (out / "depth" / "0.jpg.png").stat().st_mtime_ns == other, "the others are not done again"


def test_a_depth_map_that_is_gone_is_made_again(parts, photos, tmp_path):
    out = tmp_path / "out"
    assert main(command(parts, photos, out)) == 0
    before = files_of(out)
    (out / "depth" / "6.jpg.png").unlink()
    assert main(command(parts, photos, out)) == 0
    assert files_of(out) == before


def test_names_that_are_no_plain_text(parts, photos, tmp_path):
    """Lines were split at every character that Unicode calls a line end, and such a picture was never done."""
    strange = ["a\u2028b.jpg", "c\x85d.jpg", "\udcff.jpg", 'quote".jpg']
    for name in strange:
        (photos / name).write_bytes((photos / "0.jpg").read_bytes())
    out = tmp_path / "out"
    assert main(command(parts, photos, out)) == 0
    before = files_of(out)
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert len(rows) == 14 and set(strange) < {row["image"] for row in rows}
    assert main(command(parts, photos, out)) == 0 and files_of(out) == before


def test_what_a_person_wrote_is_not_written_over(parts, photos, capsys):
    """The rows of a data set were taken for those of an earlier run, and lost."""
    own = '{"image": "0.jpg", "question": "Where?", "answer": "There."}\n'
    (photos / "metadata.jsonl").write_text(own)
    assert main(command(parts, photos, photos)) == 2
    assert "has a metadata.jsonl that this command did not write" in capsys.readouterr().err
    assert (photos / "metadata.jsonl").read_text() == own


def test_labels_beside_the_pictures_are_no_pictures(parts, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command(parts, Path("photos"), photos)) == 0
    before = files_of(photos)
    assert main(command(parts, Path("photos"), photos)) == 0
    assert files_of(photos) == before and len(lines(photos / "metadata.jsonl")) == 10


def test_a_data_set_can_name_the_labels(parts, photos, tmp_path):
    """The stored map is inverse depth, also where metres were measured: a data set must not turn it round again."""
    depth_of_ones_own(photos, tmp_path, "npy")
    more = ["--teacher", "none", "--depth", str(tmp_path / "lidar"), "--depth-kind", "metres"]
    assert main(command(parts, photos, photos, *more)) == 0
    reader = RowReader(photos, "metadata.jsonl", columns={"question": "question"})
    for number, row in enumerate(lines(photos / "metadata.jsonl")):
        record, problems, _ = reader.read(number, {**row, "question": "Where?", "answer": "There."})
        assert problems == []
        stored = decode_depth((photos / row["depth"]).read_bytes())
        assert np.abs(decode_depth(record["depth"]["bytes"]) - stored).max() < 0.05


def files_of(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(parts, photos, tmp_path):
    (photos / "3.jpg").write_text("no picture at all")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(command(parts, photos, whole)) == 1
    slow = (
        "import sys, time; from perceptio.vqvae import label; old = label._append\n"
        "label._append = lambda *a: (old(*a), time.sleep(0.3))\n"
        "from perceptio.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *command(parts, photos, broken)], stderr=subprocess.DEVNULL
    )
    while not (broken / "metadata.jsonl").is_file() or (broken / "metadata.jsonl").read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "labels.json").exists()
    with open(broken / "metadata.jsonl", "a") as file:
        file.write('{"image": "9.jpg", "dep')  # a torn line
    done = (broken / "depth" / "0.jpg.png").stat().st_mtime_ns
    assert main(command(parts, photos, broken)) == 1
    assert files_of(broken) == files_of(whole)
    assert (broken / "depth" / "0.jpg.png").stat().st_mtime_ns == done, "what is done is not done again"


def test_a_folder_that_something_else_labelled_is_refused(parts, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(parts, photos, out)) == 0
    before = files_of(out)
    for more, field in (("--vqvae", "codebook"), ("--teacher", "teacher")):
        name = str(parts / "other-vqvae") if more == "--vqvae" else "small"
        arguments = command(parts, photos, out, more, name)
        if more == "--teacher":
            arguments += ["--teacher", "none", "--depth", str(out)]
        assert main(arguments) == 2
        assert f"was labelled with another `{field}`" in capsys.readouterr().err
    assert files_of(out) == before


def test_two_at_a_time_are_refused(parts, photos, tmp_path, capsys):
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".labels.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(command(parts, photos, out)) == 2
    assert "another run is labelling into" in capsys.readouterr().err


def scene_in_metres(number: int) -> np.ndarray:
    y, x = np.mgrid[:30, :40]
    return (2 + 0.1 * x + 0.05 * y + number).astype(np.float32)


FORMS = ("npy", "tiff", "exr", "png")


def write_form(path: Path, metres: np.ndarray, form: str) -> None:
    if form == "npy":
        np.save(path.with_suffix(".npy"), metres)
    elif form == "tiff":
        Image.fromarray(metres).save(path.with_suffix(".tiff"))
    elif form == "exr":
        header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
        OpenEXR.File(header, {"Z": metres}).write(str(path.with_suffix(".exr")))
    else:
        Image.fromarray((metres * 1000).round().astype(np.uint16)).save(path.with_suffix(".png"))


def depth_of_ones_own(photos: Path, tmp_path: Path, form: str) -> None:
    for number, name in enumerate(find_pictures(photos, tmp_path / "out")):
        path = tmp_path / "lidar" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_form(path, scene_in_metres(number), form)


@pytest.mark.parametrize("form", FORMS)
def test_depth_of_ones_own_in_every_form(parts, photos, tmp_path, form):
    depth_of_ones_own(photos, tmp_path, form)
    unit = ["--depth-unit", "0.001"] if form == "png" else []
    more = ["--teacher", "none", "--depth", str(tmp_path / "lidar"), "--depth-kind", "metres", *unit]
    assert main(command(parts, photos, tmp_path / "out", *more)) == 0
    for number, row in enumerate(lines(tmp_path / "out" / "metadata.jsonl")):
        stored = decode_depth((tmp_path / "out" / row["depth"]).read_bytes())
        assert np.abs(stored - normalise(scene_in_metres(number), "metres")).max() < 1e-3
        assert row["depth_scale_kind"] == "metres"
        inner = (stored > 0.001) & (stored < 0.999)
        metres = Scale(row["depth_low"], row["depth_high"], "metres").undo(stored)
        assert np.abs(metres - scene_in_metres(number))[inner].max() < 0.02, "the scale gives the metres back"


def test_depth_that_is_missing_or_of_another_shape_is_listed(parts, photos, tmp_path):
    names = list(find_pictures(photos, tmp_path / "out"))
    for name in names[1:]:
        path = tmp_path / "lidar" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_form(path, scene_in_metres(0) if name != names[1] else scene_in_metres(0).T.copy(), "npy")
    more = ["--teacher", "none", "--depth", str(tmp_path / "lidar"), "--depth-kind", "metres"]
    assert main(command(parts, photos, tmp_path / "out", *more)) == 1
    found = {line["image"]: line["problem"] for line in lines(tmp_path / "out" / "problems.jsonl")}
    assert set(found) == set(names[:2])
    assert "no depth" in found[names[0]] and "expected the same shape" in found[names[1]]


def test_shards_go_through_the_job(parts, tmp_path):
    shards = folder_of(tmp_path / "shards", 6, codes=False)
    out = tmp_path / "out"
    arguments = ["label", "--images", str(shards), "--out", str(out), "--vqvae", str(parts / "vqvae")]
    assert main([*arguments, "--teacher", str(parts / "teacher")]) == 0
    rows = list(read_shards(out))
    own, other = (load_vqvae(parts / name).config.codebook_hash for name in ("vqvae", "other-vqvae"))
    assert len(rows) == 6 and {row["depth_codebook"] for row in rows if row["depth_codes"]} == {own}
    assert json.loads((out / "manifest.json").read_text())["codebook"] == own
    assert len(list(read_shards(out, codebook=own))) == 6
    with pytest.raises(DataError, match=f"belong to the codebook {own}, expected {other}"):
        next(read_shards(out, codebook=other))


def test_shards_take_no_depth_from_elsewhere(parts, tmp_path, capsys):
    shards = folder_of(tmp_path / "shards", 2, codes=False)
    assert main(command(parts, shards, tmp_path / "out", "--teacher", "none", "--depth", str(tmp_path))) == 2
    assert "but shards hold their depth themselves" in capsys.readouterr().err


WRONG = {
    "no folder": (["--images", "/nowhere"], "`--images` is /nowhere"),
    "no tokenizer": (["--vqvae", "/nowhere"], "`--vqvae` is /nowhere"),
    "no teacher": (["--teacher", "/nowhere/teacher"], "the teacher '/nowhere/teacher' cannot be loaded"),
    "depth beside a teacher": (["--depth", "/tmp"], "`--depth` and `--teacher none` belong together"),
    "no device": (["--device", "abacus"], "--device abacus cannot be used here"),
    "no batch": (["--batch-size", "0"], "`--batch-size` is 0"),
    "no unit": (["--teacher", "none", "--depth", ".", "--depth-unit", "nan"], "`--depth-unit` is nan"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_one_line(name, parts, photos, tmp_path, capsys):
    more, message = WRONG[name]
    assert main(command(parts, photos, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_says_what_it_looked_for(parts, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    assert main(command(parts, tmp_path / "photos", tmp_path / "out")) == 2
    assert "holds no picture (.bmp, .gif, .jpeg" in capsys.readouterr().err


def test_names_and_licences_of_the_known_teachers():
    assert full_name("small") == "depth-anything/Depth-Anything-V2-Small-hf" and licence_of("small") == "Apache-2.0"
    assert licence_of("depth-anything/Depth-Anything-V2-Large-hf") == "CC-BY-NC-4.0" and licence_of("mine/own") is None


def test_a_batch_that_does_not_fit_is_halved():
    sizes = []

    def hungry(pictures):
        sizes.append(len(pictures))
        if len(pictures) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [np.ones((2, 2))] * len(pictures)

    assert len(ask(hungry, [None] * 8)) == 8 and sizes == [8, 4, 2, 2, 4, 2, 2]
