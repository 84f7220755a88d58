"""The one file that knows token strings: it prepares pictures and prompts, and turns outputs back into what a person uses.

The assistant's turn opens with what shall be perceived; the prompt writes this opening, the model goes on from there:

    <|im_start|>user\\n<img><IMG_CONTEXT>…</img>\\n{question}<|im_end|>\\n<|im_start|>assistant\\n[SEG]<d_start>

Depth is relative inverse depth in [0, 1], per picture: 1 is the nearest point, 0 the farthest.
"""

import base64
import binascii
import io
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers import BatchFeature, InternVLProcessor, ProcessorMixin
from transformers.utils import chat_template_utils

from .files_perceptio import copy_code
from .generation_perceptio import PerceptionSpan, opened_by, parse_span

SEG_TOKEN, DEPTH_START_TOKEN, DEPTH_END_TOKEN = "[SEG]", "<d_start>", "<d_end>"
IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN = "<IMG_CONTEXT>", "<img>", "</img>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
OPENINGS = {
    "seg+depth": SEG_TOKEN + DEPTH_START_TOKEN,
    "seg": SEG_TOKEN,
    "depth": DEPTH_START_TOKEN,
    "none": "",
}
ASSISTANT_START = f"{TURN_START}assistant\n"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<IMG_CONTEXT>\n' }}"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '<|im_start|>assistant\n' }}"
    "{%- set mode = messages[-1]['perception'] | default(perception) | default('none', true) -%}"
    "{%- if mode in ('seg', 'seg+depth') -%}{{ '[SEG]' }}{%- endif -%}"
    "{%- if mode in ('depth', 'seg+depth') -%}{{ '<d_start>' }}{%- endif -%}"
    "{%- endif -%}"
)
# The library's own view of an answer, also while it streams.  It repairs silently; `parse` is the strict one.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ASSISTANT_START,
    "fields": {
        "segmentation": {"open": SEG_TOKEN, "close_pattern": "", "repeats": True, "content": "text"},
        "depth": {"open": DEPTH_START_TOKEN, "close": DEPTH_END_TOKEN, "content": "text"},
        "content": {
            "close_pattern": r"(?:<\|im_end\|>|<\|endoftext\|>|</s>)",
            "repeats": True,
            "join": "",
            "content": "text",
        },
    },
}
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PICTURE_PIXELS = 64_000_000
MASK_MEAN, MASK_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def depth_code_token(code: int) -> str:
    return f"<d_{code}>"


def add_perception_tokens(tokenizer, num_codes: int = 128) -> dict:
    """Add `[SEG]`, the two depth markers and `num_codes` depth codes, once; return the ids for `PerceptioConfig`.

    They are added as special tokens, which are never split and can be refused in a user's text.  Raises unless each of
    them, and of the tokens of the chat and of pictures, is exactly one id.
    """
    own = [SEG_TOKEN, DEPTH_START_TOKEN, DEPTH_END_TOKEN, *(depth_code_token(code) for code in range(num_codes))]
    known = tokenizer.get_vocab()
    if depth_code_token(num_codes) in known:
        raise ValueError(f"the tokenizer already has more than {num_codes} depth codes: pass the number that it has")
    # Again as special where they are known as ordinary tokens: those could be written by a user's text.
    tokenizer.add_special_tokens({"extra_special_tokens": own}, replace_extra_special_tokens=False)
    ids = {token: _only_id(tokenizer, token) for token in own}
    first = ids[depth_code_token(0)]
    if [ids[depth_code_token(code)] for code in range(num_codes)] != list(range(first, first + num_codes)):
        raise ValueError(f"the ids of {depth_code_token(0)} … {depth_code_token(num_codes - 1)} are not contiguous")
    blocked = [_only_id(tokenizer, token) for token in (IMAGE_START_TOKEN, IMAGE_END_TOKEN, TURN_START)]
    _only_id(tokenizer, TURN_END)
    tokenizer.chat_control_tokens = sorted(
        {*own, IMAGE_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN, TURN_START, TURN_END}
    )
    tokenizer.response_template = RESPONSE_TEMPLATE
    return {
        "seg_token_id": ids[SEG_TOKEN],
        "depth_start_token_id": ids[DEPTH_START_TOKEN],
        "depth_end_token_id": ids[DEPTH_END_TOKEN],
        "depth_code_token_ids": [first, num_codes],
        "blocked_token_ids": blocked,
    }


