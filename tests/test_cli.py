"""The command line: answers, a picture worth looking at, and one line for wrong input."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from perceptio.cli import UNTRAINED, main
from perceptio.hub.manifest import write_manifest


@pytest.fixture
def photo(picture, tmp_path):
    path = tmp_path / "photo.png"
    picture.save(path)
    return path


def test_see_prints_the_answer_and_writes_the_picture(tiny_folder, photo, tmp_path, capsys):
    out = tmp_path / "result.png"
    code = main(["see", str(photo), "Which is closer?", "--model", str(tiny_folder()), "--out", str(out),
                 "--max-new-tokens", "16"])  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0 and UNTRAINED in printed and "object score" in printed
    drawn = Image.open(out)
    assert drawn.width > 600 and len(np.unique(np.asarray(drawn).reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize(("mode", "masks", "codes"), [("none", 0, None), ("seg", 1, None), ("depth", 0, 9)])
def test_see_as_json_holds_what_was_asked_for(tiny_folder, photo, capsys, mode, masks, codes):
    code = main(["see", str(photo), "What?", "--model", str(tiny_folder()), "--perception", mode, "--json",
                 "--max-new-tokens", "16"])  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    assert code == 0 and result["untrained"] is True and len(result["masks"]) >= masks
    assert (len(result["masks"]) > 0) == (masks > 0)
    assert (result["depth_codes"] and len(result["depth_codes"])) == codes


WRONG = {
    "no such picture": (["see", "missing.png", "What?"], "missing.png"),
    "no picture at all": (["see", "{text}", "What?"], "notes.jpg"),
    "no such model": (["see", "{photo}", "What?", "--model", "nowhere/at/all"], "nowhere"),
    "an ending that is no picture": (["see", "{photo}", "What?", "--out", "result.xyz"], "result.xyz"),
    "a folder that is not there": (["see", "{photo}", "What?", "--out", "no/where/result.png"], "no/where"),
    "too few tokens": (["see", "{photo}", "What?", "--model", "{model}", "--max-new-tokens", "3"], "max_new_tokens"),
    "a device that is not there": (["see", "{photo}", "What?", "--model", "{model}", "--device", "abacus"], "abacus"),
    "nothing to verify": (["doctor", "--verify", "no/where"], "no/where"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(case, tiny_folder, photo, tmp_path, capsys):
    text = tmp_path / "notes.jpg"
    text.write_text("not a picture")
    arguments, message = WRONG[case]
    values = {"photo": photo, "text": text, "model": tiny_folder()}
    code = main([argument.format(**values) for argument in arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("perceptio:")]
    assert code == 2 and len(lines) == 1 and message in lines[0]


def test_a_package_without_its_model_says_so(photo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("perceptio.DEFAULT_MODEL", tmp_path / "gone")
    assert main(["see", str(photo), "What?"]) == 2
    assert f"not in {tmp_path / 'gone'}: install it again" in capsys.readouterr().err
    assert main(["doctor"]) == 0
    assert f"missing from {tmp_path / 'gone'}" in capsys.readouterr().out


def test_an_unknown_option_ends_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["see", "a.png", "What?", "--colour"])
    assert stopped.value.code == 2 and "--colour" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["see"], ["doctor"], ["assemble"]])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0 and "xample" in capsys.readouterr().out


def test_doctor_reports_versions_and_backends(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in ("transformers", "torch", "pictures", "attention", "device"):
        assert any(line.startswith(name) and len(line.split()) > 1 for line in printed.splitlines())


def test_doctor_finds_a_flipped_bit_and_a_pickle(tiny_folder, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(tiny_folder(), tmp_path / "model")
    assert main(["doctor", "--verify", str(folder)]) == 0
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 4
    weights.write_bytes(data)
    (folder / "extra.pt").write_bytes(b"\x80\x04.")
    assert main(["doctor", "--verify", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed and "extra.pt" in printed
    (folder / "extra.pt").unlink()
    write_manifest(folder)
    assert main(["doctor", "--verify", str(folder)]) == 0


@pytest.mark.parametrize(
    "surroundings",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "tr_TR.UTF-8", "TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "7"},
    ],
)
def test_locale_and_surroundings_do_not_matter(surroundings, tiny_folder, photo, tmp_path):
    """Read-only home, another encoding: the answer of a random model holds every kind of letter."""
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    command = ["see", str(photo), "Çok yakın?", "--model", str(tiny_folder()), "--max-new-tokens", "20"]
    run = subprocess.run(
        [sys.executable, "-m", "perceptio", *command], capture_output=True,
        env={**os.environ, **surroundings, "HOME": str(home), "HF_HOME": str(home / "hf")},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr.decode(errors="replace")
    assert UNTRAINED.encode() in run.stdout


def test_the_module_is_the_command():
    run = subprocess.run([sys.executable, "-m", "perceptio", "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "perceptio see photo.jpg" in run.stdout
