"""The manifest of a folder of shards: every file with its size and SHA-256, and what its rows hold."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path, PurePosixPath

from .record import COLUMNS, DataError, Problem
from .tally import Tally

FORMAT = 1  # of the manifest and of the columns
MANIFEST = "manifest.json"
BLOCK = 1 << 20


def check_shard(folder: Path, entry: dict, verify: bool = False) -> Problem | None:
    """What is wrong with the file of one shard; `verify` reads it all."""
    path = folder / entry["file"]
    if not path.is_file():
        return Problem(str(path), None, "file", "missing", f"{entry['bytes']} bytes", "fetch or write it again")
    if path.stat().st_size != entry["bytes"]:
        found = f"{path.stat().st_size} bytes"
        return Problem(str(path), None, "file", found, f"{entry['bytes']} bytes", "fetch or write it again")
    if verify and (found := sha256(path)) != entry["sha256"]:
        return Problem(
            str(path), None, "file", f"SHA-256 {found[:12]}…", f"{entry['sha256'][:12]}…", "fetch or write it again"
        )
    return None


def check_codebook(folder, manifest: dict, codebook: str | None) -> None:
    if codebook is not None and manifest["codebook"] not in (None, codebook):
        raise DataError(
            f"the depth codes of {folder} belong to the codebook {manifest['codebook']}, expected {codebook}: label "
            "the data again with this model's depth tokenizer"
        )


def shard_entries(folder, manifest: dict, split: str | None = None) -> list[dict]:
    if split is not None and split not in manifest["splits"]:
        names = ", ".join(manifest["splits"]) or "none"
        raise DataError(f"{folder} has no split {split!r}, expected one of: {names}")
    names = manifest["splits"] if split is None else [split]
    return [entry for name in names for entry in manifest["splits"][name]["shards"]]


def join_summaries(parts: list[dict], tally: Tally | dict | None, name: str) -> dict:
    """One split from the summaries of its shards, whose codebooks must agree.

    `sources` counts the rows of each source by licence.
    """
    counts = ("rows", "pictures", "masks", "depth", "depth_codes")
    joined: dict = {**dict.fromkeys(counts, 0), "bytes": 0, "codebook": None, "shards": []}
    sources: dict[str, Counter] = {}
    perception: Counter = Counter()
    for part in parts:
        for key in counts:
            joined[key] += part[key]
        for source, licences in part["sources"].items():
            sources.setdefault(source, Counter()).update(licences)
        perception.update(part["perception"])
        joined["shards"] += part["shards"]
        joined["codebook"] = _one_codebook(joined["codebook"], part["codebook"], name)
    joined["bytes"] = sum(shard["bytes"] for shard in joined["shards"])
    joined["sources"] = {source: dict(sorted(sources[source].items())) for source in sorted(sources)}
    joined["perception"] = dict(sorted(perception.items()))
    if tally is None:
        tally = Tally(name)
        tally.keep(joined["rows"])
    joined["tally"] = tally.to_dict() if isinstance(tally, Tally) else tally
    return joined


def join_manifest(splits: dict[str, dict]) -> dict:
    codebook = None
    for name, entry in splits.items():
        codebook = _one_codebook(codebook, entry["codebook"], name)
    return {"format": FORMAT, "columns": list(COLUMNS), "codebook": codebook, "splits": dict(sorted(splits.items()))}


def _one_codebook(first: str | None, second: str | None, name) -> str | None:
    """The codebook of two parts of `name`, of which either may have no codes."""
    if first and second and first != second:
        raise DataError(
            f"{name} holds depth codes of the codebooks {first} and {second}, expected one: label all of it with the "
            "same depth tokenizer"
        )
    return first or second


def read_manifest(folder) -> dict:
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST}, expected a folder of shards: write it with `write_shards`")
    return parse_manifest(path.read_bytes(), path)


def parse_manifest(data: bytes, path) -> dict:
    try:
        return check_manifest(json.loads(data), path)
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no manifest of shards ({error}): write or fetch the folder again") from error


def check_manifest(manifest: dict, path) -> dict:
    if manifest["format"] != FORMAT:
        raise DataError(f"{path} has format {manifest['format']!r}, expected {FORMAT}: use the version that wrote it")
    for split in manifest["splits"].values():
        for entry in split["shards"]:
            name = PurePosixPath(entry["file"])
            if name.is_absolute() or ".." in name.parts or "\\" in entry["file"]:
                raise DataError(f"{path} names {entry['file']!r}, expected a file of the folder: do not trust it")
            if not isinstance(entry["rows"], int) or not isinstance(entry["bytes"], int):
                raise ValueError(f"rows and bytes of {entry['file']} are no whole numbers")
    return manifest


def write_manifest(folder: Path, manifest: dict) -> dict:
    write_json(folder / MANIFEST, manifest)
    return manifest


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all."""
    half = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    with open(half, "w", encoding="utf-8", newline="\n") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)


def sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
