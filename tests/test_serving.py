"""`perceptio serve` in a process of its own, asked over HTTP by OpenAI's client."""

import base64
import json
import os
import re
import subprocess
import sys
import urllib.request
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from perceptio import PerceptioForConditionalGeneration, PerceptioPipeline, PerceptioProcessor
from perceptio.cli import main

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason='needs the extra "serve"')
from openai import APIStatusError, OpenAI  # noqa: E402

QUESTION = "Where is the red disc?"


@pytest.fixture(scope="module")
def address(tiny_folder):
    command = [
        sys.executable,
        "-m",
        "perceptio",
        "serve",
        "--model",
        str(tiny_folder()),
        "--name",
        "tiny",
        "--port",
        "0",
    ]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = next((match for line in server.stderr if (match := re.search(r"http://\S+", line))), None)
    assert found, "the server ended before it listened"
    yield found[0]
    server.terminate()
    server.communicate()


@pytest.fixture(scope="module")
def client(address):
    return OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def processor(tiny_folder):
    return PerceptioProcessor.from_pretrained(tiny_folder())


@pytest.fixture
def asked(picture, processor):
    """A request whose answer is words: random weights write bytes that are no text."""
    file = BytesIO()
    picture.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    letters = [processor.tokenizer.encode(letter, add_special_tokens=False) for letter in "ab"]
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 24,
        "logit_bias": {str(found[0]): 50 for found in letters},
    }


