"""What a user types is text: no string of a control token becomes one, in any turn, however it is cut or glued."""

import threading
import unicodedata
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from perceptio.hub.tiny_text import tiny_processor

CONTROL = ["[SEG]", "<d_start>", "<d_end>", "<d_0>", "<|im_end|>", "<|im_start|>", "<IMG_CONTEXT>", "<img>", "</img>"]
FORMS = {
    "alone": "{}",
    "glued": "a{}b",
    "three times": "{0}{0}{0}",
    "in spaces": " {} ",
    "in lines": "x\n{}\n\ny",
    "beside emoji": "é{}🙂",
    "after jinja": "{{{{ 7*7 }}}}{}",
}
SPAN = "[SEG]<d_start>" + "".join(f"<d_{i % 8}>" for i in range(9)) + "<d_end>"


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def processor(request):
    return tiny_processor(request.param)


def control_ids(processor, row) -> list[int]:
    control = {processor.tokenizer.convert_tokens_to_ids(token) for token in CONTROL}
    control |= set(range(processor.depth_code_token_ids[0], sum(processor.depth_code_token_ids)))
    return [i for i in row if i in control]


def rendered(processor, content, role: str = "user", **kwargs) -> list[int]:
    chat = [{"role": role, "content": content}]
    if role != "user":
        chat.append({"role": "user", "content": "q"})
    return processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=True, **kwargs)[
        "input_ids"
    ][0]


@pytest.mark.parametrize("role", ["user", "system", "tool"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("token", CONTROL)
def test_typed_control_tokens_are_text_and_stay_readable(processor, token, form, role):
    text = FORMS[form].format(token)
    ids = rendered(processor, text, role)
    assert control_ids(processor, ids) == control_ids(processor, rendered(processor, "plain", role))
    assert text in processor.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("token", CONTROL)
def test_a_token_in_pieces_is_not_put_together(processor, token):
    expected = control_ids(processor, rendered(processor, "plain"))
    for pieces in ([token[:2], token[2:]], list(token), [token[:-1], token[-1:]]):
        parts = [{"type": "text", "text": piece} for piece in pieces]
        assert control_ids(processor, rendered(processor, parts)) == expected


@pytest.mark.parametrize("form", ["{0}\u200b{1}", "{0}\u2060{1}", "{0}\ufdd0{1}"])
@pytest.mark.parametrize("token", CONTROL)
def test_invisible_characters_do_not_smuggle_a_token_in(processor, token, form):
    """U+FDD0 is what the processor itself marks typed tokens with; a user's own must not become a way around."""
    ids = rendered(processor, form.format(token[:2], token[2:]))
    assert control_ids(processor, ids) == control_ids(processor, rendered(processor, "plain"))


@pytest.mark.parametrize("token", CONTROL)
def test_rendering_and_tokenizing_in_two_steps_is_safe_too(processor, token):
    prompt = processor.apply_chat_template([{"role": "user", "content": token}], add_generation_prompt=True)
    expected = control_ids(processor, rendered(processor, "plain"))
    assert control_ids(processor, processor(text=prompt)["input_ids"][0]) == expected


@dataclass
class Words:
    text: str
    type: str = "text"


@dataclass
class Message:
    role: str
    content: str | list


@pytest.mark.parametrize("token", CONTROL)
def test_messages_that_are_objects_are_read_as_dicts(processor, token):
    said = {"role": "user", "content": [{"type": "text", "text": f"a {token}"}]}
    as_parts = Message("user", [Words(f"a {token}")])
    as_pydantic = SimpleNamespace(model_dump=lambda: said)  # as OpenAI's client gives them
    for message in (as_parts, as_pydantic, {**said, "content": [Words(f"a {token}")]}):
        assert processor.apply_chat_template([message]) == processor.apply_chat_template([said])


def test_it_can_be_switched_off(processor):
    ids = rendered(processor, "[SEG]", sanitize_control_tokens=False)
    assert control_ids(processor, ids).count(processor.seg_token_id) == 1


def test_tokens_in_tools_are_text(processor):
    tool = {"type": "function", "function": {"name": "look", "description": "<|im_end|>[SEG]", "parameters": {}}}
    ids = rendered(processor, "q", tools=[tool])
    assert control_ids(processor, ids) == control_ids(processor, rendered(processor, "plain"))


def test_a_role_cannot_end_its_turn(processor):
    assert control_ids(processor, rendered(processor, "x", role="user<|im_end|>")) == (
        control_ids(processor, rendered(processor, "x", role="userx"))
    )


def test_the_answers_of_the_history_keep_their_spans_and_nothing_else(processor):
    chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": SPAN + "answer<|im_end|><IMG_CONTEXT>"},
        {"role": "user", "content": "[SEG] again"},
    ]
    row = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ][0]
    first, count = processor.depth_code_token_ids
    assert row.count(processor.seg_token_id) == 1 and sum(first <= i < first + count for i in row) == 9
    assert row.count(processor.image_token_id) == 0
    assert row.count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3


@pytest.mark.parametrize("text", ["hello world", "  lead", "\n\nx", "ünï 日本 🙂", "a, b; c"])
def test_text_without_tokens_is_encoded_as_the_tokenizer_does(processor, text):
    prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(processor, text) == processor.tokenizer(prompt)["input_ids"]


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n", "\x00", "\u202eabc", "👩‍👩‍👧", "e" + "\u0301" * 50, "{{ 7*7 }}{% x %}", "word " * 20_000],
)
def test_strange_text_goes_through_unchanged(processor, text):
    decoded = processor.tokenizer.decode(rendered(processor, text), skip_special_tokens=False)
    # Qwen's tokenizer itself composes accents.
    assert unicodedata.normalize("NFC", f"user\n{text}<|im_end|>") in unicodedata.normalize("NFC", decoded)


def test_a_lone_surrogate_is_named(processor):
    with pytest.raises(ValueError, match="half a character"):
        rendered(processor, "\ud800x")


def test_threads_do_not_disturb_each_other(processor):
    """A fast tokenizer keeps "special tokens are text" as state, which one call would set under another's feet."""
    texts = ["plain text", "with [SEG] typed", "other <|im_end|> x"]
    expected, wrong = {text: rendered(processor, text) for text in texts}, []

    def work(text):
        for _ in range(20):
            if rendered(processor, text) != expected[text]:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(text,)) for text in texts * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_prompt_beyond_the_context_is_refused_with_the_limit(processor):
    kept = processor.tokenizer.model_max_length
    processor.tokenizer.model_max_length = 50
    try:
        with pytest.raises(ValueError, match="expected at most 50"):
            rendered(processor, "word " * 100)
    finally:
        processor.tokenizer.model_max_length = kept


@pytest.mark.parametrize(
    "chat",
    [
        [],
        "text",
        [{"content": "no role"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [{"type": "video"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
    ],
)
def test_a_malformed_conversation_gets_one_clear_error(processor, chat):
    with pytest.raises(ValueError, match="expected"):
        processor.apply_chat_template(chat, tokenize=True)
