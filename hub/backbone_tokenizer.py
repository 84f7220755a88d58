"""The tokenizer of an assembled folder, from the backbone's own files and without its code."""

import json
from pathlib import Path

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

NEEDED_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>")
# Spaces, digits, line ends, accents, bytes that no piece covers: where two readings of one vocabulary would differ.
SAMPLES = ("Which cup is closer?", "two  spaces\n\nand 1234.5 digits", "naïve 日本語 🙂 \t tab", "a", "<d_1> [SEG]")


def load_tokenizer(folder: Path):
    """The folder's tokenizer, from data files only: code that lies there is never run."""
    folder = Path(folder)
    try:
        tokenizer = _load(folder)
    except ImportError as error:
        raise ValueError(f"the tokenizer in {folder} needs a package that is not installed: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the tokenizer in {folder} cannot be loaded without running its code ({str(error)[:200]}): put a "
            "tokenizer.json there, for example that of the same model in transformers' layout"
        ) from error
    vocabulary = tokenizer.get_vocab()
    absent = [token for token in NEEDED_TOKENS if token not in vocabulary]
    if absent:
        raise ValueError(
            f"the tokenizer in {folder} has no token {absent[0]}: take the tokenizer of the InternVL model itself, "
            "not that of its language model"
        )
    return tokenizer


def _load(folder: Path):
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "auto_map" not in values:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder)
    raise ValueError("it names code to run (auto_map), and neither tokenizer.json nor tokenizer.model is there")


def _from_sentencepiece(folder: Path):
    """InternLM2's own format as a Llama tokenizer, compared with the sentencepiece library on a few texts."""
    from sentencepiece import SentencePieceProcessor

    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    opens_with_space = original.encode("a", out_type=str)[0].startswith("▁")
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_prefix_space=opens_with_space)
    for text in SAMPLES:
        if tokenizer.encode(text, add_special_tokens=False) != original.encode(text):
            raise ValueError(f"read as a Llama tokenizer, tokenizer.model splits {text!r} differently")
    return tokenizer