def _only_id(tokenizer, token: str) -> int:
    """The id of a control token; raises unless its text is exactly one id, and that id decodes to the token."""
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1 or tokenizer.convert_ids_to_tokens(ids[0]) != token or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"{token} is {len(ids)} ids in this tokenizer ({ids[:8]}), expected exactly one: take the tokenizer of an "
            "InternVL model and add the tokens with `add_perception_tokens`"
        )
    return ids[0]


# Pictures


def load_picture(source, max_pixels: int = MAX_PICTURE_PIXELS, allow_urls: bool = False) -> Image.Image:
    """A picture as a person sees it: upright, RGB, alpha on white, the first frame of an animation.

    source: path, bytes, base64 text (also as a data: URL), PIL picture, or array / tensor (H, W), (H, W, 3) or
        (3, H, W), either uint8 or float in [0, 1].
    max_pixels: larger pictures are refused before they are decoded.
    allow_urls: fetch http(s) addresses; leave it off wherever the address comes from somebody else.

    16-bit grey is scaled by 1/257 (65535 becomes 255).  Raises ValueError, naming the file, for anything that is no
    picture.
    """
    if isinstance(source, Image.Image):
        name, picture = "the picture", source
    elif isinstance(source, (np.ndarray, Tensor)):
        return _from_array(source, max_pixels)
    else:
        name, file = _open_source(source, allow_urls)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                picture = Image.open(file, formats=PICTURE_FORMATS)
        except UnidentifiedImageError as error:
            raise ValueError(f"{name} is no picture in one of the formats {', '.join(PICTURE_FORMATS)}") from error
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{name} cannot be read as a picture: {error}") from error
    _check_size(name, *picture.size, max_pixels)
    try:
        picture.load()
        return _as_rgb(name, _upright(picture))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is damaged: {error}") from error


def _check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"{name} is {width} × {height} pixels: it has no content")
    if width * height > max_pixels:
        raise ValueError(
            f"{name} is {width} × {height} pixels, more than the limit of {max_pixels}: make it smaller, or raise "
            "`max_pixels`"
        )


def _open_source(source, allow_urls: bool) -> tuple[str, object]:
    """(name for messages, something that PIL opens)."""
    if isinstance(source, (bytes, bytearray)):
        return "the picture", io.BytesIO(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        if not allow_urls:
            raise ValueError(f"{source:.100} is an address: pass `allow_urls=True` to fetch it, or the picture itself")
        from huggingface_hub import get_session

        reply = get_session().get(source, timeout=30)
        reply.raise_for_status()
        return source, io.BytesIO(reply.content)
    if isinstance(source, str) and source.startswith("data:"):
        return "the picture", io.BytesIO(_from_base64(source.partition(",")[2]))
    if isinstance(source, (str, Path)):
        try:
            path = Path(source)
            if path.is_file():
                return str(path), path
            found = "a folder" if path.is_dir() else "no regular file" if path.exists() else None
        except (OSError, ValueError):  # longer than a path may be, or with NUL: base64, or nothing
            found = None
        if found is None and isinstance(source, str) and len(source) > 64:
            return "the picture", io.BytesIO(_from_base64(source))
        raise FileNotFoundError(f"{str(source):.200} is {found or 'not there'}: expected the path of a picture")
    raise TypeError(f"a picture cannot be a {type(source).__name__}: pass a path, bytes, a PIL picture or an array")


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{text[:40]!r}… is neither the path of a file nor base64: {error}") from error


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except (
        OSError,
        SyntaxError,
        TypeError,
        KeyError,
        ValueError,
        ZeroDivisionError,
    ):  # EXIF that no reader understands
        return picture


def _as_rgb(name: str, picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ValueError(f"{name} holds grey values from {low} to {high}, expected 0 to 65535")
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        return _from_array(np.asarray(picture), picture.width * picture.height, name)
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _from_array(array, max_pixels: int, name: str = "the picture") -> Image.Image:
    values = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[2] in (1, 3):
        raise ValueError(
            f"{name} has shape {values.shape}, which leaves open where the channels are: pass a PIL picture"
        )
    if values.ndim == 3 and values.shape[0] in (1, 3):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] == 3)):
        raise ValueError(f"{name} has shape {values.shape}, expected (H, W), (H, W, 3) or (3, H, W)")
    _check_size(name, values.shape[1], values.shape[0], max_pixels)
    if values.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(values)).convert("RGB")
    if values.dtype == np.uint16:
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind != "f" or not (np.isfinite([low, high]).all() and low >= 0 and high <= 1):
        raise ValueError(
            f"{name} holds {values.dtype} values from {low:.6g} to {high:.6g}, expected whole numbers 0 to 255 (uint8) or "
            "floats 0 to 1: convert it first"
        )
    return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")


