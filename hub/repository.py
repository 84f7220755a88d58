"""A folder of this machine → the folder that goes to the Hub: whole, without anything that is not meant for others.

Files are linked where they stay as they are, so that nothing large is written twice.  The same folder gives the same
bytes each time, which is what makes an upload resumable.
"""

import ast
import importlib.metadata
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import RepoCard

from ..data.manifest import write_json
from ..files_perceptio import INDEX_FILE, check_weight_files, copy_code, read_header, weight_files
from .card import (
    CARD,
    EVALUATIONS,
    README,
    WRITTEN,
    eval_results,
    file_stem,
    read_evaluation,
    read_facts,
    read_object,
    write_card,
)
from .manifest import MANIFEST_NAME, scan_pickles, verify_manifest, write_manifest
from .push import check_base_is_public
from .weights import SafetensorsFolder, parse_size, write_shards

LICENSE, APACHE = "LICENSE", "apache-2.0"
NEEDED = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
          "chat_template.jinja")  # fmt: skip
TAKEN = (*NEEDED, "additional_chat_templates/*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json",
         "merges.txt", "*.model", CARD, "evaluation.json", f"{EVALUATIONS}/*.json", "log.jsonl", "recipe.yaml",
         LICENSE, "NOTICE", "notebook.ipynb", "*.svg", "*.png", "*.jpg", "*.jpeg", "*.webp")  # fmt: skip
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
BESIDE_DATA = (LICENSE, "NOTICE", "eval.yaml", "*.svg", "*.png", "*.jpg", "*.webp")
OUR_TITLES = (WRITTEN, "# A Perceptio, fine-tuned\n")  # of cards that are written anew
# What an earlier push may have left and this one does not bring.
STALE = {
    "model": ["model*.safetensors", INDEX_FILE, "adapter_config.json", "adapter_model*",
              ".eval_results/*", f"{EVALUATIONS}/*.json"],
    "dataset": ["data/*.parquet"],
    "space": [],
}  # fmt: skip


@dataclass(frozen=True)
class Wish:
    """What a person asks for besides the folder.

    licence: identifier of the Hub; None takes the one that the folder's README.md states.
    results: results.json of `perceptio eval`, for the card and the Hub's tables.
    datasets: benchmark → Hub id of its data set, see `eval_results`.
    """

    repo_id: str
    licence: str | None = None
    results: tuple[Path, ...] = ()
    datasets: dict[str, str] = field(default_factory=dict)
    max_shard_size: str = "5GB"


def guess_kind(folder: Path) -> str:
    if not folder.is_dir():
        raise FileNotFoundError(f"FOLDER is {folder}, expected a folder: name one of a model, a data set or a Space")
    manifest = folder / MANIFEST_NAME
    if (folder / "app.py").is_file():
        return "space"
    if manifest.is_file() and '"splits"' in manifest.read_text("utf-8"):
        return "dataset"
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return "model"
    raise ValueError(
        f"{folder} holds neither config.json (a model), a manifest of shards (a data set) nor app.py (a Space): name "
        "another folder, or say which with --type"
    )


def build(kind: str, folder: Path, out: Path, wish: Wish) -> list[str]:
    """Write the repository into `out`, an empty folder; returns the names of what was left out."""
    if problems := scan_pickles(folder):
        raise ValueError(f"{folder} is not pushed: {problems[0]}; take that file out")
    is_whole = kind == "model" and not (folder / "adapter_config.json").is_file()
    if (wish.results or wish.datasets) and not is_whole:
        raise ValueError(f"--results and --benchmark are for a whole model, and {folder} is none: leave them out")
    BUILDERS[kind](folder, out, wish)
    shards = {path.name for path in weight_files(folder)} | {INDEX_FILE}  # which may have been cut anew
    return sorted(set(list_all(folder)) - set(list_all(out)) - shards)


def list_all(folder: Path) -> dict[str, int]:
    """Name → size of every file, hidden ones too, but for caches and what git and the Hub's client keep."""
    skipped = {".git", ".cache", "__pycache__"}
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name.as_posix(): path.stat().st_size for name, path in paths.items() if not skipped & set(name.parts)}


# Models


