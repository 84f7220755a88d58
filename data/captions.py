"""Captioners: one sentence about a thing in a picture.

A captioner is called with a list of requests and gives, for each, a sentence, or a `Refusal` that says why there is
none.  `describe()` says what decides its sentences, for the manifest, and `batch_size` how many requests it takes at a
time.
"""

import fcntl
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from .manifest import sha256
from .masks import coco
from .record import DataError, Problem
from .templates import PHRASE_SENTENCES, fill, has_control_token, number

PROMPTS = {
    "box": "A red box in this image is drawn around: {}. Describe what is inside it in one sentence of at most {} "
    "words, by what can be seen: kind, colour, material, posture or what it does. Do not mention the box.",
    "crop": "This image shows: {}. Describe it in one sentence of at most {} words, by what can be seen: kind, "
    "colour, material, posture or what it does.",
}
MARGIN = 0.15  # of the thing's own size, around a crop
MOST_WORDS = 40
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MENTIONS_BOX = re.compile(r"\b(red|bounding) (box|rectangle|frame|outline)\b", re.IGNORECASE)
FOREIGN_TOKEN = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|<(?:pad|unk|eos|bos|image\w*)>|\[/?INST\]")
NEXT_SENTENCE = re.compile(r"[.!?]['\"”’)\]]*\s+\S")
SENTENCE_END = re.compile(r"[.!?]['\"”’)\]]*$")


@dataclass(frozen=True)
class CaptionRequest:
    """picture: upright and RGB; mask: run lengths of that picture; picture_hash: of the file's bytes."""

    picture: Image.Image
    phrase: str
    mask: dict
    picture_hash: str


@dataclass(frozen=True)
class Refusal:
    """Why there is no sentence.  `reason` is one of few, for counting."""

    reason: str
    detail: str = ""


def check_sentence(text, most_words: int = MOST_WORDS) -> str | Refusal:
    """The sentence with its white space in order, or why it is none.  Nothing is cut to fit."""
    if not isinstance(text, str) or not text.strip():
        return Refusal("caption empty")
    lines = [line for line in text.strip().splitlines() if line.strip()]
    sentence = " ".join(text.split())
    shown = sentence[:120]
    if has_control_token(sentence) or FOREIGN_TOKEN.search(sentence):
        return Refusal("caption with control tokens", shown)
    if any(not character.isprintable() or character in "\ufffd\ufdd0" for character in sentence):
        return Refusal("caption with broken characters", ascii(shown))
    if not any(character.isalpha() for character in sentence):
        return Refusal("caption without words", shown)
    if len(sentence.split()) > most_words:
        return Refusal("caption too long", shown)
    if len(lines) > 1 or NEXT_SENTENCE.search(sentence):
        return Refusal("caption of several sentences", shown)
    if not SENTENCE_END.search(sentence):
        return Refusal("caption without an end", shown)
    if MENTIONS_BOX.search(sentence):
        return Refusal("caption about the drawn box", shown)
    return sentence


class TemplateCaptioner:
    """Sentences from the phrases alone: no model, and nothing that the phrase does not say."""

    batch_size = 1

    def __init__(self, seed: int = 0):
        self.seed = seed

    def describe(self) -> dict:
        return {"captioner": "template", "seed": self.seed}

    def __call__(self, requests: list[CaptionRequest]) -> list[str | Refusal]:
        return [self._sentence(request.phrase) for request in requests]

    def _sentence(self, phrase: str) -> str | Refusal:
        template = PHRASE_SENTENCES[number(self.seed, phrase) % len(PHRASE_SENTENCES)]
        return check_sentence(fill(template, phrase.rstrip(".!? ")), MOST_WORDS + len(phrase.split()))


class TransformersCaptioner:
    """Any chat model of transformers' pipeline "image-text-to-text", greedily.

    model: a folder, or the id of a model on the Hub, which is fetched then.
    show: "box" draws a box around the thing, "crop" cuts it out with a margin.
    options: further arguments of `pipeline` (device, dtype, revision, …).
    """

    def __init__(
        self,
        model: str | Path,
        *,
        show: str = "box",
        most_words: int = MOST_WORDS,
        max_new_tokens: int = 128,
        batch_size: int = 8,
        trust_remote_code: bool = False,
        **options,
    ):
        from transformers import pipeline

        if show not in PROMPTS:
            raise ValueError(f"`show` is {show!r}, expected one of {', '.join(PROMPTS)}")
        local = Path(model).is_dir()
        if not local and not HUB_ID.fullmatch(str(model)):
            raise ValueError(
                f"{str(model)!r} is no folder, expected that of a chat model, or an id such as owner/name"
            )
        if local and not (Path(model) / "config.json").is_file():  # an adapter would have its base fetched
            raise ValueError(
                f"{model} has no config.json, expected the folder of a whole chat model: merge an adapter"
            )
        self.show, self.most_words, self.batch_size = show, most_words, batch_size
        self._pipeline = pipeline(
            "image-text-to-text",
            model=str(model),
            trust_remote_code=trust_remote_code,
            model_kwargs={"use_safetensors": True},
            **options,
        )
        tokenizer = self._pipeline.tokenizer
        tokenizer.padding_side = "left"  # a batch goes on from its right edge
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._generate = {"do_sample": False, "max_new_tokens": max_new_tokens}
        commit = getattr(self._pipeline.model.config, "_commit_hash", None)
        self._revision = _folder_hash(Path(model)) if local else commit
        self._name = Path(model).name if local else str(model)

    def describe(self) -> dict:
        facts = {"model": self._name, "revision": self._revision, "show": self.show, "most_words": self.most_words}
        return {"captioner": "transformers", **facts, **self._generate}

    def __call__(self, requests: list[CaptionRequest]) -> list[str | Refusal]:
        texts = []
        for start in range(0, len(requests), self.batch_size):
            texts += self._ask([self._chat(request) for request in requests[start : start + self.batch_size]])
        return [text if isinstance(text, Refusal) else check_sentence(text, self.most_words) for text in texts]

    def _ask(self, chats: list) -> list[str | Refusal]:
        """The answer to each chat.  Where the model fails on a batch it is asked for each."""
        try:
            found = self._pipeline(text=chats, batch_size=len(chats), generate_kwargs=self._generate)
        except (ValueError, RuntimeError) as error:
            if len(chats) == 1:
                return [Refusal("captioner failed", " ".join(str(error).split())[:200])]
            return [text for chat in chats for text in self._ask([chat])]
        return [_answer_text(result) for result in found]

    def _chat(self, request: CaptionRequest) -> list[dict]:
        picture = draw_box(request) if self.show == "box" else cut_out(request)
        text = PROMPTS[self.show].format(request.phrase, self.most_words)
        return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


