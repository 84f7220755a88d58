"""The pipeline: every way of calling it, and what comes back."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

import perceptio
from perceptio import PerceptioPipeline

KEYS = {
    "generated_text",
    "mask",
    "score",
    "object_score",
    "masks",
    "predicted_depth",
    "depth",
    "depth_codes",
    "problems",
}


@pytest.fixture(scope="module")
def see(tiny_folder):
    return pipeline("perceptio", model=str(tiny_folder()), trust_remote_code=True)


@pytest.fixture
def photo(picture, tmp_path):
    picture.save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def same(left: dict, right: dict) -> bool:
    depth = (left["predicted_depth"] is None) == (right["predicted_depth"] is None)
    if left["predicted_depth"] is not None and depth:
        depth = torch.allclose(left["predicted_depth"], right["predicted_depth"], atol=1e-4)
    return depth and all(left[key] == right[key] for key in ("generated_text", "depth_codes", "problems"))


def test_it_is_registered_with_the_package_and_by_the_folder(see):
    assert type(see).__name__ == "PerceptioPipeline" and see.task == "perceptio"


def test_every_way_of_asking_gives_the_same_answer(see, photo, picture):
    expected = see(image=photo, text="What?", max_new_tokens=14)
    part = {"type": "text", "text": "What?"}
    ways = [
        see(photo, text="What?", max_new_tokens=14),
        see({"image": photo, "text": "What?"}, max_new_tokens=14),
        see(image=picture, text="What?", max_new_tokens=14),
        see([{"image": picture, "text": "What?"}], max_new_tokens=14)[0],
        see([{"role": "user", "content": [{"type": "image", "image": picture}, part]}], max_new_tokens=14),
        see([[{"role": "user", "content": [{"type": "image", "path": photo}, part]}]], max_new_tokens=14)[0],
        next(iter(see(({"image": photo, "text": "What?"} for _ in range(1)), max_new_tokens=14))),
        see(image=[photo], text=["What?"], max_new_tokens=14)[0],
        see(image=photo, text="What?", generate_kwargs={"max_new_tokens": 14, "do_sample": False}),
    ]
    for number, result in enumerate(ways):
        assert result.keys() == KEYS and same(result, expected), number


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batches_equal_one_by_one(see, picture, batch_size):
    pictures = [picture, picture.rotate(90, expand=True), picture.resize((40, 40)), None, picture.resize((200, 30))]
    questions = [{"image": p, "text": f"What{'!' * i}?"} if p else {"text": "hello"} for i, p in enumerate(pictures)]
    alone = [see(question, max_new_tokens=14) for question in questions]
    together = see(questions, batch_size=batch_size, max_new_tokens=14)
    assert len(together) == 5 and all(map(same, together, alone))


def test_a_generator_is_consumed_as_it_goes(see, picture):
    drawn = []

    def questions():
        for index in range(3):
            drawn.append(index)
            yield {"image": picture, "text": "What?"}

    answers = see(questions(), max_new_tokens=12)
    next(iter(answers))
    assert len(drawn) <= 2


def test_many_pictures_from_anywhere(see, picture, tmp_path):
    """A column of a data set, the library's view of one, and a generator; with one question or one for each."""
    pictures = [picture, picture.rotate(90, expand=True)]
    table = datasets.Dataset.from_dict({"image": pictures, "words": ["What?", "Where?"]})
    table = table.cast_column("image", datasets.Image())
    expected = see(image=pictures, text=["What?", "Where?"], max_new_tokens=12)
    for images in (table["image"], KeyDataset(table, "image"), (one for one in pictures)):
        found = see(image=images, text=table["words"], max_new_tokens=12)
        assert not isinstance(found, list)
        assert all(same(*pair) for pair in zip(found, expected, strict=True))
    found = list(see(KeyDataset(table, "image"), text="What?", batch_size=2, max_new_tokens=12))
    assert len(found) == 2 and same(found[0], expected[0])
    with pytest.raises(ValueError, match="shorter"):
        list(see(image=iter(pictures), text=["What?"], max_new_tokens=12))


@pytest.mark.parametrize(
    ("mode", "mask", "depth"), [("seg+depth", 1, 1), ("seg", 1, 0), ("depth", 0, 1), ("none", 0, 0)]
)
def test_what_was_not_asked_for_is_none(see, picture, mode, mask, depth):
    result = see(image=picture, text="What?", perception=mode, object_threshold=0.0, max_new_tokens=14)
    for key in ("mask", "score", "object_score", "masks"):
        assert (result[key] is not None) == bool(mask), key
    for key in ("predicted_depth", "depth", "depth_codes"):
        assert (result[key] is not None) == bool(depth), key


