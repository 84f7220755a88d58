"""Tokenizers and processors of a few hundred entries, of the classes that real InternVL folders have."""

from transformers import GotOcr2ImageProcessorPil, LlamaTokenizer, Qwen2Tokenizer

from ..processing_perceptio import (
    END_IMAGE_TOKEN,
    END_TURN_TOKEN,
    IMAGE_TOKEN,
    START_IMAGE_TOKEN,
    START_TURN_TOKEN,
    PerceptioProcessor,
    add_perception_tokens,
)

CHAT_TOKENS = (START_TURN_TOKEN, END_TURN_TOKEN, START_IMAGE_TOKEN, END_IMAGE_TOKEN, IMAGE_TOKEN)
# Merges of a byte-level vocabulary; "Ġ" is a space.
MERGES = (
    "t h", "th e", "Ġ the", "i n", "e r", "o n", "a n", "Ġ a", "Ġ i", "r e", "o r", "e n", "Ġ c", "Ġ w", "i s", "Ġi s",
    "Ġ o", "Ġo f", "o u", "l e", "Ġ b", "l l", "Ġ l", "o s", "Ġ d", "Ġ p", "Ġ m", "u p", "Ġc up", "c h", "Ġw h",
)  # fmt: skip


def _bytes_as_letters() -> list[str]:
    """The 256 printable stand-ins for bytes of a byte-level vocabulary, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def tiny_tokenizer(family: str = "qwen2"):
    """A tokenizer with the tokens of chats and pictures, without those of perception.  Any text goes through it."""
    if family == "llama":
        tokenizer = _llama_tokenizer()
    elif family in ("qwen2", "qwen3"):
        tokenizer = _qwen_tokenizer()
    else:
        raise ValueError(f"`family` is {family!r}, expected qwen2, qwen3 or llama")
    tokenizer.add_special_tokens({"extra_special_tokens": list(CHAT_TOKENS)}, replace_extra_special_tokens=False)
    tokenizer.eos_token = END_TURN_TOKEN
    tokenizer.padding_side = "left"
    return tokenizer


def _qwen_tokenizer() -> Qwen2Tokenizer:
    pairs = [tuple(merge.split()) for merge in MERGES]
    known = set(_bytes_as_letters())
    usable = []
    for left, right in pairs:
        if left in known and right in known:
            usable.append((left, right))
            known.add(left + right)
    entries = [*_bytes_as_letters(), *(left + right for left, right in usable)]
    return Qwen2Tokenizer(vocab={entry: index for index, entry in enumerate(dict.fromkeys(entries))}, merges=usable)


def _llama_tokenizer() -> LlamaTokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["▁", *map(chr, range(33, 127))]
    merges = [("▁", letter) for letter in "abcdefghijklmnopqrstuvwxyz"] + [
        ("t", "h"),
        ("th", "e"),
        ("i", "n"),
        ("e", "r"),
    ]
    entries = dict.fromkeys([*pieces, *letters, *(left + right for left, right in merges)])
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.pad_token = "</s>"
    return tokenizer


def tiny_processor(
    family: str = "qwen2", grid_size: int = 3, num_codes: int = 8, max_patches: int = 4
) -> PerceptioProcessor:
    """The processor of `tiny_config`: tiles of 32 pixels, SAM2 at 64 pixels."""
    tokenizer = tiny_tokenizer(family)
    add_perception_tokens(tokenizer, num_codes)
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32},
        crop_to_patches=True,
        max_patches=max_patches,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return PerceptioProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        image_seq_length=16,
        sam_image_size=64,
        num_depth_codes=num_codes,
        depth_grid_size=grid_size,
    )
