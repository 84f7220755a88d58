"""Perceptio as a model of lmms-eval."""

import configparser
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

SETUP = Path(__file__).parent.parent / "setup.cfg"


def test_the_entry_point_names_a_function_that_is_there():
    """Without lmms-eval too: it is never imported by the package itself."""
    setup = configparser.ConfigParser()
    setup.read(SETUP, encoding="utf-8")
    name, _, place = setup["options.entry_points"]["lmms_eval.models"].strip().partition(" = ")
    module, _, function = place.partition(":")
    assert (name, module) == ("perceptio", "perceptio.evaluation.lmms")
    source = SETUP.parent.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text("utf-8")
    assert f"\ndef {function}():" in source


@pytest.fixture(scope="module")
def lmms():
    reason = "lmms-eval is not installed; it brings a torch of its own, so that it is no extra of this package"
    pytest.importorskip("lmms_eval.models.registry_v2", reason=reason, exc_type=ImportError)
    from perceptio.evaluation import lmms

    return lmms


@pytest.fixture(scope="module")
def model(lmms, tiny_folder):
    return lmms.Perceptio.create_from_arg_string(
        f"pretrained={tiny_folder()}", {"batch_size": 3, "max_batch_size": None, "device": "cpu"}
    )


def chat(*pictures, text: str = "Which cup is closer?") -> list[dict]:
    parts = [{"type": "image", "url": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def request(index: int, **kwargs):
    return SimpleNamespace(args=("ctx", lambda doc: doc, {"max_new_tokens": 4, **kwargs}, index, "cups", "test"))


def test_it_is_found_by_its_name(lmms):
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(lmms.manifest())
    assert registry.get_model_class("perceptio") is lmms.Perceptio
    assert registry.resolve("perceptio").model_type == "chat"


def test_answers_come_in_the_order_of_the_requests_whatever_the_batches(model, monkeypatch):
    colours = [(200, 40, 40), (40, 60, 200), (90, 90, 90), (10, 200, 10), (250, 250, 0)]
    docs = [chat(Image.new("RGB", (64 + 8 * i, 48), colour)) for i, colour in enumerate(colours)]
    docs[1:1] = [chat(Image.new("RGB", (64, 48)), Image.new("RGB", (48, 64))), chat()]
    model.task_dict["cups"] = {"test": docs}
    asked = []
    original = model.pipe.__class__.__call__

    def spy(pipe, chats, **kwargs):
        asked.append((len(chats), kwargs["perception"], kwargs["generate_kwargs"]["max_new_tokens"]))
        return original(pipe, chats, **kwargs)

    monkeypatch.setattr(model.pipe.__class__, "__call__", spy)
    requests = [request(i) for i in range(6)] + [request(6, max_new_tokens=6)]
    found = model.generate_until(requests)
    span = model.pipe.model.config.span_length + 1
    assert sorted(asked) == sorted(
        [(2, "none", 4), (3, "seg+depth", span + 4), (1, "seg+depth", span + 4), (1, "seg+depth", span + 6)]
    )
    assert found == [model.generate_until([one])[0] for one in requests]
    assert all(isinstance(text, str) and "<d_" not in text and "[SEG]" not in text for text in found)


@pytest.mark.parametrize(
    ("until", "text"), [(None, "A.\n\nB"), ("\n\n", "A."), (["B", "."], "A"), (["", "x"], "A.\n\nB")]
)
def test_answers_end_before_the_strings_of_the_task(lmms, until, text):
    assert lmms._cut("A.\n\nB", until) == text


def test_what_is_not_done_is_said(lmms, model, tiny_folder):
    for name in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError, match="generate_until"):
            getattr(model, name)([])
    model.task_dict["cups"] = {"test": [[{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]]}
    with pytest.raises(ValueError, match="cups shows a video or a sound"):
        model.generate_until([request(0)])
    with pytest.raises(ValueError, match="`perception` is 'all', expected one of seg"):
        lmms.Perceptio("unused", perception="all")
    with pytest.raises(ValueError, match="`batch_size` is 'auto', expected 1 or more"):
        lmms.Perceptio("unused", batch_size="auto")