def test_masks_and_depth_have_the_size_and_range_that_is_promised(see, picture):
    result = see(image=picture, text="What?", object_threshold=0.0, max_new_tokens=14)
    assert result["mask"].mode == "L" and result["mask"].size == picture.size
    assert set(np.unique(np.asarray(result["mask"]))) <= {0, 255}
    assert result["masks"][0]["area"] == int((np.asarray(result["mask"]) == 255).sum())
    depth = result["predicted_depth"]
    assert depth.dtype == torch.float32 and tuple(depth.shape) == picture.size[::-1]
    assert 0 <= depth.min() and depth.max() <= 1
    assert result["depth"].mode == "L" and result["depth"].size == picture.size
    assert np.abs(np.asarray(result["depth"]) / 255 - depth.numpy()).max() <= 0.5 / 255 + 1e-6


def test_what_is_not_there_has_no_mask_and_a_score(see, picture):
    result = see(image=picture, text="What?", object_threshold=1.0, max_new_tokens=14)
    assert result["mask"] is None and 0 < result["object_score"] < 1 and result["masks"][0]["mask"] is None


def test_text_alone_is_answered_without_perception(see):
    result = see({"text": "hello"}, max_new_tokens=6)
    assert result["mask"] is None and result["depth"] is None and isinstance(result["generated_text"], str)


def test_two_pictures_work_without_perception_and_are_refused_with(see, picture):
    parts = [{"type": "image", "image": picture}] * 2 + [{"type": "text", "text": "What?"}]
    chat = [{"role": "user", "content": parts}]
    assert see(chat, max_new_tokens=6)["mask"] is None
    with pytest.raises(ValueError, match="has 2 pictures"):
        see(chat, perception="seg", max_new_tokens=6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda see, photo: see(image=photo), "`text` is missing"),
        (lambda see, photo: see(), "nothing was asked"),
        (lambda see, photo: see({"image": photo, "question": "What?"}), "expected `text`"),
        (lambda see, photo: see(image="http://127.0.0.1/x.png", text="What?"), "allow_urls"),
        (lambda see, photo: see([{"text": "a"}, {"image": "no.png", "text": "b"}], max_new_tokens=4), "input 1.*no"),
        (lambda see, photo: see(image=[photo, photo], text=["a"]), "2 pictures and 1 texts"),
        (lambda see, photo: see(image=photo, text="What?", max_new_tokens=3), "max_new_tokens"),
        (lambda see, photo: see([{"role": "user", "content": [{"type": "image"}]}]), "expected one of image"),
    ],
)  # fmt: skip
def test_wrong_input_gets_one_clear_error(see, photo, call, message):
    with pytest.raises(ValueError, match=message):
        call(see, photo)


def test_chat_pictures_are_loaded_by_our_rules_only(see):
    """The library's own loader fetches whatever address a message names, also of this machine's inside."""
    chat = [{"role": "user", "content": [{"type": "image", "url": "http://127.0.0.1:9/x.png"}]}]
    with pytest.raises(ValueError, match="allow_urls"):
        see(chat)


def test_the_default_is_the_model_that_comes_with_the_package():
    assert pipeline("perceptio").model.name_or_path == str(perceptio.DEFAULT_MODEL)


def test_a_model_and_a_processor_of_different_folders_are_refused(see):
    from perceptio.hub.tiny_text import tiny_processor

    with pytest.raises(ValueError, match="load both from one folder"):
        PerceptioPipeline(model=see.model, processor=tiny_processor(grid_size=4), task="perceptio")


def test_the_librarys_own_task_gives_a_structured_message(see, picture):
    """With a response template the library parses the answer; return_full_text=False hands out the raw text."""
    itt = pipeline("image-text-to-text", model=see.model, processor=see.processor)
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    message = itt(text=chat, max_new_tokens=14)[0]["generated_text"][-1]
    expected = see(image=picture, text="What?", max_new_tokens=14)
    assert message["role"] == "assistant" and message["content"] == expected["generated_text"]
    assert len(message["segmentation"]) == len(expected["masks"])
    assert "".join(message["depth"]) == "".join(f"<d_{code}>" for code in expected["depth_codes"])
    raw = itt(text=chat, max_new_tokens=14, return_full_text=False)[0]["generated_text"]
    assert raw.endswith("<d_end>" + expected["generated_text"])


def test_a_picture_is_seen_upright(see, picture):
    exif = Image.Exif()
    exif[274] = 6
    rotated = picture.rotate(90, expand=True)
    rotated.getexif()[274] = 6
    result = see(image=rotated, text="What?", object_threshold=0.0, max_new_tokens=14)
    assert result["mask"].size == result["depth"].size == picture.size