# The processor


@dataclass
class PerceivedMask:
    """One `[SEG]` of an answer.

    mask: bool[H, W] ("binary"), float32[H, W] in [0, 1] ("probability") or a COCO RLE dict ("rle"), in the picture's own
        size; None where the object score says that the thing is not there.
    score: the IoU that SAM2 predicts for the mask;  object_score: probability that the thing is there.
    position: column of the `[SEG]` in the sequence;  area: share of the picture that the mask covers.
    """

    mask: object
    score: float
    object_score: float
    position: int | None
    area: float


class PerceptioProcessor(InternVLProcessor):
    r"""Pictures and chats → tensors, and outputs → text, masks, depth maps.

    image_seq_length (`int`): placeholder tokens per tile.
    mask_image_size (`int`): side of the square picture for SAM2.
    num_depth_codes, depth_grid_size (`int`): K, and the side of the grid of a depth span.
    max_pixels (`int`): larger pictures are refused before they are decoded.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
        mask_image_size: int = 1024,
        num_depth_codes: int = 128,
        depth_grid_size: int = 10,
        max_pixels: int = MAX_PICTURE_PIXELS,
    ):
        super(InternVLProcessor, self).__init__(
            image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE
        )
        self.image_seq_length, self.mask_image_size = image_seq_length, mask_image_size
        self.num_depth_codes, self.depth_grid_size = num_depth_codes, depth_grid_size
        self.max_pixels = max_pixels
        self.image_token, self.video_token = IMAGE_TOKEN, None
        self.start_image_token, self.end_image_token = IMAGE_START_TOKEN, IMAGE_END_TOKEN
        self.image_token_id = _only_id(tokenizer, IMAGE_TOKEN)
        self.start_image_token_id = _only_id(tokenizer, IMAGE_START_TOKEN)
        self.end_image_token_id = _only_id(tokenizer, IMAGE_END_TOKEN)
        self.multimodal_pattern = re.compile(f"(?P<image>{re.escape(IMAGE_TOKEN)})")
        self.ids = self._control_ids()

    def _control_ids(self) -> SimpleNamespace:
        """What `parse_span` needs of a configuration, read from the tokenizer by name."""
        first, last = (_only_id(self.tokenizer, depth_code_token(c)) for c in (0, self.num_depth_codes - 1))
        if last - first != self.num_depth_codes - 1:
            raise ValueError(
                f"the tokenizer's depth codes run from {first} to {last}, expected {self.num_depth_codes} in a row"
            )
        return SimpleNamespace(
            seg_token_id=_only_id(self.tokenizer, SEG_TOKEN),
            depth_start_token_id=_only_id(self.tokenizer, DEPTH_START_TOKEN),
            depth_end_token_id=_only_id(self.tokenizer, DEPTH_END_TOKEN),
            depth_code_token_ids=[first, self.num_depth_codes],
            span_length=self.depth_grid_size**2,
        )

    def check_config(self, config) -> "PerceptioProcessor":
        """Raise unless this processor belongs to the model of that configuration; returns itself."""
        ours = {
            **{name: value for name, value in vars(self.ids).items()},
            "image_token_id": self.image_token_id,
            "image_seq_length": self.image_seq_length,
            "mask_image_size": self.mask_image_size,
        }
        for name, value in ours.items():
            if (theirs := getattr(config, name)) != value and list(np.atleast_1d(theirs)) != list(
                np.atleast_1d(value)
            ):
                raise ValueError(f"the processor has {name} = {value}, the model {theirs}: load both from one folder")
        if len(self.tokenizer) > config.text_config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} entries, the model only {config.text_config.vocab_size} "
                "embedding rows: load both from one folder"
            )
        return self

    # In

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        """Pictures and rendered prompts → `input_ids`, `attention_mask`, `pixel_values` as InternVL takes them, and

        original_sizes: int[P, 2], (height, width) of each sample that has exactly one picture, in order.
        sam_pixel_values: float[S, 3, H, W], the picture of each sample whose text opens with `[SEG]`.

        images: one picture, a list, or a list per sample; everything that `load_picture` takes but addresses.
        text: prompts with `<IMG_CONTEXT>` where each picture stands.  Control tokens in it are control tokens; text of
            users goes through `apply_chat_template`.
        """
        texts = [text] if isinstance(text, str) else list(text) if text is not None else None
        pictures = None if images is None else self._load(images)
        if texts is None:
            raise ValueError("`text` is missing: the processor needs a prompt; `image_processor` takes pictures alone")
        counts = [len(re.findall(self._placeholder(kwargs), sample)) for sample in texts]
        if sum(counts) != len(pictures or []):
            raise ValueError(
                f"{len(pictures or [])} pictures were given, but the text has {sum(counts)} {IMAGE_TOKEN} placeholders "
                f"({counts} per sample): pass as many pictures as placeholders"
            )
        if hasattr(ProcessorMixin, "get_text_with_replacements"):
            # Not InternVL's own step: it orders pictures and videos, and loses the marks on what a user typed.
            output = super(InternVLProcessor, self).__call__(images=pictures, text=text, **kwargs)
            output.pop("num_patches", None)
        else:  # before transformers 5.23
            output = super().__call__(images=pictures, text=text, **kwargs)
        return self._add_perception(output, pictures or [], counts, len(texts))

    def _placeholder(self, kwargs: dict) -> str:
        """Pattern of a placeholder that the template wrote; one that a user typed is marked, and is text."""
        marked = kwargs.get("sanitize_control_tokens") or kwargs.get("text_kwargs", {}).get("sanitize_control_tokens")
        before = getattr(chat_template_utils, "_CONTROL_TOKEN_START", None) if marked else None
        return (f"(?<!{before})" if before else "") + re.escape(IMAGE_TOKEN)

    def _load(self, images) -> list[Image.Image]:
        if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
            images = list(images)
        if isinstance(images, (list, tuple)):
            nested = [self._load(item) for item in images if item is not None]
            return [picture for group in nested for picture in group]
        return [load_picture(images, self.max_pixels)]

    def _add_perception(self, output: BatchFeature, pictures: list, counts: list[int], samples: int) -> BatchFeature:
        rows = output["input_ids"] if len(output["input_ids"]) == samples else [output["input_ids"]]
        starts = np.cumsum([0, *counts])
        single = [row for row in range(samples) if counts[row] == 1]
        seen = []
        for row, ids in enumerate(rows):
            used = [int(i) for i in ids]
            if "attention_mask" in output:
                used = [i for i, kept in zip(used, output["attention_mask"][row], strict=True) if kept]
            seg, depth, _ = opened_by(used, self.ids)
            if (seg or depth) and counts[row] != 1:
                raise ValueError(
                    f"sample {row} asks for masks or depth and has {counts[row]} pictures, expected exactly one: ask with "
                    'perception="none", or about one picture'
                )
            if seg:
                seen.append(pictures[starts[row]])
        if single:
            sizes = [pictures[starts[row]].size[::-1] for row in single]
            output["original_sizes"] = self._like(output, np.array(sizes, dtype=np.int64))
        if seen:
            output["sam_pixel_values"] = self._like(output, np.stack([self.mask_picture(p) for p in seen]))
        return output

    @staticmethod
    def _like(output: BatchFeature, values: np.ndarray):
        """In the kind of array that the caller asked for with `return_tensors`."""
        if isinstance(output["input_ids"], Tensor):
            return torch.from_numpy(values)
        return values if isinstance(output["input_ids"], np.ndarray) else values.tolist()

    def mask_picture(self, picture: Image.Image) -> np.ndarray:
        """RGB picture → float32[3, H, W] as SAM2 takes it: squeezed to a square, ImageNet mean and deviation.

        PIL's antialiased bilinear resize, with and without torchvision, so that a machine's packages change no number.
        """
        side = self.mask_image_size
        values = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32) / 255
        return ((values - np.float32(MASK_MEAN)) / np.float32(MASK_STD)).transpose(2, 0, 1)

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        perception: str | list[str] | None = None,
        sanitize_control_tokens: bool = True,
        **kwargs,
    ):
        """As in the library, and

        perception: what the answer opens with: "seg+depth", "seg", "depth" or "none", for all conversations or one each.
            None is "seg+depth" for a conversation with exactly one picture, and "none" for any other.
        sanitize_control_tokens: on by default. The strings of control tokens in user, system and tool turns are text, not
            control tokens; assistant turns keep their perception spans. Works when `tokenize=True`, as in the library.
        """
        chats, batched = self._as_chats(conversation)
        modes = perception if isinstance(perception, (list, tuple)) else [perception] * len(chats)
        if len(modes) != len(chats):
            raise ValueError(f"`perception` lists {len(modes)} modes for {len(chats)} conversations")
        chats = [self._with_mode(chat, mode) for chat, mode in zip(chats, modes, strict=True)]
        if kwargs.get("tokenize") and sanitize_control_tokens:
            chats, kwargs = self._sanitize(chats, chat_template, kwargs)
        return super().apply_chat_template(chats if batched else chats[0], chat_template, **kwargs)

    @staticmethod
    def _as_chats(conversation) -> tuple[list[list[dict]], bool]:
        conversation = getattr(conversation, "messages", conversation)
        if not isinstance(conversation, Iterable) or isinstance(conversation, (str, dict)):
            raise TypeError(
                f"a conversation is a list of messages, found {type(conversation).__name__}: "
                '[{"role": "user", "content": [{"type": "image", "image": …}, {"type": "text", "text": "…"}]}]'
            )
        conversation = list(conversation)
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        chats = [list(getattr(chat, "messages", chat)) for chat in conversation] if batched else [conversation]
        for chat in chats:
            _check_messages(chat)
        return chats, batched

    @staticmethod
    def _with_mode(chat: list[dict], mode: str | None) -> list[dict]:
        """The mode travels on the last message, where the template reads it: one batch may mix modes."""
        if mode is None:
            mode = "seg+depth" if sum(map(_count_pictures, chat)) == 1 else "none"
        if mode not in OPENINGS:
            raise ValueError(f"`perception` is {mode!r}, expected one of {', '.join(OPENINGS)}")
        return [*chat[:-1], {**chat[-1], "perception": mode}]

    def _sanitize(self, chats: list, chat_template, kwargs: dict) -> tuple[list, dict]:
        tokens = tuple(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        others = {name: kwargs[name] for name in ("tools", "documents") if kwargs.get(name)}
        if hasattr(chat_template_utils, "mark_control_tokens"):
            pattern, _ = chat_template_utils._get_control_token_patterns(tokens)

            def mark(value):
                return chat_template_utils.mark_control_tokens(value, pattern)

            kwargs = {
                **kwargs,
                "processor_kwargs": {**(kwargs.get("processor_kwargs") or {}), "sanitize_control_tokens": True},
            }
        else:  # transformers before 5.23: an invisible joiner after the first character keeps the text and no token
            pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

            def mark(value):
                return _map_strings(value, lambda text: pattern.sub(lambda m: f"{m[0][0]}\u2060{m[0][1:]}", text))

        chats = [
            [message if message["role"] == "assistant" else _mark_text(message, mark) for message in chat]
            for chat in chats
        ]
        return chats, {**kwargs, **{name: mark(value) for name, value in others.items()}}

    # Out

    def parse(self, sequences, prompt_length: int | None = None, strict: bool = False) -> list[PerceptionSpan]:
        """Read each row's own turn: its masks, its depth codes, its answer, and what is wrong with it.

        prompt_length: columns of the prompt (its opening is found); None looks for the start of the last assistant turn.
        strict: raise DepthSpanError at the first row that is not well formed.
        """
        rows = sequences.tolist() if isinstance(sequences, (Tensor, np.ndarray)) else [list(row) for row in sequences]
        spans = []
        for row in rows:
            span = parse_span(row, self.ids, start=self._turn_start(row, prompt_length), skip=self._skipped_ids())
            span.answer = self.tokenizer.decode(span.answer_ids, skip_special_tokens=True)
            spans.append(span.raise_if_invalid() if strict else span)
        return spans

    def _skipped_ids(self) -> tuple[int, ...]:
        tokens = self.tokenizer
        found = {tokens.pad_token_id, tokens.eos_token_id, tokens.convert_tokens_to_ids(TURN_END)}
        return tuple(i for i in found if i is not None)

    def _turn_start(self, row: list[int], prompt_length: int | None) -> int:
        if prompt_length is not None:
            return prompt_length - opened_by(row[:prompt_length], self.ids)[2]
        header = self.tokenizer.encode(ASSISTANT_START, add_special_tokens=False)
        for start in range(len(row) - len(header), -1, -1):
            if row[start : start + len(header)] == header:
                return start + len(header)
        return 0

    def post_process_masks(
        self,
        outputs,
        original_sizes=None,
        threshold: float = 0.5,
        object_threshold: float = 0.5,
        output: str = "binary",
    ) -> list[list[PerceivedMask]]:
        """Masks of `perceive` in the size of their pictures: a list per row of `outputs.sequences`, in the order of `[SEG]`.

        original_sizes: (height, width) per row with exactly one picture; None takes those that came with the output.
        threshold: probability from which a pixel belongs to the mask.
        object_threshold: below this object score the mask is None: the thing is not there.
        output: "binary", "probability" or "rle" (COCO run lengths, needs pycocotools).
        """
        if output not in ("binary", "probability", "rle"):
            raise ValueError(f"`output` is {output!r}, expected binary, probability or rle")
        for name, value in (("threshold", threshold), ("object_threshold", object_threshold)):
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` is {value}, expected a probability from 0 to 1")
        masks: list[list[PerceivedMask]] = [[] for _ in range(len(outputs.sequences))]
        if outputs.mask_logits is None:
            return masks
        sizes = self._row_sizes(outputs, original_sizes)
        for index, row in enumerate(outputs.mask_rows.tolist()):
            logits = F.interpolate(
                outputs.mask_logits[index][None, None].float(), size=sizes[row], mode="bilinear", align_corners=False
            )[0, 0]
            if torch.isnan(logits).any():
                raise ValueError(f"the mask of row {row} holds NaN: load the model in bfloat16 or float32")
            probability = logits.sigmoid()
            there = float(outputs.object_scores[index]) >= object_threshold
            binary = probability >= threshold
            masks[row].append(
                PerceivedMask(
                    mask=_mask_as(output, probability, binary) if there else None,
                    score=float(outputs.mask_scores[index]),
                    object_score=float(outputs.object_scores[index]),
                    position=int(outputs.mask_positions[index]),
                    area=float(binary.float().mean()) if there else 0.0,
                )
            )
        return masks

    def post_process_depth(self, outputs, original_sizes=None) -> list[Tensor | None]:
        """Depth maps of `perceive` in the size of their pictures, None for a row without one.

        Each is float32[H, W], relative inverse depth in [0, 1]: 1 is the picture's nearest point.
        """
        maps: list[Tensor | None] = [None] * len(outputs.sequences)
        if outputs.depth is None:
            return maps
        sizes = self._row_sizes(outputs, original_sizes)
        for index, row in enumerate(outputs.depth_rows.tolist()):
            depth = outputs.depth[index][None, None].float()
            if torch.isnan(depth).any():
                raise ValueError(f"the depth map of row {row} holds NaN: load the model in bfloat16 or float32")
            maps[row] = F.interpolate(depth, size=sizes[row], mode="bilinear", align_corners=False)[0, 0].clamp(0, 1)
        return maps

    def _row_sizes(self, outputs, original_sizes) -> dict[int, tuple[int, int]]:
        """Row of `outputs.sequences` → (height, width); rows without exactly one picture have none."""
        sizes = outputs.original_sizes if original_sizes is None else original_sizes
        if sizes is None:
            raise ValueError(
                "the output has no `original_sizes`: pass on everything the processor returned, or give them"
            )
        sizes = [tuple(int(v) for v in size) for size in sizes]
        starts = (outputs.sequences == self.start_image_token_id).sum(-1)
        rows = (starts == 1).nonzero()[:, 0].tolist()
        if not sizes or len(rows) % len(sizes):
            raise ValueError(f"`original_sizes` has {len(sizes)} entries for {len(rows)} rows with one picture")
        copies = len(rows) // len(sizes)  # several sequences may be returned for one prompt
        return {row: sizes[index // copies] for index, row in enumerate(rows)}

    def save_pretrained(self, save_directory, **kwargs):
        """As in the library; the folder also gets the code and the entry by which `AutoProcessor` finds it."""
        files = super().save_pretrained(save_directory, **kwargs)
        copy_code(save_directory, getattr(self, "name_or_path", None))
        return files

    def to_dict(self) -> dict:
        values = super().to_dict()
        values["auto_map"] = {"AutoProcessor": "processing_perceptio.PerceptioProcessor"}
        return {name: value for name, value in values.items() if name in KEPT_FIELDS or name.endswith("processor")}


KEPT_FIELDS = {
    "auto_map", "processor_class", "image_seq_length", "mask_image_size", "num_depth_codes", "depth_grid_size",
    "max_pixels",
}  # fmt: skip


def _mask_as(output: str, probability: Tensor, binary: Tensor):
    if output == "probability":
        return probability
    return binary if output == "binary" else _run_lengths(binary)


def _run_lengths(mask: Tensor) -> dict:
    """COCO run-length encoding, with text counts so that it goes into JSON."""
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ImportError('output="rle" needs pycocotools: pip install "perceptio[data]"') from error
    encoded = coco.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return {"size": [int(v) for v in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def _count_pictures(message: dict) -> int:
    content = message.get("content")
    return sum(part.get("type") == "image" for part in content) if isinstance(content, (list, tuple)) else 0


def _check_messages(chat: list) -> None:
    if not chat:
        raise ValueError("the conversation is empty: it needs at least one message")
    for number, message in enumerate(chat):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} is {str(message):.80}, expected a dict with role and content")
        content = message.get("content")
        parts = content if isinstance(content, (list, tuple)) else []
        if not isinstance(content, (str, list, tuple)):
            raise ValueError(f"the content of message {number} is {content!r:.80}, expected a text or a list of parts")
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "image") or (kind == "text" and not isinstance(part.get("text"), str)):
                raise ValueError(
                    f"message {number} has a part {str(part):.80}, expected "
                    '{"type": "text", "text": …} or {"type": "image", "image": …}'
                )


def _map_strings(value, change):
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_strings(item, change) for key, item in value.items()}
    return [_map_strings(item, change) for item in value] if isinstance(value, (list, tuple)) else value


def _mark_text(message: dict, mark) -> dict:
    """The texts of a message, marked; its pictures and its role are left alone."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": mark(content)}
    parts = [{**part, "text": mark(part["text"])} if part["type"] == "text" else part for part in content]
    return {**message, "content": parts}


__all__ = [
    "DEPTH_END_TOKEN",
    "DEPTH_START_TOKEN",
    "PerceivedMask",
    "PerceptioProcessor",
    "SEG_TOKEN",
    "add_perception_tokens",
    "depth_code_token",
    "load_picture",
]
