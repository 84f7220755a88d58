"""Pictures and conversations in, tensors out; generated ids in, masks, depth maps and text out.

The only file that knows token strings.  A conversation ends in `<|im_start|>assistant` and the opening of the
perception mode; control tokens that a user typed are text.
"""

import base64
import binascii
import math
import os
import re
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from io import BytesIO
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from transformers import AddedToken, BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.utils import get_json_schema

from .configuration_perceptio import AUTO_MAP
from .files_perceptio import copy_code
from .generation_perceptio import PerceptionSpan, opened_by, parse_span

SEG_TOKEN, DEPTH_START_TOKEN, DEPTH_END_TOKEN = "[SEG]", "<d_start>", "<d_end>"
START_IMAGE_TOKEN, END_IMAGE_TOKEN, IMAGE_TOKEN = "<img>", "</img>", "<IMG_CONTEXT>"
START_TURN_TOKEN, END_TURN_TOKEN = "<|im_start|>", "<|im_end|>"
PERCEPTION_MODES = {
    "seg+depth": SEG_TOKEN + DEPTH_START_TOKEN,
    "seg": SEG_TOKEN,
    "depth": DEPTH_START_TOKEN,
    "none": "",
}

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_IMAGE_PIXELS = 64_000_000
LONGEST_DOWNLOAD = 100 * 2**20
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# A noncharacter, which Unicode reserves for use inside a program.  It breaks a control token that a user typed, so
# that nothing on the way (placeholders, counting, decoding) takes it for one; encoding takes it out again.
MARK = "\ufdd0"
# A fast tokenizer keeps padding, truncation and "special tokens are text" as state that every call sets anew.
_TOKENIZER_STATE = threading.Lock()

CHAT_TEMPLATE = """\
{%- macro render(message) -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] or [] -%}
            {%- if part['type'] == 'image' -%}
                {{- '<IMG_CONTEXT>\\n' -}}
            {%- else -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set pictures = namespace(count=0) -%}
{%- for message in messages -%}
    {%- if message['content'] is not string -%}
        {%- for part in message['content'] or [] if part['type'] == 'image' -%}
            {%- set pictures.count = pictures.count + 1 -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- render(message) -}}{{- '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- render(message) + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- set mode = messages[-1]['perception'] or perception or ('seg+depth' if pictures.count == 1 else 'none') -%}
    {{- '<|im_start|>assistant\\n' + {'seg+depth': '[SEG]<d_start>', 'seg': '[SEG]', 'depth': '<d_start>', 'none': ''}[mode] -}}
{%- endif -%}
"""  # noqa: E501 (a line break there would be a line break in the prompt)


def depth_code_token(code: int) -> str:
    return f"<d_{code}>"


# Tokens


def add_perception_tokens(tokenizer, num_codes: int = 128) -> dict:
    """Make `tokenizer` one of Perceptio and return the ids that `PerceptioConfig` wants, as its keyword arguments.

    Adds `[SEG]`, the depth markers and `num_codes` depth codes as special tokens, unless they are there already; lists
    the control tokens in `chat_control_tokens`; sets `response_template`.
    """
    picture = [START_IMAGE_TOKEN, END_IMAGE_TOKEN, IMAGE_TOKEN]
    turn = [START_TURN_TOKEN, END_TURN_TOKEN]
    absent = [token for token in picture + turn if token not in tokenizer.get_vocab()]
    if absent:
        raise ValueError(f"the tokenizer has no {absent[0]}, expected that of an InternVL model: take the model's own")
    codes = [depth_code_token(code) for code in range(num_codes)]
    own = [SEG_TOKEN, DEPTH_START_TOKEN, DEPTH_END_TOKEN, *codes]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in own], special_tokens=True)
    if depth_code_token(num_codes) in tokenizer.get_vocab():
        raise ValueError(
            f"the tokenizer has more than the {num_codes} depth codes asked for: pass its own number of codes"
        )
    ids = {token: _single_id(tokenizer, token) for token in own + picture + turn}
    first = ids[codes[0]]
    if [ids[code] for code in codes] != list(range(first, first + num_codes)):
        raise ValueError(
            f"the {num_codes} depth codes are not contiguous in the tokenizer, which already held some of them: start "
            "from the backbone's tokenizer"
        )
    tokenizer.chat_control_tokens = [*own, *picture, *turn]
    tokenizer.response_template = response_template(tokenizer)
    return {
        "seg_token_id": ids[SEG_TOKEN],
        "depth_start_token_id": ids[DEPTH_START_TOKEN],
        "depth_end_token_id": ids[DEPTH_END_TOKEN],
        "depth_code_token_ids": [first, num_codes],
        "blocked_token_ids": [ids[START_IMAGE_TOKEN], ids[END_IMAGE_TOKEN], ids[START_TURN_TOKEN]],
    }


def _single_id(tokenizer, token: str) -> int:
    found = tokenizer.encode(token, add_special_tokens=False)
    if len(found) != 1 or tokenizer.convert_ids_to_tokens(found[0]) != token:
        raise ValueError(
            f"the tokenizer reads {token} as {len(found)} tokens ({found[:5]}), expected one: add it with "
            "`add_perception_tokens`"
        )
    return found[0]


def response_template(tokenizer) -> dict:
    """How the library's `parse_response` and `get_response_parser` read an answer: leniently; `parse` is strict."""
    ends = [END_TURN_TOKEN, tokenizer.eos_token, tokenizer.pad_token]
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": f"{START_TURN_TOKEN}assistant\n",
        "fields": {
            "segmentation": {"open": SEG_TOKEN, "close_pattern": "", "repeats": True, "transform": SEG_TOKEN},
            "depth": {"open": DEPTH_START_TOKEN, "close": DEPTH_END_TOKEN, "repeats": True},
            # Unstripped: a [SEG] in the middle of a sentence must not glue its neighbours together.
            "content": {
                "close": list(dict.fromkeys(filter(None, ends))),
                "repeats": True,
                "join": "",
                "content_args": {"strip": False},
            },
        },
    }


