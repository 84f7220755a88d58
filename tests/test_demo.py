"""What the page of the demo shows of a question, without a page."""

import base64
import io
import json
import re
import struct
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import perceptio
from perceptio import load_picture
from perceptio.cli import build_parser, main, open_pipeline
from perceptio.demo import look as looks
from perceptio.demo.look import BROKEN, LONGEST_QUESTION, look

DEMO = Path(perceptio.__file__).parent / "demo"


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    pipe = open_pipeline(build_parser().parse_args(["demo", "--model", str(tiny_folder()), "--device", "cpu"]))
    pipe.model.generation_config.max_new_tokens = 24
    return pipe


@pytest.fixture
def upload(picture, tmp_path):
    picture.save(tmp_path / "discs.png")
    return {"path": str(tmp_path / "discs.png")}


def _bomb() -> bytes:
    """A PNG of 40 KB that says it has a billion pixels."""
    head = struct.pack(">IIBBBBB", 32000, 32000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(2**25))
    chunks = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
    written = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + written


def _animation(kind: str) -> bytes:
    file, frames = io.BytesIO(), [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def _cut() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(file, "PNG")
    return file.getvalue()[:900]


HOSTILE = {
    "bomb.png": (_bomb, "too large|pixels, expected at most"),
    "drawing.svg": (
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "no picture that",
    ),
    "table.csv": (lambda: b"a,b\n1,2\n", "no picture that can be read"),
    "renamed.png": (lambda: b"%PDF-1.7 " + bytes(400), "no picture that can be read"),
    "cut.png": (_cut, "damaged or cut off"),
    "empty.png": (lambda: b"", "is empty"),
    "film.gif": (lambda: _animation("GIF"), "is animated"),
    "film.png": (lambda: _animation("PNG"), "is animated"),
    "film.webp": (lambda: _animation("WEBP"), "is animated"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_upload_is_refused_in_words(pipe, tmp_path, name):
    make, words = HOSTILE[name]
    (tmp_path / name).write_bytes(make())
    states = list(look(pipe, {"path": str(tmp_path / name)}, "What is it?"))
    assert [state["stage"] for state in states] == ["problem"]
    assert re.search(words, states[0]["message"]) and str(tmp_path) not in states[0]["message"]


def test_a_file_that_is_too_large_is_not_even_read(pipe, tmp_path, monkeypatch):
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(100 * 2**20)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("it was read"))
    (state,) = look(pipe, {"path": str(tmp_path / "large.png")}, "What is it?")
    assert state["stage"] == "problem" and "more than 20 MB" in state["message"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"upload": None}, "There is no picture yet"),
        ({"question": "  \n"}, "There is no question yet"),
        ({"question": None}, "There is no question yet"),
        ({"question": "a" * (LONGEST_QUESTION + 1)}, "501 characters, expected at most 500"),
        ({"perception": "everything"}, "What to see is 'everything', expected one of seg"),
    ],
)
def test_what_is_missing_is_said(pipe, upload, changes, words):
    (state,) = look(pipe, **{"upload": upload, "question": "Where?", **changes})
    assert state["stage"] == "problem" and words in state["message"]


def test_a_fault_of_ours_is_said_without_a_traceback(pipe, upload, monkeypatch, caplog):
    monkeypatch.setattr(pipe.model, "decode_depth", lambda codes: 1 / 0)
    states = list(look(pipe, upload, "Where?"))
    assert (states[-1]["stage"], states[-1]["message"]) == ("problem", BROKEN)
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("perception", ["seg+depth", "seg", "depth", "none"])
def test_the_states_end_with_what_the_pipeline_gives(pipe, upload, perception):
    states = list(look(pipe, upload, "Which is closer?", perception))
    expected = pipe(image=load_picture(upload["path"]), text="Which is closer?", perception=perception)
    last = states[-1]
    assert last["stage"] == "done" and last["answer"] == expected["generated_text"]
    assert last["codes"] == (expected["depth_codes"] or [])
    assert ("depth" in last, "values" in last) == ("depth" in perception,) * 2
    assert ("masked" in last) == any(mask["mask"] is not None for mask in expected["masks"] or [])
    json.dumps(states)  # the page gets nothing else


