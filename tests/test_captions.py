"""Captioners: a real chat model with random weights, the checks of its sentences, and the cache."""

import json
import multiprocessing
import shutil

import numpy as np
import pytest
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
)

from perceptio.data.captions import (
    CachedCaptioner,
    CaptionRequest,
    Refusal,
    TemplateCaptioner,
    TransformersCaptioner,
    check_sentence,
    cut_out,
    draw_box,
)
from perceptio.data.masks import encode_mask
from perceptio.data.record import DataError
from perceptio.hub.tiny_text import tiny_tokenizer

SENTENCE = "The red disc lies on grey."


def request(picture: Image.Image, phrase: str = "red disc", box=(8, 16, 40, 48)) -> CaptionRequest:
    mask = np.zeros((picture.height, picture.width), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return CaptionRequest(picture, phrase, encode_mask(mask), f"hash-{phrase}")


GOOD = [
    "A red cup on a table.",
    "Two dogs sleep!",
    "It costs 3.50 and looks new.",
    'The sign says "Stop."',
    "Une tasse à café.",
]
BAD = {
    "caption empty": ["", " \n", None, 5],
    "caption with control tokens": ["A [SEG] cup.", "A cup.<|im_end|>", "<d_5> cup.", "A cup.</s>", "<image> A cup."],
    "caption with broken characters": ["A c\ufffdp.", "A \x00 cup.", "A cup\u202e."],
    "caption without words": ["...", "1 2 3."],
    "caption too long": ["a " * 41 + "cup."],
    "caption of several sentences": ["A cup. It is red.", "A cup.\n\nIt is red.", "- a cup\n- red."],
    "caption without an end": ["A red cup on a"],
    "caption about the drawn box": ["A cup in a red box.", "The bounding box holds a cup."],
}


@pytest.mark.parametrize("text", GOOD)
def test_a_sentence_stays_as_it_is(text):
    assert check_sentence(f" {text}\n") == text


@pytest.mark.parametrize("reason, text", [(reason, text) for reason, texts in BAD.items() for text in texts])
def test_what_is_no_sentence_is_refused_with_its_reason(reason, text):
    assert check_sentence(text).reason == reason


def test_the_template_captioner_says_what_the_phrase_says(picture):
    requests = [request(picture, phrase) for phrase in ("red disc", "which one?", "guy " * 60)]
    sentences = TemplateCaptioner()(requests)
    assert all(isinstance(sentence, str) for sentence in sentences) and "red disc" in sentences[0]
    assert sentences[1].endswith("which one.") and sentences == TemplateCaptioner()(requests)
    assert TemplateCaptioner()([request(picture, "a. b")])[0].reason == "caption of several sentences"


def test_the_box_is_drawn_around_the_thing_and_the_picture_stays(picture):
    before = picture.copy()
    shown = np.asarray(draw_box(request(picture)))
    red = (shown == (255, 0, 0)).all(-1)
    assert not red[16:48, 8:40].any() and red[14:16, 6:42].all() and red[48:50, 6:42].all() and red[14:50, 6:8].all()
    assert picture.tobytes() == before.tobytes()


def test_a_crop_has_a_margin_and_stays_inside_the_picture(picture):
    assert cut_out(request(picture)).size == (42, 42)
    assert cut_out(request(picture, box=(0, 0, 96, 64))).size == (96, 64)
    assert min(cut_out(request(picture, box=(95, 63, 96, 64))).size) >= 1


@pytest.fixture(scope="module")
def speaking_folder(tiny_folder, tmp_path_factory):
    """A Perceptio with random weights whose generation defaults lead it to say SENTENCE."""
    folder = tmp_path_factory.mktemp("speaking") / "model"
    shutil.copytree(tiny_folder(), folder)
    teach(folder)
    return folder


def teach(folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(SENTENCE, add_special_tokens=False) + [tokenizer.eos_token_id]
    starts = [ids[: end + 1] for end in range(len(ids))]
    config = json.loads((folder / "generation_config.json").read_text())
    config["sequence_bias"] = [[start, 100.0 * len(start)] for start in starts]
    config["eos_token_id"] = tokenizer.eos_token_id
    (folder / "generation_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    """The same of another family, whose tokenizer pads on the right, if at all, and knows no response template."""
    folder = tmp_path_factory.mktemp("llava") / "model"
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    tokenizer.padding_side, tokenizer.pad_token = "right", None
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=28, patch_size=14, projection_dim=16),
        text_config=Qwen2Config(**small, vocab_size=len(tokenizer), num_key_value_heads=2),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    teach(folder)
    return folder


LLAVA_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def test_a_chat_model_of_transformers_gives_its_sentences_in_batches(speaking_folder, picture):
    requests = [request(picture, phrase) for phrase in ("red disc", "a very red disc at the left side", "x")]
    batched = TransformersCaptioner(speaking_folder, batch_size=2, max_new_tokens=80)
    assert batched(requests) == [SENTENCE] * 3
    facts = batched.describe()
    assert facts["model"] == "model" and len(facts["revision"]) == 16 and json.dumps(facts)
    cropped = TransformersCaptioner(speaking_folder, show="crop", max_new_tokens=80)
    assert cropped(requests[:1]) == [SENTENCE] and cropped.describe() != facts


def test_any_family_of_chat_models_will_do(llava_folder, picture):
    captioner = TransformersCaptioner(llava_folder, batch_size=3, max_new_tokens=40)
    phrases = ("x", "a red disc, which is not far from the left edge of the picture", "red disc")
    assert captioner([request(picture, phrase) for phrase in phrases]) == [SENTENCE] * 3


def test_what_random_weights_say_is_refused(tiny_folder, picture):
    answers = TransformersCaptioner(tiny_folder(), batch_size=2, max_new_tokens=14)([request(picture)] * 3)
    assert all(isinstance(answer, Refusal) for answer in answers) and len(answers) == 3


def test_a_picture_that_the_model_refuses_costs_only_itself(speaking_folder, picture):
    captioner = TransformersCaptioner(speaking_folder, show="crop", batch_size=3, max_new_tokens=80)
    captioner._pipeline.processor.max_image_pixels = 5000
    requests = [request(picture), request(picture, box=(0, 0, 96, 64)), request(picture, "x")]
    first, second, third = captioner(requests)
    assert (first, third) == (SENTENCE, SENTENCE) and second.reason == "captioner failed"


def test_models_are_folders_or_ids(tmp_path):
    with pytest.raises(ValueError, match="is no folder, expected that of a chat model, or an id"):
        TransformersCaptioner(tmp_path / "none")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(ValueError, match="has no config.json"):
        TransformersCaptioner(tmp_path)
    with pytest.raises(ValueError, match="`show` is 'arrow'"):
        TransformersCaptioner(tmp_path, show="arrow")


class Counting(TemplateCaptioner):
    """The template captioner; it counts what it is asked, and fails where it is told to."""

    batch_size = 2

    def __init__(self, die_after: int = 10**9):
        super().__init__()
        self.asked, self.die_after = [], die_after

    def __call__(self, requests):
        if len(self.asked) + len(requests) > self.die_after:
            raise KeyboardInterrupt
        self.asked += [request.phrase for request in requests]
        refused = {"refuse": Refusal("caption too long", "…"), "fail": Refusal("captioner failed", "memory")}
        return [refused.get(r.phrase, s) for r, s in zip(requests, super().__call__(requests), strict=True)]


def test_a_killed_run_goes_on_from_its_cache(tmp_path, picture):
    requests = [request(picture, phrase) for phrase in ("a", "b", "refuse", "d", "e", "a")]
    with pytest.raises(KeyboardInterrupt), CachedCaptioner(Counting(die_after=4), tmp_path / "c.jsonl") as cached:
        cached(requests)
    with open(tmp_path / "c.jsonl", "ab") as file:
        file.write(b'{"key": "cut of')
    inner = Counting()
    with CachedCaptioner(inner, tmp_path / "c.jsonl") as cached:
        answers = cached(requests)
        assert cached.describe() == inner.describe()
    assert inner.asked == ["e"] and answers == Counting()(requests)
    assert [json.loads(line)["phrase"] for line in (tmp_path / "c.jsonl").read_text().splitlines()] == [
        "a",
        "b",
        "refuse",
        "d",
        "e",
    ]


def test_failures_are_asked_again_and_other_captioners_have_other_keys(tmp_path, picture):
    requests = [request(picture, "a"), request(picture, "fail")]
    for expected in (["a", "fail"], ["fail"]):
        inner = Counting()
        with CachedCaptioner(inner, tmp_path / "c.jsonl") as cached:
            assert cached(requests)[1].reason == "captioner failed"
        assert inner.asked == expected
    other = Counting()
    other.seed = 7
    with CachedCaptioner(other, tmp_path / "c.jsonl") as cached:
        cached(requests[:1])
    assert other.asked == ["a"]


def test_another_picture_or_mask_is_another_caption(tmp_path, picture):
    inner = Counting()
    first = request(picture, "a")
    moved = request(picture, "a", (0, 0, 5, 5))
    elsewhere = CaptionRequest(picture, "a", first.mask, "another hash")
    with CachedCaptioner(inner, tmp_path / "c.jsonl") as cached:
        cached([first, moved, elsewhere, first])
    assert inner.asked == ["a"] * 3


def _open(path, answer):
    try:
        CachedCaptioner(TemplateCaptioner(), path)
        answer.put("opened")
    except DataError as error:
        answer.put(str(error))


def test_two_processes_do_not_write_one_cache(tmp_path):
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    with CachedCaptioner(TemplateCaptioner(), tmp_path / "c.jsonl"):
        process = context.Process(target=_open, args=(tmp_path / "c.jsonl", answer))
        process.start()
        assert "another process is writing" in answer.get(timeout=300)
        process.join()


def test_a_damaged_cache_is_named(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"key": "a", "text": "b"}\n[]\n')
    with pytest.raises(DataError, match="c.jsonl, row 1.*remove the line"):
        CachedCaptioner(TemplateCaptioner(), tmp_path / "c.jsonl")
