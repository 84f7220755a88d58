"""The files of a Perceptio folder: which code it carries, and whether its weight files are whole."""

import json
import shutil
import struct
from pathlib import Path

from transformers.utils import cached_file

CODE_FILES = (
    "adapters_perceptio.py",
    "configuration_perceptio.py",
    "files_perceptio.py",
    "generation_perceptio.py",
    "losses_perceptio.py",
    "modeling_convolutions.py",
    "modeling_depth_vqvae.py",
    "modeling_perceptio.py",
    "pipeline_perceptio.py",
    "processing_perceptio.py",
)
INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
LONGEST_HEADER = 100_000_000  # the limit of the safetensors library itself


def copy_code(folder: str | Path, origin: str | None = None, revision: str | None = None) -> None:
    """Put the code next to the weights, so that the folder loads with `trust_remote_code` wherever it is copied to.

    As an installed package all files lie beside this one.  As remote code only those lie there which were imported so
    far; the others come from `origin`, the folder or Hub id that the model was loaded from.
    """
    for name in CODE_FILES:
        source = Path(__file__).parent / name
        if not source.is_file():
            if not origin:
                raise FileNotFoundError(
                    f"{name} is missing beside {__file__}: install perceptio, or load from a folder"
                )
            source = Path(cached_file(origin, name, revision=revision))
        target = Path(folder) / name
        if not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)


def weight_files(folder: str | Path) -> list[Path]:
    """The weight files of a folder, in order; raises where the index and the folder disagree."""
    folder = Path(folder)
    index = folder / INDEX_FILE
    if not index.is_file():
        return [folder / SINGLE_FILE] if (folder / SINGLE_FILE).is_file() else []
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a weight index ({error}): download or save the folder again") from error
    stray = sorted({path.name for path in folder.glob("model-*.safetensors")} - set(names))
    if stray:
        raise ValueError(f"{folder / stray[0]} is not in {INDEX_FILE}: remove it, or save the folder again")
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is outside the folder: the folder is not to be trusted")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is missing: download or save the folder again")
    found: dict[str, str] = {}
    for name in names:
        for key in read_header(folder / name):
            if key in found:
                raise ValueError(f"{key} is in both {found[key]} and {name} of {folder}: save the folder again")
            found[key] = name
    wrong = sorted(key for key in {*found, *weight_map} if found.get(key) != weight_map.get(key))
    if wrong:
        raise ValueError(
            f"{index} and the weight files disagree on {wrong[0]} (index: {weight_map.get(wrong[0])}, files: "
            f"{found.get(wrong[0])}): save the folder again"
        )
    return [folder / name for name in names]


def read_header(path: str | Path) -> dict[str, dict]:
    """Tensor name → {"dtype", "shape", "data_offsets"} of one safetensors file; raises unless the file is whole."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else LONGEST_HEADER
        if length > min(LONGEST_HEADER, max(size - 8, 0)):
            raise ValueError(f"{path} is no whole safetensors file ({size} bytes): download or save it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{path} has no readable safetensors header ({error}): download or save it again"
            ) from error
    if 8 + length + end != size:
        raise ValueError(f"{path} has {size} bytes, its header promises {8 + length + end}: download or save it again")
    return header


def check_weight_files(folder: str | Path, expect_float: bool = True) -> None:
    """Raise, naming the file, unless every weight file is whole, indexed, and of a floating type."""
    for path in weight_files(folder):
        for key, entry in read_header(path).items():
            if expect_float and not str(entry.get("dtype")).startswith(("F", "BF")):
                raise ValueError(
                    f"{key} in {path} is of type {entry.get('dtype')}, expected a floating type: pass the "
                    "`quantization_config` that it was saved with, or save it unquantized"
                )


__all__ = ["CODE_FILES", "check_weight_files", "copy_code", "read_header", "weight_files"]