def test_codes_come_one_after_another_before_the_answer_and_none_is_taken_back(pipe, upload, monkeypatch):
    take = looks.TokenStream.take
    monkeypatch.setattr(looks.TokenStream, "take", lambda self: [self.queue.get()])
    states = list(look(pipe, upload, "Which is closer?"))
    monkeypatch.setattr(looks.TokenStream, "take", take)
    codes = [state["codes"] for state in states]
    assert [len(written) for written in codes[:11]] == [0, 0, *range(1, 10)]
    assert all(later[: len(earlier)] == earlier for earlier, later in zip(codes, codes[1:], strict=False))
    assert all(not state["answer"] for state in states if len(state["codes"]) < 9)
    answers = [state["answer"] for state in states if state["stage"] in ("answer", "done")]
    assert len(answers) > 10 and all(answers[-1].startswith(answer) for answer in answers)


def test_the_depth_that_is_read_is_the_depth_of_the_pipeline(pipe, upload):
    *_, last = look(pipe, upload, "Which is closer?")
    depth = pipe(image=load_picture(upload["path"]), text="Which is closer?")["predicted_depth"].numpy()
    values = last["values"]
    read = np.frombuffer(base64.b64decode(values["data"]), np.uint8).reshape(values["height"], values["width"]) / 255
    assert read.shape == depth.shape == (64, 96)
    assert np.abs(read - depth).max() <= 0.5 / 255 + 1e-6


def test_a_large_map_is_read_at_the_same_place():
    ramp = torch.linspace(0, 1, 2000).expand(1000, 2000)
    values = looks.as_values(ramp)
    assert (values["height"], values["width"]) == (160, 320)
    row = np.frombuffer(base64.b64decode(values["data"]), np.uint8)[:320] / 255
    assert np.abs(row - (np.arange(320) + 0.5) / 320).max() < 0.005


def test_an_abandoned_question_stops_the_model(pipe, upload, monkeypatch):
    monkeypatch.setattr(pipe.model.generation_config, "max_new_tokens", 5000)
    before, states = threading.active_count(), look(pipe, upload, "Where?", "none")
    next(states), next(states)
    states.close()  # returns once the thread has ended, which 5000 tokens would keep for much longer than a test lasts
    assert threading.active_count() == before


def test_a_colour_for_every_code(pipe):
    colours = looks.code_colours(pipe.model)
    assert len(colours) == 8 and all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)


def test_what_the_masks_say():
    there = {"mask": Image.new("L", (10, 10)), "area": 25, "score": 0.5, "object_score": 0.9}
    notes = looks.mask_notes([there, {"mask": None, "object_score": 0.1, "score": 0.2, "area": 0}])
    assert notes[0].startswith("Mask 1: 25% of the picture, 90% sure")
    assert notes[1].startswith("Mask 2: none")


def test_the_command_says_what_is_wrong(capsys, tmp_path):
    assert main(["demo", "--port", "99999"]) == 2
    assert "--port is 99999, expected 1 to 65535" in capsys.readouterr().err


def test_without_gradio_the_command_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "perceptio.demo.page", raising=False)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err.endswith('the page needs the extra "demo": pip install "perceptio[demo]"\n')


def test_the_space_has_what_the_hub_asks_for():
    front = (DEMO / "README.md").read_text(encoding="utf-8").split("---")[1]
    facts = dict(line.split(": ", 1) for line in front.strip().splitlines() if ": " in line)
    assert facts["sdk"] == "gradio" and tuple(map(int, facts["sdk_version"].split("."))) >= (6, 30)
    assert (DEMO / facts["app_file"]).is_file() and len(facts["short_description"]) <= 60
    assert (DEMO / "requirements.txt").read_text(encoding="utf-8").split() == ["perceptio[demo]"]
