"""Checksums of a model folder: safetensors notices a cut file, but no library notices a flipped bit.

`manifest.json` lists every file of the folder with its size and SHA-256. It is written last, so that a folder with a
manifest that verifies is a whole one. Hidden files and Python's caches are not part of a model and are left out.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

MANIFEST_NAME = "manifest.json"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"}
# Torch's old format and every pickle since protocol 2 open with 0x80 and the protocol; torch's newer one is a zip.
PICKLE_STARTS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
ZIP_START = b"PK\x03\x04"
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
BLOCK = 1 << 20


def write_manifest(folder: str | os.PathLike, progress: Callable[[int], object] | None = None) -> Path:
    """Write `manifest.json` into `folder` and return its path. `progress` is told the size of each block read."""
    folder = _existing_folder(folder)
    files = {}
    for name in list_files(folder):
        path = folder / name
        files[name] = {"size": path.stat().st_size, "sha256": _sha256(path, progress)}
    target = folder / MANIFEST_NAME
    half_written = target.with_name(f".{MANIFEST_NAME}.incomplete")
    with open(half_written, "w", encoding="utf-8") as file:
        json.dump({"format": 1, "files": files}, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(half_written, target)
    return target


def verify_manifest(folder: str | os.PathLike, progress: Callable[[int], object] | None = None) -> list[str]:
    """One sentence per problem: a file missing, extra or changed, or an unusable manifest. Empty: all is well."""
    folder = _existing_folder(folder)
    try:
        listed = _read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    problems, found = [], set(list_files(folder))
    for name in sorted(found - set(listed)):
        problems.append(f"{name}: is not listed in {MANIFEST_NAME}")
    for name, entry in sorted(listed.items()):
        if name not in found:
            problems.append(f"{name}: is listed in {MANIFEST_NAME} but missing")
            continue
        size = (folder / name).stat().st_size
        if size != entry["size"]:
            problems.append(f"{name}: has {size} bytes, expected {entry['size']}")
        elif _sha256(folder / name, progress) != entry["sha256"]:
            problems.append(
                f"{name}: has the right size but other content (SHA-256 differs): download or write it again"
            )
    return problems


def scan_pickles(folder: str | os.PathLike) -> list[str]:
    """One sentence per file that is, or could be read as, a pickle: by its name, by its first bytes, or by its place.

    Nothing is unpickled. A `.safetensors` file that does not open with a safetensors header is reported too.
    """
    folder, problems = _existing_folder(folder), []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            start = file.read(9)
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in PICKLE_SUFFIXES:
            problems.append(
                f"{name}: {path.suffix} files can run code when they are loaded; only safetensors is allowed"
            )
        elif start.startswith(PICKLE_STARTS) or start.startswith(ZIP_START):
            problems.append(f"{name}: opens like a pickle or an archive of pickles, whatever its name says")
        elif path.suffix.lower() == ".safetensors" and not _opens_like_safetensors(start, path.stat().st_size):
            problems.append(f"{name}: is not a safetensors file (header missing or larger than the file)")
    return problems


def list_files(folder: Path) -> list[str]:
    """Names of the folder's files as the manifest writes them, sorted, with `/` between the parts."""
    names = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if path.is_file() and not hidden and name.as_posix() != MANIFEST_NAME:
            names.append(name.as_posix())
    return sorted(names)


def _existing_folder(folder) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name the folder that holds config.json and the weights")
    return folder


def _read_manifest(folder: Path) -> dict[str, dict]:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(f"{MANIFEST_NAME}: missing, so the folder cannot be verified")
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        entries = {name: {"size": entry["size"], "sha256": entry["sha256"]} for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST_NAME}: cannot be read ({type(error).__name__}: {error})") from error
    for name in entries:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise ValueError(f"{MANIFEST_NAME}: names {name!r}, which is outside the folder")
    return entries


def _sha256(path: Path, progress: Callable[[int], object] | None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def _opens_like_safetensors(start: bytes, size: int) -> bool:
    header = int.from_bytes(start[:8], "little")
    return len(start) == 9 and start[8:] == b"{" and header <= min(size - 8, LARGEST_HEADER)