def build_model(folder: Path, out: Path, wish: Wish) -> None:
    if (folder / "adapter_config.json").is_file():
        return _build_adapter(folder, out, wish)
    _check_model(folder)
    _link_files(folder, out, TAKEN)
    copy_code(out)
    _place_weights(folder, out, wish.max_shard_size)
    known = read_facts(folder)
    stated = _front_matter(folder)
    if "base_model" in stated and "base_model" not in known:
        (out / CARD).unlink(missing_ok=True)
        write_json(out / CARD, known | {"base_model": stated["base_model"]})
    add_results(folder, wish.results, out)
    licence = _licence(folder, out, wish)
    if _is_by_hand(folder):
        _keep_card(folder, out, licence)
    else:
        write_card(out, wish.repo_id, licence)
    for name, text in eval_results(out, wish.repo_id, wish.datasets):
        (out / ".eval_results").mkdir(exist_ok=True)
        (out / ".eval_results" / name).write_text(text, encoding="utf-8")
    write_manifest(out)


def _build_adapter(folder: Path, out: Path, wish: Wish) -> None:
    check_base_is_public(read_object(folder / "adapter_config.json").get("base_model_name_or_path") or "")
    _check_whole(folder)
    _link_files(folder, out, (*TAKEN, *ADAPTER))
    copy_code(out)
    _keep_card(folder, out, _licence(folder, out, wish))
    write_manifest(out)


def _check_model(folder: Path) -> None:
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {missing[0]}, expected a whole Perceptio folder: save model and processor into it"
        )
    config = read_object(folder / "config.json")
    if config.get("model_type") != "perceptio":
        raise ValueError(f"`model_type` in {folder}/config.json is {config.get('model_type')!r}, expected 'perceptio'")
    if not weight_files(folder):
        raise FileNotFoundError(f"{folder} holds no weights in safetensors: save the model into it")
    check_weight_files(folder, expect_float="quantization_config" not in config)
    _check_whole(folder)


def _check_whole(folder: Path) -> None:
    """A card may be edited by hand; whatever else the manifest lists is as it was written."""
    if (folder / MANIFEST_NAME).is_file():
        found = [problem for problem in verify_manifest(folder) if "is not listed" not in problem]
        if changed := [problem for problem in found if not problem.startswith(f"{README}:")]:
            raise ValueError(f"{folder} is not as it was written: {changed[0]}; save it again")


def _place_weights(folder: Path, out: Path, max_shard_size: str) -> None:
    files, limit = weight_files(folder), parse_size(max_shard_size)
    if all(path.stat().st_size <= limit for path in files):
        return _link_files(folder, out, [*(path.name for path in files), INDEX_FILE])
    weights, sizes = SafetensorsFolder(folder), {}
    for path in files:
        for key, entry in read_header(path).items():
            sizes[key] = entry["data_offsets"][1] - entry["data_offsets"][0]
    write_shards(out, sizes, weights.__getitem__, limit)


def add_results(folder: Path, paths: tuple[Path, ...], out: Path) -> None:
    """Put what `perceptio eval` measured on the model of `folder` where the card of `out` finds it."""
    from ..evaluation.command import folder_hash

    own = folder_hash(folder) if paths else None  # reads all weights
    stems: dict[str, Path] = {}
    for path in paths:
        results = read_evaluation(path)
        if results["settings"].get("model") != own:
            raise ValueError(
                f"{path} was measured on the model {results['settings'].get('model')}, expected {own}, which {folder} "
                f"is: measure it with `perceptio eval {results['settings']['benchmark']} --model {folder}`"
            )
        stem = file_stem(results)
        if stem in stems:
            raise ValueError(
                f"{stems[stem]} and {path} answer the same questions, expected one of them: leave one out"
            )
        stems[stem] = path
        (out / EVALUATIONS).mkdir(exist_ok=True)
        write_json(out / EVALUATIONS / f"{stem}.json", results)


# Data sets and Spaces


