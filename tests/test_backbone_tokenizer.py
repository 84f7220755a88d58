import json
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from perceptio.hub.backbone_tokenizer import NEEDED_TOKENS, SAMPLES, load_tokenizer

SECOND_READING = {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}, "tokenizer_class": "Mine"}


def save(folder, tokens=NEEDED_TOKENS):
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    wrapped.add_special_tokens({"additional_special_tokens": list(tokens)})
    wrapped.save_pretrained(folder)
    return wrapped


def name_code(folder):
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, **SECOND_READING}))
    (folder / "tokenization_mine.py").write_text("raise SystemExit('the code was run')\n")


def test_plain_folder_is_read(tmp_path):
    expected = save(tmp_path)
    assert load_tokenizer(tmp_path).encode("two cups<|im_end|>") == expected.encode("two cups<|im_end|>")


def test_code_is_passed_over_where_the_data_is_enough(tmp_path):
    expected = save(tmp_path)
    name_code(tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == expected.get_vocab()


def test_code_alone_is_refused(tmp_path):
    name_code(tmp_path)
    with pytest.raises(ValueError, match="without running its code.*tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("absent", NEEDED_TOKENS)
def test_every_needed_token_is_asked_for(tmp_path, absent):
    save(tmp_path, [token for token in NEEDED_TOKENS if token != absent])
    for path in tmp_path.glob("tokenizer*.json"):
        path.write_text(path.read_text().replace(absent, "<other>"))
    with pytest.raises(ValueError, match="no token " + absent.replace("|", r"\|")):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory):
    """A folder like InternLM2's: tokenizer.model, tokens on top of it, and a class that is code."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="tokenizer.model is read by the sentencepiece package")
    folder = tmp_path_factory.mktemp("internlm2")
    text = folder / "text.txt"
    text.write_text("\n".join([*SAMPLES, "Which cup is in front of the box behind the plate?"] * 40))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=320, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=False, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        character_coverage=0.99,
    )  # fmt: skip
    names = dict(enumerate(["<unk>", "<s>", "</s>"])) | dict(enumerate(NEEDED_TOKENS, 320))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    values = {
        "added_tokens_decoder": {str(i): {"content": name, "special": True, **flags} for i, name in names.items()},
        "additional_special_tokens": list(NEEDED_TOKENS), "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>",
        "unk_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    name_code(folder)
    return folder


def test_sentencepiece_file_gives_the_original_ids(internlm2):
    from sentencepiece import SentencePieceProcessor

    original = SentencePieceProcessor(model_file=str(internlm2 / "tokenizer.model"))
    tokenizer = load_tokenizer(internlm2)
    text = "Is the  12th cup\nnearer than the naïve 🙂 box?"
    assert tokenizer.encode(text, add_special_tokens=False) == original.encode(text)
    assert tokenizer.decode(original.encode(text)) == text
    assert tokenizer.convert_tokens_to_ids(list(NEEDED_TOKENS)) == list(range(320, 325))
    assert tokenizer.encode("<|im_start|>a", add_special_tokens=False) == [323, *original.encode("a")]


def test_without_the_sentencepiece_package_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    name_code(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match="sentencepiece"):
        load_tokenizer(tmp_path)