# Pictures


class PictureError(ValueError):
    """A picture that cannot be read as one."""


def load_picture(source, max_pixels: int = MAX_IMAGE_PIXELS, allow_urls: bool = False) -> Image.Image:
    """Any picture → PIL, mode RGB, upright as a person sees it.

    source: path, bytes, file object, base64 string, `data:` URL, PIL picture, or an array or tensor [H, W], [H, W, C]
    or [C, H, W]. `http(s)` URLs are fetched only with `allow_urls`, and then any address that this machine can reach.
    max_pixels: a picture with more is refused before it is decoded.

    EXIF rotation is applied, transparency is laid on white, of an animation a file gives its first frame. 16-bit
    values are divided by 257 (65535 → 255); floats must lie in [0, 1] (1 → 255).
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, "the PIL picture", max_pixels)
    if isinstance(source, (np.ndarray, Tensor)):
        return _upright_rgb(_from_array(source, max_pixels), "the array", max_pixels)
    file, name = _open_source(source, allow_urls)
    try:
        picture = Image.open(file, formats=PICTURE_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(
            f"{name} is too large ({error}), expected at most {max_pixels} pixels: make it smaller, or raise "
            "`max_pixels` (`max_image_pixels` of the processor) and PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except Exception as error:  # a damaged header raises nearly anything
        head = _head(file)
        raise PictureError(
            f"{name} is no picture that can be read (it starts with {head!r}), expected {', '.join(PICTURE_FORMATS)}: "
            "save it as one of these"
        ) from error
    with picture:
        return _upright_rgb(picture, name, max_pixels)


def _head(file) -> bytes:
    if isinstance(file, str):
        with open(file, "rb") as opened:
            return opened.read(16)
    file.seek(0)
    return file.read(16)


def _open_source(source, allow_urls: bool):
    """(what `Image.open` takes, the name for messages)."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        return _bytes(data, f"the picture of {len(data)} bytes")
    if isinstance(source, os.PathLike):
        return _regular_file(os.fspath(source))
    if not isinstance(source, str):
        if hasattr(source, "read"):
            return _bytes(source.read(), f"the file object {getattr(source, 'name', type(source).__name__)}")
        raise PictureError(
            f"a picture is given as {type(source).__name__}, expected a path, bytes, PIL picture, array or tensor"
        )
    scheme = source[:8].partition(":")[0].lower() if ":" in source[:8] else ""
    if scheme in ("http", "https"):
        return _bytes(_fetch(source, allow_urls), f"the picture at {source:.200}")
    if scheme == "data":
        return _bytes(_from_base64(source.partition(",")[2], "the data: URL"), "the picture in the data: URL")
    if scheme in ("file", "ftp"):
        raise PictureError(f"{source:.200} is a {scheme} URL, expected a path: pass the plain path")
    # A path may look like base64 and the reverse ("/9j/…" is a JPEG); no picture has fewer than 40 letters.
    if _exists(source) or not re.fullmatch(r"[A-Za-z0-9+/\s]{40,}={0,2}\s*", source):
        return _regular_file(source)
    return _bytes(_from_base64(source, f"{source:.40}…, which is no file,"), "the base64 picture")


def _bytes(data: bytes, name: str):
    if not data:
        raise PictureError(f"{name} is empty (0 bytes), expected a picture")
    return BytesIO(data), name


def _regular_file(path: str):
    shown = repr(path if len(path) <= 200 else path[:200] + "…")
    if not os.path.isfile(path):
        kind = "no regular file" if _exists(path) else "missing"
        raise PictureError(f"the picture {shown} is {kind}, expected the path of a picture file")
    if os.path.getsize(path) == 0:
        raise PictureError(f"the picture {shown} is empty (0 bytes), expected a picture")
    return path, f"the picture {shown}"


def _exists(path: str) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:  # a NUL in the path
        return False


def _from_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PictureError(
            f"{name} is not base64 ({error}), expected a base64 picture or the path of a file"
        ) from error


def _fetch(url: str, allow_urls: bool) -> bytes:
    if not allow_urls:
        raise PictureError(
            f"the picture {url:.200} is a URL, which is fetched only when asked: pass `allow_urls=True`, or fetch it"
        )
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            if not response.url.lower().startswith(("http:", "https:")):
                raise PictureError(f"{url:.200} leads to {response.url:.200}, expected an http(s) address")
            data = response.read(LONGEST_DOWNLOAD + 1)
    except OSError as error:
        raise PictureError(f"the picture {url:.200} cannot be fetched: {error}") from error
    if len(data) > LONGEST_DOWNLOAD:
        raise PictureError(
            f"the picture {url:.200} has more than {LONGEST_DOWNLOAD} bytes: fetch and shrink it yourself"
        )
    return data


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise PictureError(f"{name} is {width} wide and {height} high, expected at least one pixel")
    if width * height > max_pixels:
        raise PictureError(
            f"{name} is {width} × {height} = {width * height} pixels, expected at most {max_pixels}: make it smaller, "
            "or raise `max_pixels` (`max_image_pixels` of the processor)"
        )