def build_dataset(folder: Path, out: Path, wish: Wish) -> None:
    from ..data.card import WRITTEN as WRITTEN_DATA
    from ..data.card import write_card as write_data_card
    from ..data.manifest import check_shard, read_manifest, shard_entries
    from ..data.record import DataError

    entries = shard_entries(folder, manifest := read_manifest(folder))
    if not entries:
        raise ValueError(f"{folder} holds no shards, expected at least one: write it with `write_shards`")
    for entry in entries:
        if problem := check_shard(folder, entry, verify=True):
            raise DataError(problem)
    _link_files(folder, out, [*(entry["file"] for entry in entries), MANIFEST_NAME, *BESIDE_DATA])
    card = folder / README
    if card.is_file() and WRITTEN_DATA not in card.read_text("utf-8"):
        return _keep_card(folder, out, _licence(folder, out, wish))
    write_data_card(out, name=wish.repo_id)
    unknown = [source for part in manifest["splits"].values() for source in _unlicensed(part)]
    if wish.licence is not None:
        _keep_card(out, out, _licence(out, out, wish))
    elif unknown:
        raise ValueError(
            f"{folder} has rows of {unknown[0]!r} whose licence is unknown: state it in the records, or pass --license"
        )


def _unlicensed(split: dict) -> list[str]:
    return [source for source, licences in split["sources"].items() if "unknown" in licences]


def build_space(folder: Path, out: Path, wish: Wish) -> None:
    stated = _front_matter(folder)
    for key in ("title", "sdk"):
        if not stated.get(key):
            raise ValueError(f"{folder / README} has no `{key}` in its front matter, expected one: a Space needs it")
    app = folder / stated.get("app_file", "app.py")
    for path in (app, folder / "requirements.txt"):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, expected the Space's {path.name}: write it")
    try:
        ast.parse(app.read_text("utf-8"))
    except SyntaxError as error:
        raise ValueError(f"{app} is no Python file ({error}): correct it") from error
    _link_files(folder, out, [name for name in list_all(folder) if not name.startswith(".") and name != README])
    _keep_card(folder, out, _licence(folder, out, wish))


BUILDERS: dict[str, Callable[[Path, Path, Wish], None]] = {
    "model": build_model,
    "dataset": build_dataset,
    "space": build_space,
}


# Cards and files


def _front_matter(folder: Path) -> dict:
    path = folder / README
    if not path.is_file():
        return {}
    try:
        return RepoCard(path.read_text("utf-8"), ignore_metadata_errors=False).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the front matter of {path} cannot be read ({error}): correct it") from error


def _is_by_hand(folder: Path) -> bool:
    path = folder / README
    return path.is_file() and not any(title in path.read_text("utf-8") for title in OUR_TITLES)


def _licence(folder: Path, out: Path, wish: Wish) -> str:
    """The licence, with its text beside it; nobody may use what has none."""
    licence = wish.licence or _front_matter(folder).get("license")
    if not licence:
        raise ValueError(f"{folder} states no licence: pass --license, for example --license {APACHE}")
    if not (out / LICENSE).is_file() and licence == APACHE:
        (out / LICENSE).write_text(_apache(), encoding="utf-8")
    return licence


def _apache() -> str:
    """From the repository, or from what pip installed of it."""
    beside = Path(__file__).parents[1] / LICENSE
    installed = importlib.metadata.distribution("perceptio")
    places = (f"licenses/{LICENSE}", LICENSE)  # of newer and older build tools
    text = (
        beside.read_text("utf-8") if beside.is_file() else next(filter(None, map(installed.read_text, places)), None)
    )
    if not text:
        raise FileNotFoundError(f"the text of {APACHE} was not installed: put it into the folder as {LICENSE}")
    return text


def _keep_card(folder: Path, out: Path, licence: str) -> None:
    """A card that is there already, with the licence in its front matter."""
    path = folder / README
    card = RepoCard(path.read_text("utf-8") if path.is_file() else "---\n---\n")
    card.data["license"] = licence
    (out / README).unlink(missing_ok=True)
    (out / README).write_text(str(card), encoding="utf-8")


def _link_files(folder: Path, out: Path, patterns) -> None:
    for name in list_all(folder):
        if not any(name == pattern or _fits(name, pattern) for pattern in patterns):
            continue
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link((folder / name).resolve(), target)
        except OSError:
            shutil.copyfile(folder / name, target)


def _fits(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)
