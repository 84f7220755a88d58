"""LLaVA's conversations ({"from", "value"} pairs with an `<image>` mark) → messages of a record."""

from ..record import assistant, user
from .common import Unusable

IMAGE_MARK = "<image>"
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def to_messages(conversations, has_picture: bool, answer=None) -> list[dict]:
    """Messages without the mark; raises `Unusable` for what is not questions and answers in turn.

    answer: makes the message of an answer from its text, where the text is not all of it.
    """
    turns = [_turn(entry) for entry in _as_list(conversations)]
    system = turns[:1] if turns and turns[0][0] == "system" else []
    turns = turns[len(system) :]
    _check_order([role for role, _ in turns])
    turns[0] = ("user", take_out_mark(turns[0][1], has_picture))
    if any(IMAGE_MARK in text for _, text in turns + system):
        raise Unusable("an image mark past the first question")
    if any(not text.strip() for role, text in turns if role == "user"):
        raise Unusable("empty question")
    if any(not text.strip() for role, text in turns if role == "assistant"):
        raise Unusable("empty answer")
    answer = answer or assistant
    messages = [{"role": "system", "content": text.strip(), "perception": None} for _, text in system]
    return messages + [user(text.strip()) if role == "user" else answer(text.strip()) for role, text in turns]


def take_out_mark(text: str, has_picture: bool) -> str:
    """The question without its mark, wherever it stood; what stood on two lines stays on two lines."""
    count = text.count(IMAGE_MARK)
    if count and not has_picture:
        raise Unusable("an image mark and no picture")
    if count > 1:
        raise Unusable("several pictures")
    before, _, after = text.partition(IMAGE_MARK)
    left, right = before.rstrip(), after.lstrip()
    gap = before[len(left) :] + after[: len(after) - len(right)]
    return left + ("\n" if "\n" in gap else " ") + right if left and right else left + right


def _as_list(conversations) -> list:
    if isinstance(conversations, dict):  # a column of lists, as older versions of `datasets` gave it
        speakers, texts = conversations.get("from"), conversations.get("value")
        if isinstance(speakers, list) and isinstance(texts, list) and len(speakers) == len(texts):
            conversations = [{"from": speaker, "value": text} for speaker, text in zip(speakers, texts, strict=True)]
    if not isinstance(conversations, list) or not conversations:
        raise Unusable("no conversation", f"{conversations!r:.80}")
    return conversations


def _turn(entry) -> tuple[str, str]:
    speaker, text = (entry.get("from"), entry.get("value")) if isinstance(entry, dict) else (None, None)
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise Unusable("unknown speaker", f"{speaker!r:.80}")
    if not isinstance(text, str):
        raise Unusable("a turn without text", f"{text!r:.80}")
    return SPEAKERS[speaker], text


def _check_order(roles: list[str]) -> None:
    if roles[:1] != ["user"]:
        raise Unusable("does not start with a question")
    for role, following in zip(roles, roles[1:], strict=False):
        if role == following or following == "system":
            raise Unusable(
                {"user": "two questions in a row", "assistant": "two answers in a row"}.get(
                    following, "a system text in the middle"
                )
            )
    if roles[-1] != "assistant":
        raise Unusable("does not end with an answer")