def _answer_text(result) -> str:
    """The text of the last message, without the thinking that some models write before it."""
    message = (result[0] if isinstance(result, list) else result)["generated_text"]
    message = message[-1] if isinstance(message, list) else {"content": message}
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def bounds(mask: dict) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the mask, the last two outside of it."""
    x, y, width, height = coco.toBbox({"size": mask["size"], "counts": mask["counts"].encode("ascii")}).tolist()
    return x, y, x + width, y + height


def draw_box(request: CaptionRequest) -> Image.Image:
    """The picture with a red box around the thing."""
    picture = request.picture.copy()
    left, top, right, bottom = bounds(request.mask)
    width = max(2, round(min(picture.size) / 150))
    box = (left - width, top - width, right + width - 1, bottom + width - 1)
    ImageDraw.Draw(picture).rectangle(box, outline=(255, 0, 0), width=width)
    return picture


def cut_out(request: CaptionRequest) -> Image.Image:
    """The part of the picture around the thing."""
    left, top, right, bottom = bounds(request.mask)
    x, y = MARGIN * (right - left), MARGIN * (bottom - top)
    width, height = request.picture.size
    box = (max(0, left - x), max(0, top - y), min(width, right + x), min(height, bottom + y))
    return request.picture.crop(tuple(round(side) for side in box))


def _folder_hash(folder: Path) -> str:
    """One hash for the contents of a model's folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return hashlib.sha256("".join(f"{path.name} {sha256(path)}\n" for path in files).encode()).hexdigest()[:16]


class CachedCaptioner:
    """A captioner whose sentences are kept in a file of JSON lines, written as they come: a killed run loses none.

    The key holds what decides a sentence: the captioner, the picture, the phrase and the mask.  Failures of the model
    itself are not kept.  One process at a time writes to a file.
    """

    def __init__(self, captioner, path: str | Path):
        self.captioner, self.path = captioner, Path(path)
        self.batch_size = captioner.batch_size
        self._identity = json.dumps(captioner.describe(), sort_keys=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise DataError(
                f"another process is writing to {path}, expected none: wait for it, or name another cache"
            ) from error
        self._known = self._read()

    def describe(self) -> dict:
        return self.captioner.describe()

    def __call__(self, requests: list[CaptionRequest]) -> list[str | Refusal]:
        keys = [self._key(request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._known}
        failed, waiting = {}, list(missing.items())
        for start in range(0, len(waiting), self.batch_size):
            batch = waiting[start : start + self.batch_size]
            answers = self.captioner([request for _, request in batch])
            for (key, request), answer in zip(batch, answers, strict=True):
                if isinstance(answer, Refusal) and answer.reason == "captioner failed":
                    failed[key] = answer
                else:
                    self._keep(key, request.phrase, answer)
            self._file.flush()
        return [failed[key] if key in failed else self._known[key] for key in keys]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "CachedCaptioner":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _key(self, request: CaptionRequest) -> str:
        parts = [self._identity, request.picture_hash, request.phrase, request.mask["counts"]]
        return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def _keep(self, key: str, phrase: str, answer: str | Refusal) -> None:
        self._known[key] = answer
        line = {"key": key, "phrase": phrase}
        line |= {"refusal": asdict(answer)} if isinstance(answer, Refusal) else {"text": answer}
        self._file.write(json.dumps(line).encode() + b"\n")

    def _read(self) -> dict[str, str | Refusal]:
        """What the file holds; a last line that was cut off when its writer was killed is taken out."""
        self._file.seek(0)
        known, whole = {}, 0
        for row, line in enumerate(self._file):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                entry = json.loads(line)
                refusal = entry.get("refusal")
                known[entry["key"]] = Refusal(**refusal) if refusal else str(entry["text"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    Problem(str(self.path), row, "line", f"{line[:60]!r}", "a cached caption", "remove the line")
                ) from error
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)
        return known
