"""The wordings of questions and answers, and how phrases are put into them.

Which wording a turn gets follows from (seed, id of the record, turn) alone.  An answer never holds a control token:
the spans are written before it.
"""

import hashlib
import re

REFERRING_QUESTIONS = (
    "Please segment {} in this image.",
    "Segment {}.",
    "Where is {}? Mark it with a mask.",
    "Find {} in the picture and outline it.",
    "Give me the mask of {}.",
    "Which pixels belong to {}?",
    "I am looking for {}. Show me where it is.",
    "Cut out {} from this photo.",
    "Mark every pixel of {}.",
    "Could you select {} for me?",
)
DESCRIPTION_QUESTIONS = (
    "Please segment {} in this image, and describe it in one sentence.",
    "Segment {} and say what it looks like.",
    "Mark {}, then tell me in a sentence what you see there.",
    "Outline {} and describe its appearance briefly.",
    "Find {} in the picture. What does it look like?",
    "Show me {} with a mask, and give one sentence about it.",
)
REFERRING_ANSWERS = (
    "Here it is: {}.",
    "This is what you asked for: {}.",
    "The mask covers this: {}.",
    "Found in the picture: {}.",
    "Marked as you asked: {}.",
)
NO_TARGET_ANSWERS = (
    "There is nothing like that in this picture: {}.",
    "I cannot find this in the picture: {}.",
    "Nothing here fits the description: {}.",
    "The picture does not show this: {}.",
    "This is not in the picture, so nothing is marked: {}.",
)
PHRASE_SENTENCES = (
    "This is {}.",
    "The picture shows {} here.",
    "What is marked here is {}.",
    "In this place you can see {}.",
)

CONTROL_TOKEN = re.compile(r"\[SEG\]|<d_(?:start|end|\d+)>|<\|im_(?:start|end)\|>|</?img>|<IMG_CONTEXT>|<image>")


def choose(options: tuple[str, ...], seed: int, record_id: str, turn: int) -> str:
    """One of the options, the same for the same arguments on every machine."""
    return options[number(seed, record_id, turn) % len(options)]


def number(*parts) -> int:
    """A number that is spread evenly over 64 bits and follows from the parts alone."""
    text = "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def clean_phrase(text: str) -> str:
    """A published expression as it stands inside a sentence: lower case, single spaces, no full stop at its end."""
    return " ".join(text.lower().split()).rstrip(". ").strip()


def fill(template: str, phrase: str) -> str:
    """The template with the phrase in it, whatever braces the phrase has itself."""
    return template.replace("{}", phrase)


def has_control_token(text: str) -> bool:
    return CONTROL_TOKEN.search(text) is not None