def _upright_rgb(picture: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_size(*picture.size, name, max_pixels)
    try:
        picture.load()
    except Exception as error:  # the decoders raise OSError, SyntaxError, struct.error, EOFError, …
        raise PictureError(f"{name} is damaged or cut off ({error}): save or fetch it again") from error
    try:
        picture = ImageOps.exif_transpose(picture)
    except Exception:  # a broken EXIF block says nothing about the pixels
        picture = picture.copy()
    if picture.mode == "F" or picture.mode.startswith("I"):
        return Image.fromarray(_to_uint8(np.asarray(picture), name), "L").convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _to_uint8(values: np.ndarray, name: str) -> np.ndarray:
    """One documented rule per type; never a silent cut."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise PictureError(f"{name} holds NaN or infinite values, expected floats from 0 to 1")
        low, high, scale, expected = float(values.min()), float(values.max()), 255.0, (0, 1)
    elif values.dtype.kind in "iu":
        low, high = int(values.min()), int(values.max())
        sixteen = values.dtype.itemsize == 2 or name.startswith("the picture") or name == "the PIL picture"
        scale, expected = (1 / 257, (0, 65535)) if sixteen else (1.0, (0, 255))
    else:
        raise PictureError(f"{name} holds values of type {values.dtype}, expected uint8, uint16 or floats from 0 to 1")
    if low < expected[0] or high > expected[1]:
        raise PictureError(
            f"{name} holds {values.dtype} values from {low:g} to {high:g}, expected {expected[0]} to {expected[1]}: "
            "scale them, or pass uint8 from 0 to 255"
        )
    return np.rint(values.astype(np.float64) * scale).astype(np.uint8)


def _from_array(array, max_pixels: int) -> Image.Image:
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise PictureError(
            f"the array has shape {array.shape}, expected [H, W], [H, W, C] or [C, H, W] of one picture"
        )
    if 0 in array.shape:
        raise PictureError(f"the array has shape {array.shape}, expected at least one pixel")
    array = np.moveaxis(array, 0, -1) if _channels_first(array.shape) else array
    _check_size(array.shape[1], array.shape[0], "the array", max_pixels)
    array = np.ascontiguousarray(_to_uint8(array, "the array"))
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[array.shape[2]]
    return Image.fromarray(array[..., 0] if mode == "L" else array, mode)


def _channels_first(shape: tuple[int, int, int]) -> bool:
    first, last = shape[0] in (3, 4), shape[2] in (3, 4)
    if first and last:
        raise PictureError(
            f"the array has shape {shape}, whose channels may be the first or the last axis: pass a PIL picture"
        )
    if first or last:
        return first
    if 1 not in (shape[0], shape[2]):
        raise PictureError(f"the array has shape {shape}, expected 1, 3 or 4 channels as its first or last axis")
    return shape[2] != 1


def _is_sequence(images) -> bool:
    return isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4)


# The processor


@dataclass
class PerceptioMask:
    """The mask of one `[SEG]`.

    mask: [H, W] of the shown picture: bool (`"binary"`), float32 probabilities (`"probability"`), or a COCO run-length
    dict (`"rle"`). None when the object score is below the threshold: the thing is not there.
    area: pixels of the binary mask.
    score: the IoU that SAM2 predicts.  object_score: probability that the thing is there.  None for bare logits.
    position: column of the `[SEG]` in `sequences`.  None for bare logits.
    """

    mask: Tensor | dict | None
    area: int
    score: float | None = None
    object_score: float | None = None
    position: int | None = None


class PerceptioImagesKwargs(ImagesKwargs, total=False):
    """allow_urls (`bool`): fetch pictures that are given as http(s) URLs."""

    allow_urls: bool


class PerceptioProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: PerceptioImagesKwargs
    _defaults = {"text_kwargs": {"padding_side": "left"}, "images_kwargs": {"crop_to_patches": True}}


class PerceptioProcessor(ProcessorMixin):
    r"""InternVL's tiles and tokens, SAM2's square picture, and the way back from ids to masks, depth and text.

    image_processor: cuts a picture into tiles (`GotOcr2ImageProcessor`, or its PIL twin where torchvision is absent).
    tokenizer: the backbone's, after `add_perception_tokens`.
    image_seq_length (`int`): tokens of one tile.
    sam_image_size (`int`): side of the square picture for SAM2.
    num_depth_codes, depth_grid_size (`int`): the codes of the depth tokenizer, and how many a span has per side.
    max_image_pixels (`int`): larger pictures are refused before they are decoded.
    """

    valid_processor_kwargs = PerceptioProcessorKwargs
    _origin: tuple[str, str | None] | None = None  # where it was loaded from: its code is there

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length: int = 256,
        chat_template=None,
        sam_image_size: int = 1024,
        num_depth_codes: int = 128,
        depth_grid_size: int = 10,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        **kwargs,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)
        vocabulary = tokenizer.get_vocab()
        codes = [depth_code_token(0), depth_code_token(num_depth_codes - 1)]
        for token in (SEG_TOKEN, DEPTH_START_TOKEN, DEPTH_END_TOKEN, *codes, IMAGE_TOKEN, END_TURN_TOKEN):
            if token not in vocabulary:
                raise ValueError(
                    f"the tokenizer has no {token}, expected {num_depth_codes} depth codes and Perceptio's other "
                    f"tokens: call `add_perception_tokens(tokenizer, {num_depth_codes})`, or load the tokenizer of "
                    "this model"
                )
        self.image_seq_length = image_seq_length
        self.sam_image_size = sam_image_size
        self.num_depth_codes = num_depth_codes
        self.depth_grid_size = depth_grid_size
        self.max_image_pixels = max_image_pixels
        self.image_token, self.image_token_id = IMAGE_TOKEN, vocabulary[IMAGE_TOKEN]
        self.seg_token_id = vocabulary[SEG_TOKEN]
        self.depth_start_token_id, self.depth_end_token_id = vocabulary[DEPTH_START_TOKEN], vocabulary[DEPTH_END_TOKEN]
        self.depth_code_token_ids = [vocabulary[codes[0]], num_depth_codes]

    @property
    def span_length(self) -> int:
        """N, the codes of one depth span; its two markers are not counted."""
        return self.depth_grid_size**2

    @property
    def image_token_ids(self) -> list[int]:
        return self.tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, START_IMAGE_TOKEN, END_IMAGE_TOKEN])

    @property
    def model_input_names(self) -> list[str]:
        """What every call with a picture returns; `sam_pixel_values` comes on top when a prompt opens with `[SEG]`."""
        pictures = [name for name in self.image_processor.model_input_names if name != "num_patches"]
        return [*self.tokenizer.model_input_names, *pictures, "original_sizes"]

    def check_config(self, config) -> "PerceptioProcessor":
        """Itself, if it belongs to the model of that configuration; raises otherwise."""
        ours = {
            "seg_token_id": self.seg_token_id,
            "depth_start_token_id": self.depth_start_token_id,
            "depth_end_token_id": self.depth_end_token_id,
            "depth_code_token_ids": self.depth_code_token_ids,
            "image_token_id": self.image_token_id,
            "image_seq_length": self.image_seq_length,
            "span_length": self.span_length,
            "mask_image_size": self.sam_image_size,
        }
        for name, value in ours.items():
            theirs = getattr(config, name)
            if value != (list(theirs) if isinstance(theirs, (list, tuple)) else theirs):
                raise ValueError(f"the processor has {name} = {value}, the model {theirs}: load both from one folder")
        if len(self.tokenizer) > config.text_config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} entries, the model only {config.text_config.vocab_size} "
                "embedding rows: load both from one folder"
            )
        return self

    def save_pretrained(self, save_directory, **kwargs):
        """As in the library; the folder also gets the code that its entry for `AutoProcessor` names."""
        files = super().save_pretrained(save_directory, **kwargs)
        copy_code(save_directory, *(self._origin or ()))
        return files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "PerceptioProcessor":
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        processor._origin = (str(pretrained_model_name_or_path), kwargs.get("revision"))
        return processor

    def to_dict(self) -> dict:
        values = {**super().to_dict(), "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}}
        values.pop("_origin", None)
        return values

    # Into the model

    def __call__(
        self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs
    ) -> BatchFeature:
        """Rendered prompts and their pictures → what `generate` and `perceive` take.

        text: one prompt or several, as `apply_chat_template(tokenize=False)` writes them: each `<IMG_CONTEXT>` in it
        stands for a picture, and control tokens are control tokens.
        images: all that `load_picture` takes: one, a flat list in the order of the placeholders, or one list per
        prompt.
        kwargs: as for any processor; `images_kwargs={"allow_urls": True}` fetches URLs.

        Returns input_ids and attention_mask int[B, L], pixel_values float[T, 3, H, W] (the tiles of all pictures),
        original_sizes int[P, 2], (height, width) of the picture of each prompt that has exactly one, and
        sam_pixel_values float[S, 3, H, W], one for each prompt that ends in an opening with `[SEG]`.
        """
        prompts = [text] if isinstance(text, str) else text
        if (
            not isinstance(prompts, (list, tuple))
            or not all(isinstance(prompt, str) for prompt in prompts)
            or not prompts
        ):
            raise ValueError(f"`text` is {type(text).__name__}, expected one rendered prompt (str) or a list of them")
        for row, prompt in enumerate(prompts):
            if lone := re.search("[\ud800-\udfff]", prompt):
                raise ValueError(
                    f"prompt {row} holds half a character ({lone[0]!r} at {lone.start()}), expected whole Unicode: "
                    'decode the text with errors="replace"'
                )
        merged = self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        return_tensors = text_kwargs.get("return_tensors")
        with_types = text_kwargs.pop("return_mm_token_type_ids", False)
        with_offsets = text_kwargs.pop("return_text_replacement_offsets", False)

        pictures = self._assign_pictures(images, prompts, bool(images_kwargs.pop("allow_urls", False)))
        flat = [picture for row in pictures for picture in row]
        tiles, replacements = self._process_images(flat, **images_kwargs) if flat else ({}, [])
        expanded, offsets = self.get_text_with_replacements(list(prompts), replacements)
        data = dict(self._tokenize(expanded, text_kwargs))
        self._check_special_mm_tokens(expanded, data, modalities=["image"])
        opened = self._check_openings(prompts, pictures, data["input_ids"])
        if with_offsets:
            data["text_replacement_offsets"] = offsets
        if with_types:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])

        data.update({name: value for name, value in tiles.items() if name != "num_patches"})
        sizes = [(row[0].height, row[0].width) for row in pictures if len(row) == 1]
        if sizes:
            data["original_sizes"] = sizes
        if any(opened):
            data["sam_pixel_values"] = [
                self.sam_pixels(row[0]) for row, seg in zip(pictures, opened, strict=True) if seg
            ]
            if return_tensors is not None:
                data["sam_pixel_values"] = np.stack(data["sam_pixel_values"])
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def _assign_pictures(self, images, prompts: list[str], allow_urls: bool) -> list[list[Image.Image]]:
        """The pictures of each prompt, loaded."""
        wanted = [prompt.count(IMAGE_TOKEN) for prompt in prompts]
        images = [] if images is None else list(images) if _is_sequence(images) else [images]
        nested = any(_is_sequence(row) for row in images)
        if nested:
            given = [list(row) if _is_sequence(row) else [] if row is None else [row] for row in images]
            found = [len(row) for row in given]
            images = [picture for row in given for picture in row]
        if len(images) != sum(wanted):
            raise ValueError(
                f"the total number of {IMAGE_TOKEN} tokens in the prompts should be the same as the number of images: "
                f"found {sum(wanted)} tokens and {len(images)} images; put one {{'type': 'image'}} part into the "
                "messages for each picture"
            )
        if nested and found != wanted:
            raise ValueError(
                f"the pictures are nested as {found} per prompt, but the prompts hold {wanted} {IMAGE_TOKEN} tokens: "
                "give each prompt its own pictures, or a flat list"
            )
        loaded = iter([self._load(index, image, allow_urls) for index, image in enumerate(images)])
        return [[next(loaded) for _ in range(count)] for count in wanted]

    def _load(self, index: int, image, allow_urls: bool) -> Image.Image:
        try:
            return load_picture(image, self.max_image_pixels, allow_urls)
        except PictureError as error:
            raise PictureError(f"picture {index}: {error}") from error

    def _check_openings(self, prompts: list[str], pictures: list, input_ids) -> list[bool]:
        """Whether each prompt opens with `[SEG]`."""
        opened = []
        for row, (prompt, own, ids) in enumerate(zip(prompts, pictures, input_ids, strict=True)):
            depth = prompt.endswith(DEPTH_START_TOKEN)
            seg = prompt.removesuffix(DEPTH_START_TOKEN).endswith(SEG_TOKEN)
            opened.append(seg)
            if not (seg or depth):
                continue
            _check_one_picture(f"prompt {row}", len(own))
            if int(ids[-1]) != (self.depth_start_token_id if depth else self.seg_token_id):
                raise ValueError(
                    f"prompt {row} opens perception, but its last token is not the opening: pad on the left "
                    '(padding_side="left") and do not truncate'
                )
        return opened

    def sam_pixels(self, picture: Image.Image) -> np.ndarray:
        """float32[3, S, S]: squeezed to a square, as SAM2 was trained."""
        side = self.sam_image_size
        pixels = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32) / 255
        pixels = (pixels - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        count = self.image_seq_length * int(image_inputs["num_patches"][image_idx])
        return START_IMAGE_TOKEN + IMAGE_TOKEN * count + END_IMAGE_TOKEN

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Tokens and tiles for pictures of these (height, width)."""
        if image_sizes is None:
            return MultiModalData()
        merged = self._merge_kwargs(self.valid_processor_kwargs, **kwargs)["images_kwargs"]
        tiles = [self.image_processor.get_number_of_image_patches(*size, merged) for size in image_sizes]
        tokens = [2 + self.image_seq_length * count for count in tiles]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=tiles)

    # Conversations

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        tools: list | None = None,
        documents: list | None = None,
        perception: str | list[str | None] | None = None,
        sanitize_control_tokens: bool = True,
        **kwargs,
    ):
        """As in the library, with two arguments more.

        perception: what the answer opens with: `"seg+depth"`, `"seg"`, `"depth"`, `"none"`, or a list with one of
        these per conversation. None is "seg+depth" for a conversation with exactly one picture, else "none". Without
        `add_generation_prompt` nothing is opened.
        sanitize_control_tokens: control tokens that are typed in messages, tools or documents are text; the answers in
        the history keep `[SEG]` and their depth spans. A prompt that is returned as a string (`tokenize=False`) holds
        a noncharacter inside such a token, which the processor takes out again. False trusts every string.
        """
        chats, batched = _as_chats(conversation)
        modes = perception if isinstance(perception, (list, tuple)) else [perception] * len(chats)
        if len(modes) != len(chats):
            raise ValueError(
                f"`perception` names {len(modes)} modes for {len(chats)} conversations, expected one for each"
            )
        template = self._named_template(chat_template)
        if any(mode is not None for mode in modes) and "perception" not in template:
            raise ValueError(
                "`perception` is given, but the `chat_template` has no such variable: leave one of them out"
            )
        tools = [get_json_schema(tool) if callable(tool) else tool for tool in tools] if tools else tools
        if sanitize_control_tokens:
            chats = [[self._escape_message(message) for message in chat] for chat in chats]
            tools, documents = self._escape(tools), self._escape(documents)
            kwargs = {k: v if k in ("processor_kwargs", "image_token") else self._escape(v) for k, v in kwargs.items()}
        opens = kwargs.get("add_generation_prompt", False)
        for index, (chat, mode) in enumerate(zip(chats, modes, strict=True)):
            if mode is not None:
                if mode not in PERCEPTION_MODES:
                    raise ValueError(f"`perception` is {mode!r}, expected one of {', '.join(PERCEPTION_MODES)}")
                if opens and mode != "none":
                    _check_one_picture(f"conversation {index}", _count_pictures(chat))
            chat[-1] = {**chat[-1], "perception": mode}
        return super().apply_chat_template(
            chats if batched else chats[0], chat_template, tools=tools, documents=documents, **kwargs
        )

    def _named_template(self, name: str | None) -> str:
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        return templates.get(name or "default") or name or ""

    def escape_control_tokens(self, text: str) -> str:
        """`text` with a noncharacter inside each control token, which the processor then reads as plain text."""
        return self._escape(text)

    def escaper(self) -> Callable[[str], str]:
        """`escape_control_tokens` for many texts: the tokenizer is asked for its control tokens once."""
        return partial(self._escape, pattern=self._pattern())

    def _control_tokens(self) -> dict[str, int]:
        """Special tokens and those the tokenizer lists, by id; longer ones first, so that none hides another."""
        listed = set(getattr(self.tokenizer, "chat_control_tokens", None) or [])
        added = self.tokenizer.added_tokens_decoder.items()
        found = {t.content: i for i, t in added if (t.special or t.content in listed) and len(t.content) > 1}
        return dict(sorted(found.items(), key=lambda item: -len(item[0])))

    def _pattern(self, history: bool = False) -> re.Pattern:
        """Matches control tokens; in the answers of the history, those of perception are left out."""
        own = {SEG_TOKEN, DEPTH_START_TOKEN, DEPTH_END_TOKEN, *map(depth_code_token, range(self.num_depth_codes))}
        tokens = [token for token in self._control_tokens() if not (history and token in own)]
        return re.compile("|".join(map(re.escape, tokens)))

    def _escape(self, value, pattern: re.Pattern | None = None):
        if not isinstance(value, (str, dict, list, tuple)):
            return value
        pattern = pattern or self._pattern()
        if isinstance(value, str):
            return pattern.sub(lambda match: match[0][0] + MARK + match[0][1:], value.replace(MARK, ""))
        if isinstance(value, dict):
            return {key: self._escape(item, pattern) for key, item in value.items()}
        return [self._escape(item, pattern) for item in value]

    def _escape_message(self, message: dict) -> dict:
        pattern = self._pattern(history=message["role"] == "assistant")
        content = message.get("content")
        if isinstance(content, list):
            parts = []
            for typed, run in groupby(content, key=lambda part: part["type"] == "text"):
                run = list(run)
                whole = "".join(part["text"] for part in run) if typed else ""
                # A control token in pieces would be whole again in the prompt.
                if len(pattern.findall(whole)) != sum(len(pattern.findall(part["text"])) for part in run if typed):
                    run = [{"type": "text", "text": whole}]
                parts += self._escape(run, pattern) if typed else run
            content = parts
        else:
            content = self._escape(content, pattern)
        rest = {key: self._escape(value, pattern) for key, value in message.items() if key != "content"}
        return {**rest, "content": content}

    # Tokens of prompts in which control tokens were typed

    def _tokenize(self, prompts: list[str], text_kwargs: dict):
        with _TOKENIZER_STATE:
            if any(MARK in prompt for prompt in prompts):
                data = self._tokenize_marked(prompts, dict(text_kwargs))
            else:
                data = self.tokenizer(prompts, **text_kwargs)
        limit = self.tokenizer.model_max_length
        lengths = [sum(map(int, row)) for row in data.get("attention_mask", [])]
        if not text_kwargs.get("truncation") and lengths and max(lengths) > limit:
            raise ValueError(
                f"prompt {lengths.index(max(lengths))} has {max(lengths)} tokens, expected at most {limit}: shorten "
                'it, pass fewer tiles (images_kwargs={"max_patches": …}), or raise '
                "`processor.tokenizer.model_max_length`"
            )
        return data

    def _tokenize_marked(self, prompts: list[str], kwargs: dict):
        """What the tokenizer's call does, for prompts that hold marks."""
        asked = [
            name
            for name in ("return_overflowing_tokens", "return_special_tokens_mask", "text_pair")
            if kwargs.get(name)
        ]
        if asked:
            raise ValueError(
                f"`{asked[0]}` cannot be had for a prompt in which a control token was typed: leave it out"
            )
        with_offsets = kwargs.pop("return_offsets_mapping", False)
        rows = [self._encode_marked(prompt, kwargs.get("add_special_tokens") is not False) for prompt in prompts]
        length = kwargs.get("max_length")
        if kwargs.pop("truncation", False):
            length = length or self.tokenizer.model_max_length
            right = self.tokenizer.truncation_side == "right"
            rows = [tuple(part[:length] if right else part[-length:] for part in row) for row in rows]
        names = (
            "padding",
            "max_length",
            "pad_to_multiple_of",
            "padding_side",
            "return_attention_mask",
            "return_tensors",
        )
        kept = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        data = self.tokenizer.pad({"input_ids": [ids for ids, _ in rows]}, **{"padding": False, **kept})
        if with_offsets:
            left = kwargs.get("padding_side", self.tokenizer.padding_side) == "left"
            data["offset_mapping"] = []
            for ids, (_, offsets) in zip(data["input_ids"], rows, strict=True):
                fill = [(0, 0)] * (len(ids) - len(offsets))
                data["offset_mapping"].append(fill + offsets if left else offsets + fill)
        return data

    def _encode_marked(self, prompt: str, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and (start, end) of each in `prompt`.

        The tokenizer itself splits a text at its special tokens and encodes what lies between. So do we, at those
        which bear no mark; a part with a mark is encoded without special tokens, all the rest as ever.
        """
        ids, offsets, run, run_start, start = [], [], "", 0, 0
        pieces = re.split(f"({self._pattern().pattern})", prompt)
        for index, piece in enumerate(pieces):
            if index % 2 == 0 and MARK in piece:
                self._extend(ids, offsets, self._encode_run(run), list(range(run_start, start + 1)))
                self._extend(ids, offsets, self._encode_typed(piece, first=start == 0), _unmarked_places(piece, start))
                run, run_start = "", start + len(piece)
            else:
                run += piece
            start += len(piece)
        self._extend(ids, offsets, self._encode_run(run), list(range(run_start, start + 1)))
        if add_special_tokens:
            framed = self.tokenizer.encode(SEG_TOKEN)
            middle = framed.index(self.seg_token_id)
            before, after = framed[:middle], framed[middle + 1 :]
            ids, offsets = before + ids + after, [(0, 0)] * len(before) + offsets + [(0, 0)] * len(after)
        return ids, offsets

    @staticmethod
    def _extend(ids: list, offsets: list, encoded: tuple[list, list], places: list[int]) -> None:
        ids += encoded[0]
        offsets += [(places[start], places[end]) for start, end in encoded[1]]

    def _encode_run(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if not text:
            return [], []
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def _encode_typed(self, piece: str, first: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """A part of a prompt in which control tokens were typed: all of it is text."""
        control = set(self._control_tokens().values())
        encoded = self._encode_text(piece.replace(MARK, ""), first)
        if control.isdisjoint(encoded[0]):
            return encoded
        ids, offsets, start = [], [], 0  # tokens that are control tokens without being special: break them in two
        for part in piece.split(MARK):
            part_ids, part_offsets = self._encode_text(part, first and not ids)
            ids += part_ids
            offsets += [(start + a, start + b) for a, b in part_offsets]
            start += len(part)
        if not control.isdisjoint(ids):
            raise ValueError(
                f"the tokenizer makes control tokens out of the plain text {piece!r:.200}: change the text"
            )
        return ids, offsets

    def _encode_text(self, text: str, first: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Without special tokens; unless `first`, as in the middle of a prompt: no space is put before a word."""
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
        alone = self.tokenizer("a", **options)["input_ids"]
        if first or self.tokenizer.encode(SEG_TOKEN + "a", add_special_tokens=False)[1:] == alone:
            encoded = self.tokenizer(text, **options)
            return encoded["input_ids"], encoded["offset_mapping"]
        lead = len(self.tokenizer(MARK, **options)["input_ids"])  # an unknown character, which joins with none
        encoded = self.tokenizer(MARK + text, **options)
        return encoded["input_ids"][lead:], [(max(a - 1, 0), b - 1) for a, b in encoded["offset_mapping"][lead:]]

    # Out of the model

    def parse(self, sequences, prompt_length: int | None = None, strict: bool = False) -> list[PerceptionSpan]:
        """What each generated sequence says, with its answer decoded.

        sequences: the output of `perceive`, or int[B, L].
        prompt_length: columns of the prompt; taken from the output of `perceive`. None for bare ids reads the last
        turn of the assistant, or all of a row in which none starts.
        strict: raise `DepthSpanError` at the first sequence that is not well formed.
        """
        if getattr(sequences, "sequences", None) is not None:
            prompt_length = sequences.prompt_length if prompt_length is None else prompt_length
            sequences = sequences.sequences
        rows = sequences.tolist() if hasattr(sequences, "tolist") else [list(map(int, row)) for row in sequences]
        ends = {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, self.tokenizer.bos_token_id}
        skip = (*(ends - {None}), self.tokenizer.convert_tokens_to_ids(END_TURN_TOKEN))
        spans = []
        for index, row in enumerate(rows):
            start = self._turn_start(row) if prompt_length is None else prompt_length
            if prompt_length is not None:
                start -= opened_by(row[:prompt_length], self)[2]
            span = parse_span(row, self, start=start, skip=skip)
            if strict and not span.valid:
                span.problems[0] = f"sequence {index}: {span.problems[0]}"
                span.raise_if_invalid()
            span.answer = self.tokenizer.decode(span.answer_ids, skip_special_tokens=True)
            spans.append(span)
        return spans

    def _turn_start(self, row: list[int]) -> int:
        header = self.tokenizer.encode(f"{START_TURN_TOKEN}assistant\n", add_special_tokens=False)
        found = (i for i in range(len(row) - len(header), -1, -1) if row[i : i + len(header)] == header)
        return next((start + len(header) for start in found), 0)

    def post_process_masks(
        self,
        output,
        original_sizes=None,
        threshold: float = 0.5,
        object_threshold: float = 0.5,
        output_type: str = "binary",
    ) -> list[list[PerceptioMask]]:
        """One list per sequence, with one `PerceptioMask` per `[SEG]`, at the size of the shown picture.

        output: what `perceive` returns, or logits float[M, h, w], each of which is then a sample of its own.
        original_sizes: int[P, 2], (height, width), when the output does not bring them; for logits int[M, 2].
        threshold: probability from which a pixel belongs to the mask.
        object_threshold: object score below which the mask is None.
        output_type: "binary", "probability" or "rle" (the latter needs `pycocotools`).
        """
        if output_type not in ("binary", "probability", "rle"):
            raise ValueError(f'`output_type` is {output_type!r}, expected "binary", "probability" or "rle"')
        if not 0 < threshold < 1:
            raise ValueError(f"`threshold` is {threshold}, expected a probability between 0 and 1")
        if isinstance(output, Tensor):
            sizes = _check_sizes(original_sizes, len(output))
            return [[self._mask(*pair, threshold, output_type)] for pair in zip(output, sizes, strict=True)]
        masks: list[list[PerceptioMask]] = [[] for _ in output.sequences]
        if output.mask_logits is None:
            return masks
        sizes = self._sizes_by_row(output, original_sizes)
        for index, row in enumerate(output.mask_rows.tolist()):
            object_score = float(output.object_scores[index])
            if object_score < object_threshold:
                entry = PerceptioMask(None, 0)
            else:
                entry = self._mask(output.mask_logits[index], _size_of(sizes, row), threshold, output_type)
            entry.score, entry.object_score = float(output.mask_scores[index]), object_score
            entry.position = int(output.mask_positions[index])
            masks[row].append(entry)
        return masks

    @staticmethod
    def _mask(logits: Tensor, size: tuple[int, int], threshold: float, output_type: str) -> PerceptioMask:
        if torch.isnan(logits).any():
            raise ValueError("the mask logits hold NaN: load the model in bfloat16 or float32, or check its weights")
        logits = F.interpolate(logits[None, None].float(), size, mode="bilinear", align_corners=False)[0, 0]
        binary = logits > math.log(threshold / (1 - threshold))
        mask = logits.sigmoid() if output_type == "probability" else binary
        return PerceptioMask(run_length(binary) if output_type == "rle" else mask, int(binary.sum()))

    def post_process_depth(self, output, original_sizes=None) -> list[Tensor | None]:
        """One map float32[H, W] per sequence at the size of the shown picture; None where no depth was asked for.

        Relative inverse depth in [0, 1]: 1 is the nearest point. `output` and `original_sizes` as for masks, with bare
        depth float[D, H, W].
        """
        if isinstance(output, Tensor):
            sizes = _check_sizes(original_sizes, len(output))
            return [_resize_depth(depth, size) for depth, size in zip(output, sizes, strict=True)]
        maps: list[Tensor | None] = [None] * len(output.sequences)
        if output.depth is not None:
            sizes = self._sizes_by_row(output, original_sizes)
            for row, depth in zip(output.depth_rows.tolist(), output.depth, strict=True):
                maps[row] = _resize_depth(depth, _size_of(sizes, row))
        return maps

    def _sizes_by_row(self, output, original_sizes) -> dict[int, tuple[int, int]]:
        """Row of `sequences` → size of its picture.  Sizes are listed for prompts with exactly one picture, and
        several sequences may belong to one prompt."""
        start = self.tokenizer.convert_tokens_to_ids(START_IMAGE_TOKEN)
        counts = (output.sequences[:, : output.prompt_length] == start).sum(-1).tolist()
        rows = [row for row, count in enumerate(counts) if count == 1]
        found = output.original_sizes if original_sizes is None else original_sizes
        found = [] if found is None else found
        brought = len(found) if output.original_sizes is None else len(output.original_sizes)
        if not len(found) or len(found) != brought or len(rows) % len(found):
            raise ValueError(
                f"`original_sizes` has {len(found)} rows for {len(rows)} sequences with one picture, expected one "
                "(height, width) for each prompt with exactly one picture: pass on all that the processor returns"
            )
        copies = len(rows) // len(found)
        sizes = _check_sizes(found, len(found))
        return {row: sizes[rank // copies] for rank, row in enumerate(rows)}


def _size_of(sizes: dict[int, tuple[int, int]], row: int) -> tuple[int, int]:
    if row not in sizes:
        raise ValueError(f"sequence {row} has a mask or a depth map, but its prompt does not hold exactly one picture")
    return sizes[row]


def _check_sizes(original_sizes, count: int) -> list[tuple[int, int]]:
    sizes = [] if original_sizes is None else [tuple(int(side) for side in size) for size in original_sizes]
    if len(sizes) != count or any(len(size) != 2 or min(size) < 1 for size in sizes):
        raise ValueError(f"`original_sizes` is {sizes!r:.200}, expected {count} rows (height, width) of at least 1")
    return sizes


def _resize_depth(depth: Tensor, size: tuple[int, int]) -> Tensor:
    if not torch.isfinite(depth).all():
        raise ValueError("the depth map holds NaN or infinite values: load the model in bfloat16 or float32")
    return F.interpolate(depth[None, None].float(), size, mode="bilinear", align_corners=False)[0, 0]


def run_length(binary: Tensor) -> dict:
    """COCO's compressed run lengths: {"size": [H, W], "counts": str}."""
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ImportError('`output_type="rle"` needs pycocotools: pip install "perceptio[data]"') from error
    encoded = coco.encode(np.asfortranarray(binary.cpu().numpy().astype(np.uint8)))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def _unmarked_places(piece: str, start: int) -> list[int]:
    """Place in the prompt of each character of `piece` without its marks, and of its end."""
    return [start + index for index, character in enumerate(piece) if character != MARK] + [start + len(piece)]


def _check_one_picture(owner: str, found: int) -> None:
    if found != 1:
        raise ValueError(
            f"{owner} asks for perception and has {found} pictures, expected exactly one: pass one picture, or "
            'perception="none"'
        )


def _count_pictures(chat: list[dict]) -> int:
    parts = [part for message in chat if isinstance(message["content"], list) for part in message["content"]]
    return sum(part["type"] == "image" for part in parts)


def _as_chats(conversation) -> tuple[list[list[dict]], bool]:
    """Checked copies of the conversations, and whether there were several."""
    if not isinstance(conversation, (list, tuple)) and not hasattr(conversation, "messages"):
        raise ValueError(
            f"the conversation is {type(conversation).__name__}, expected a list of messages, or of such lists"
        )
    batched = isinstance(conversation, (list, tuple)) and any(
        isinstance(chat, (list, tuple)) or hasattr(chat, "messages") for chat in conversation
    )
    chats = [getattr(chat, "messages", chat) for chat in (conversation if batched else [conversation])]
    for index, chat in enumerate(chats):
        if not isinstance(chat, (list, tuple)) or not chat:
            raise ValueError(f"conversation {index} is {chat!r:.80}, expected a list of at least one message")
    return [[_as_message(message, i, j) for j, message in enumerate(chat)] for i, chat in enumerate(chats)], batched


def _as_message(message, chat: int, turn: int) -> dict:
    where, message = f"message {turn} of conversation {chat}", _as_plain(message)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{where} is {message!r:.80}, expected {{'role': …, 'content': …}}")
    content = message.get("content")
    if content is None:
        content = []
    if isinstance(content, (list, tuple)):
        content = [_as_part(part, where) for part in content]
    elif not isinstance(content, str):
        raise ValueError(f"the content of {where} is {type(content).__name__}, expected a string or a list of parts")
    return {**message, "content": content}


def _as_plain(value):
    """Dicts in place of dataclasses and pydantic's objects, at any depth: strings in them are to be escaped, too."""
    if isinstance(value, dict):
        return {key: _as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _as_plain(getattr(value, field.name)) for field in fields(value)}
    return _as_plain(value.model_dump()) if callable(getattr(value, "model_dump", None)) else value


def _as_part(part, where: str) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image_url":
        address = part.get("image_url")
        return {"type": "image", "url": address.get("url", "") if isinstance(address, dict) else address}
    if kind == "image" or (kind == "text" and isinstance(part.get("text"), str)):
        return {key: str(item) if isinstance(item, Path) else item for key, item in part.items()}
    raise ValueError(
        f"a part of {where} is {part!r:.80}, expected {{'type': 'text', 'text': …}} or {{'type': 'image', 'image': …}}"
    )


__all__ = [
    "PerceptioMask",
    "PerceptioProcessor",
    "PictureError",
    "add_perception_tokens",
    "depth_code_token",
    "load_picture",
]