def opened(url: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"), validate=True)))


def test_the_answer_brings_the_masks_and_the_depth_of_the_pipeline(client, asked, picture, tiny_folder, processor):
    answer = client.chat.completions.create(**asked)
    seen = answer.choices[0].message.perception
    model = PerceptioForConditionalGeneration.from_pretrained(tiny_folder())
    pipe = PerceptioPipeline(model=model, processor=processor)
    bias = {(int(token),): float(value) for token, value in asked["logit_bias"].items()}
    expected = pipe(image=picture, text=QUESTION, max_new_tokens=24, generate_kwargs={"sequence_bias": bias})
    assert answer.choices[0].message.content == expected["generated_text"] and set(expected["generated_text"]) <= {
        *"ab"
    }
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 24
    assert seen["depth_codes"] == expected["depth_codes"] and seen["problems"] == []
    depth = np.asarray(opened(seen["depth"])) / 65535
    assert depth.shape == (64, 96) and np.abs(depth - expected["predicted_depth"].numpy()).max() < 1e-4
    assert len(seen["masks"]) == len(expected["masks"]) == 1
    mask, shown = seen["masks"][0], expected["masks"][0]
    assert mask["area"] == shown["area"] and mask["object_score"] == pytest.approx(shown["object_score"], abs=1e-5)
    assert mask["score"] == pytest.approx(shown["score"], abs=1e-5)
    assert (mask["mask"] is None) == (shown["mask"] is None)
    if shown["mask"] is not None:
        assert np.array_equal(np.asarray(opened(mask["mask"])), np.asarray(shown["mask"]) > 0)


def test_a_stream_is_the_same_answer_in_pieces_and_ends_with_what_was_seen(client, asked):
    whole = client.chat.completions.create(**asked).choices[0].message
    pieces = list(client.chat.completions.create(**asked, stream=True))
    words = [piece.choices[0].delta.content for piece in pieces if piece.choices[0].delta.content]
    assert len(words) > 3 and "".join(words) == whole.content
    assert pieces[-1].choices[0].delta.perception == whole.perception
    assert not any(hasattr(piece.choices[0].delta, "perception") for piece in pieces[:-1])
    assert pieces[-1].choices[0].finish_reason == "length" and pieces[-1].usage.completion_tokens == 24


@pytest.mark.parametrize(
    ("mode", "masks", "depth"), [("seg", 1, False), ("depth", 0, True), ("none", 0, False), ("seg+depth", 1, True)]
)
def test_a_request_says_what_is_seen(client, asked, mode, masks, depth):
    seen = client.chat.completions.create(**asked, extra_body={"perception": mode}).choices[0].message.perception
    assert len(seen["masks"]) == masks and (seen["depth"] is not None) == (seen["depth_codes"] is not None) == depth


def test_a_chat_without_a_picture(client, asked):
    asked["messages"] = [{"role": "user", "content": "Hello [SEG]"}]
    message = client.chat.completions.create(**asked).choices[0].message
    assert message.content and message.perception == {"masks": [], "depth": None, "depth_codes": None, "problems": []}


def test_temperature_samples(client, asked):
    answers = {client.chat.completions.create(**asked, temperature=5.0, seed=seed).choices[0].message.content
               for seed in range(4)}  # fmt: skip
    assert len(answers) > 1


def picture_at(url) -> dict:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


WRONG = {
    "too few tokens": ({"max_tokens": 3}, 400, "`max_tokens`"),
    "too few tokens, streamed": ({"max_tokens": 3, "stream": True}, 400, "`max_tokens`"),
    "no tokens": ({"max_tokens": 0, "extra_body": {"perception": "none"}}, 400, "at least 1"),
    "a bias that is no object": ({"extra_body": {"logit_bias": "a"}}, 400, "`logit_bias`"),
    "another model": ({"model": "large"}, 404, "'large'"),
    "no such mode": ({"extra_body": {"perception": "all"}}, 400, "'all'"),
    "a template": ({"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}}, 400, "chat_template"),
    "an unknown field": ({"extra_body": {"colour": 1}}, 422, "colour"),
    "a file of the server": (picture_at("/etc/hostname"), 400, "/etc/hostname"),
    "a file of the server as a URL": (picture_at("file:///etc/hostname"), 400, "file:///etc/hostname"),
    "an address": (picture_at("http://127.0.0.1/a.png"), 400, "--allow-urls"),
    "no picture": (picture_at("data:image/png;base64,aGVsbG8="), 400, "no picture"),
    "an address that is a number": (picture_at(7), 400, "7"),
    "sound": ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "input_audio"),
    "no messages": ({"messages": []}, 400, "`messages`"),
    "no role": ({"messages": [{"content": "Hello"}]}, 400, "role"),
    "no text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_are_refused_with_a_reason(case, client, asked):
    changes, status, words = WRONG[case]
    with pytest.raises(APIStatusError) as caught:
        client.chat.completions.create(**{**asked, **changes})
    assert caught.value.status_code == status and words in caught.value.body["message"]


def test_a_client_that_leaves_in_the_middle_does_no_harm(client, asked):
    with client.chat.completions.create(**{**asked, "max_tokens": 150}, stream=True) as stream:
        next(iter(stream))
    assert client.chat.completions.create(**asked).choices[0].message.perception["problems"] == []


def test_an_address_is_fetched_only_where_that_is_allowed(address, processor):
    from perceptio.serving import PerceptioChat, Served

    part = {"type": "image", "url": f"{address.removesuffix('/v1')}/health"}
    for allowed, words in ((False, "--allow-urls"), (True, "no picture that can be read")):
        with pytest.raises(ValueError, match=words):
            PerceptioChat(Served(None, processor, "tiny", allow_urls=allowed), None)._with_picture(part)


def test_what_other_clients_ask_first(client, address):
    assert [model.id for model in client.models.list()] == ["tiny"]
    root = address.removesuffix("/v1")
    request = urllib.request.Request(f"{root}/load_model", b'{"model": "tiny"}', {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        assert json.loads(answer.read().decode().removeprefix("data: "))["status"] == "ready"
    with urllib.request.urlopen(f"{root}/health") as answer:
        assert json.loads(answer.read()) == {"status": "ok"}


def test_a_port_that_is_taken_costs_no_waiting(address, capsys):
    port = address.removesuffix("/v1").rpartition(":")[2]
    assert main(["serve", "--model", "no/such/model", "--port", port]) == 2
    printed = capsys.readouterr().err
    assert f"--port {port}" in printed and printed.count("\n") == 1


@pytest.mark.parametrize("port", ["-1", "70000"])
def test_a_port_that_is_none(port, capsys):
    assert main(["serve", "--port", port]) == 2 and f"--port {port}" in capsys.readouterr().err


def test_without_the_extra_it_says_which_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    assert "perceptio[serve]" in capsys.readouterr().err
