"""What must not be published: tokens, keys and passwords, and the names of this machine's folders.

A finding names file, line and kind, never the secret itself.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import get_token

KINDS = {
    "a token of the Hub": rb"\bhf_[A-Za-z0-9]{30,}",
    "a key of Amazon's": rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a token of GitHub's": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{50,})",
    "a token of GitLab's": rb"\bglpat-[A-Za-z0-9_-]{20,}",
    "a key of Google's": rb"\bAIza[A-Za-z0-9_-]{35}",
    "a token of Slack's": rb"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a secret key": rb"\bsk-[A-Za-z0-9_-]{32,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": rb"\bhttps?://[^\s/:@\"']+:[^\s/:@\"']{3,}@",
}
NAMES = {".env", ".netrc", ".git-credentials", "id_rsa", "id_ed25519", "stored_tokens", "token"}
SUFFIXES = {".pem", ".key", ".p12", ".pfx", ".keystore"}
TELLING = re.compile(r"(TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY)(_ID)?$")  # of environment variables
SHORTEST = 12  # a value shorter than this is no secret, or is found everywhere
BLOCK, OVERLAP = 1 << 22, 1 << 10
PATHS_IN = {".json", ".jsonl", ".yaml", ".yml", ".md", ".txt", ".ipynb"}
VOCABULARY = {"tokenizer.json", "vocab.json", "merges.txt"}  # which may know any word


def scan_secrets(folder: Path, machine: Iterable[Path] = ()) -> list[str]:
    """One sentence for each thing that should not leave this machine.

    machine: folders whose names no text may hold, besides the home folder.
    """
    wanted = {kind: re.compile(pattern) for kind, pattern in KINDS.items()} | {
        f"the value of {name}": re.compile(re.escape(value.encode())) for name, value in _own_secrets()
    }
    home = os.path.expanduser("~")  # which stays `~` for a user without one
    homes = {str(path).rstrip("/") + "/" for path in (home, *machine)} - {"/", "~/"}
    places = re.compile(b"|".join(re.escape(home.encode()) for home in sorted(homes)) or rb"(?!)")
    problems = []
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.name.lower() in NAMES or path.suffix.lower() in SUFFIXES:
            problems.append(f"{name}: is called like a file of secrets; take it out")
            continue
        kinds = dict(wanted)
        if path.suffix.lower() in PATHS_IN and path.name not in VOCABULARY:
            kinds["the name of a folder of this machine"] = places
        found = {(kind, line) for kind, line in _search(path, kinds)}
        problems += [f"{name}, line {line}: holds {kind}; take it out" for kind, line in sorted(found)]
    return problems


def _own_secrets() -> Iterator[tuple[str, str]]:
    values = {name: value for name, value in os.environ.items() if TELLING.search(name.upper())}
    values["the Hub's login"] = get_token() or ""
    yield from ((name, value) for name, value in values.items() if len(value) >= SHORTEST)


def _search(path: Path, kinds: dict[str, re.Pattern]) -> Iterator[tuple[str, int]]:
    line = 1
    for block, fresh in _blocks(path):
        for kind, pattern in kinds.items():
            for match in pattern.finditer(block):
                yield kind, line + block.count(b"\n", 0, match.start())
        line += block.count(b"\n", 0, fresh)


def _blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """Pieces that overlap, each with where the next one begins in it.  Weights are numbers behind a header of text."""
    if path.suffix == ".parquet":
        yield from ((text, len(text)) for text in _texts(path))
        return
    with open(path, "rb") as file:
        left = 8 + int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else path.stat().st_size
        file.seek(0)
        kept = b""
        while left > 0 and (data := file.read(min(BLOCK, left))):
            left -= len(data)
            block = kept + data
            fresh = max(0, len(block) - OVERLAP) if left > 0 else len(block)
            yield block, fresh
            kept = block[fresh:]


def _texts(path: Path) -> Iterator[bytes]:
    """The columns of text of a Parquet file, which are compressed in it, a row to a line."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        texts = [
            file.schema.column(index).path
            for index in range(len(file.schema.names))
            if file.schema.column(index).logical_type.type == "STRING"
        ]
        for batch in file.iter_batches(batch_size=256, columns=texts):
            yield b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in batch.to_pylist())
