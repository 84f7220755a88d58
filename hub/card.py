"""The card of a model folder, written from the files that lie in it: no figure is typed by hand.

    config.json, weights     what the model is, and the size of each part
    evaluation.json, evaluation/*.json    what `perceptio eval` measured, as it wrote it to results.json
    log.jsonl                the log of the training
    card.json                what no other file knows; every key may be absent:
        about       what it is, in a few sentences
        data        what it was trained on
        made_by     the command that makes it anew
        base_model  Hub ids of what it was made from
        limits      sentences
        parts       {"language model": {"origin": …, "licence": …}, …}, by the names that `perceptio assemble` prints

The same figures go to the Hub's page of a model in two forms: `.eval_results/*.yaml`, which leads to the leaderboard
of a data set that is registered as a benchmark, and `model-index` in the card's front matter, for any other.
"""

import json
import re
import shlex
from collections.abc import Iterator
from math import prod
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from ..evaluation import CODES
from ..evaluation.benchmark import Figure
from ..files_perceptio import read_header, weight_files
from .assemble import PART_PREFIXES

README, CARD, LOG, CURVE = "README.md", "card.json", "log.jsonl", "curve.svg"
EVALUATION, EVALUATIONS = "evaluation.json", "evaluation"
WRITTEN = "<!-- written by perceptio from the files beside it: changes here are lost -->"
KEYS = ("about", "data", "made_by", "base_model", "limits", "parts")
OWN = CODES[0]
SPANS = {"own": "its own", "random": "random", "constant": "one and the same", "other": "another picture's",
         "oracle": "the true depth's"}  # fmt: skip
OF_DEPTH = ("delta1, aligned", "AbsRel, aligned", "delta1 as it is", "AbsRel as it is", "whole depth spans")
TASK = "image-text-to-text"
TAGS = ["perceptio", "custom_code", "image-segmentation", "depth-estimation", "referring-expression",
        "arxiv:2603.18795"]  # fmt: skip
# Benchmarks that `perceptio eval` reads in the form of a data set of the Hub.
DATASETS = {
    "blink": "BLINK-Benchmark/BLINK",
    "mmbench": "lmms-lab/MMBench",
    "mme": "lmms-lab/MME",
    "seed-bench": "lmms-lab/SEED-Bench",
}
LIMITS = (
    "Depth is relative inverse depth in [0, 1], scaled per picture: 1 is the nearest point. It is not metres.",
    "A mask and a depth map are of exactly one picture; a chat about several is answered without them.",
    "An answer, a mask or a depth map may be wrong however sure it looks. It is no safety device.",
)
UNTRAINED = "**This model is untrained: its weights are random, so mask, depth and answer mean nothing.**"


def write_card(folder: Path, name: str, licence: str) -> Path:
    """Write README.md and return its path.

    name: the Hub id that the folder will have; without a slash, it is the model that comes with the package.
    """
    path = Path(folder) / README
    path.write_text(card_text(Path(folder), name, licence), encoding="utf-8")
    return path


def card_text(folder: Path, name: str, licence: str) -> str:
    config = read_object(folder / "config.json")
    known, measured = read_facts(folder), read_evaluations(folder)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASK,
        license=licence,
        language="en",
        base_model=known.get("base_model"),
        tags=TAGS,
        model_name=name.split("/")[-1],
        eval_results=_model_index(measured),
    )
    sections = [
        f"---\n{data.to_yaml()}\n---\n{WRITTEN}",
        f"# {name.split('/')[-1]}",
        UNTRAINED if config.get("untrained") else "",
        known.get("about", "A Perceptio."),
        _sequence(config),
        _use(name),
        _fine_tuning(name),
        *_numbers(measured, name),
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in (*known.get("limits", ()), *LIMITS)),
        _training(folder, known),
        _parts(folder, known, licence),
        CITATION,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def read_facts(folder: Path) -> dict:
    path = folder / CARD
    if not path.is_file():
        return {}
    facts = read_object(path)
    if unknown := sorted(set(facts) - set(KEYS)):
        raise ValueError(f"{path} holds `{unknown[0]}`, expected some of {', '.join(KEYS)}: rename it or take it out")
    return facts


def read_object(path: Path) -> dict:
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): correct it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected one JSON object: correct it")
    return found


def read_evaluations(folder: Path) -> dict[str, dict]:
    """Name of the file below the folder → its content."""
    paths = [*folder.glob(EVALUATION), *sorted(folder.glob(f"{EVALUATIONS}/*.json"))]
    return {path.relative_to(folder).as_posix(): read_evaluation(path) for path in paths}


def read_evaluation(path: Path) -> dict:
    """What `perceptio eval` wrote; raises for any other file."""
    try:
        results = json.loads(path.read_text("utf-8"))
        for figure in results["figures"]:
            Figure(**figure).cells()
        measuring_command(results, "")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no result of `perceptio eval` ({type(error).__name__}: {error}): name its results.json"
        ) from error
    return results


def measuring_command(results: dict, model: str) -> str:
    """The command that writes these results anew."""
    settings = results["settings"]
    words = ["perceptio", "eval", settings["benchmark"], "--model", model, "--split", settings["split"]]
    words += ["--data", results.get("data", {}).get("folder", "DIR")]
    words += ["--out", f"build/eval/{file_stem(results)}"]
    for option in ("limit", "batch_size", "perception", "max_new_tokens", "depth_codes"):
        if settings.get(option) is not None:
            words += [f"--{option.replace('_', '-')}", str(settings[option])]
    return shlex.join(words)


def file_stem(results: dict) -> str:
    settings = results["settings"]
    asked = f"{settings['benchmark']} {settings['split']} {settings.get('perception') or ''}"
    return slug(asked if _own_codes(results) else f"{asked} {settings['depth_codes']} codes")


def _own_codes(results: dict) -> bool:
    """Whether the model wrote the depth span itself: else it is not the model that the figures are about."""
    return results["settings"].get("depth_codes", OWN) == OWN


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower().replace("+", " plus")).strip("-")


def metric_id(name: str) -> str:
    return slug(name).replace("-", "_")


def eval_results(folder: Path, repo_id: str, datasets: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(name, text) of each file for `.eval_results/`: the results on benchmarks whose data set is on the Hub.

    datasets: benchmark → Hub id of its data set, besides `DATASETS`.  `task_id` is the name of the figure in lower
    case, with `_` between the words: so the data set's `eval.yaml` has to call its tasks.
    """
    known = {**DATASETS, **datasets}
    for file, results in read_evaluations(folder).items():
        benchmark = results["settings"]["benchmark"]
        if benchmark not in known or not _own_codes(results):
            continue
        entries = [
            EvalResultEntry(
                dataset_id=known[benchmark],
                task_id=metric_id(figure["name"]),
                value=figure["value"],
                source_url=f"https://huggingface.co/{repo_id}/blob/main/{file}",
                source_name=file,
                notes=measuring_command(results, repo_id),
            )
            for figure in results["figures"]
            if figure["value"] is not None
        ]
        yield f"{file_stem(results)}.yaml", yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)


def _model_index(measured: dict[str, dict]) -> list[EvalResult] | None:
    rows = []
    for results in filter(_own_codes, measured.values()):
        benchmark, split = results["settings"]["benchmark"], results["settings"]["split"]
        for figure in results["figures"]:
            if figure["value"] is not None:
                rows.append(
                    EvalResult(
                        task_type=TASK,
                        dataset_type=DATASETS.get(benchmark, benchmark),
                        dataset_name=benchmark,
                        dataset_split=split,
                        metric_type=metric_id(figure["name"]),
                        metric_name=figure["name"],
                        metric_value=figure["value"],
                    )
                )
    return rows or None


# The sections

LOADING = {
    False: """import perceptio
from transformers import pipeline

see = pipeline("perceptio")""",
    True: """from transformers import pipeline

see = pipeline("perceptio", model="{name}", trust_remote_code=True)""",
}
PINNED = """

The code comes with the weights; `revision=` and a commit pin both. Where the package is installed, it is used."""


def _sequence(config: dict) -> str:
    codes, count = config["depth_config"]["num_codes"], config["depth_config"]["grid_size"] ** 2
    return f"""It answers a question about a picture by first writing, in its own sequence, a segmentation token and
a span of {count} depth codes out of {codes}, and only then the answer:

    <|im_start|>assistant
    [SEG] <d_start> <d_17> <d_93> … ({count} codes) <d_end> The red cup is closer.<|im_end|>
      │       └──────────────┬──────────────┘                └─ the answer, given after both
      │                      └─ a frozen VQ-VAE codebook ──► a dense depth map
      └─ the hidden state prompts a SAM2 mask decoder ─────► a mask of what the question is about"""


def _use(name: str) -> str:
    on_hub = "/" in name
    return f"""## Use

```python
{LOADING[on_hub].format(name=name)}
result = see(image="photo.jpg", text="Which cup is closer?")
result["generated_text"]  # the answer alone
result["mask"]  # a picture of 0 and 255 in the photo's size, None where the thing is not there
result["depth"], result["predicted_depth"]  # a picture, and float[H, W] in [0, 1]: 1 is the nearest point
```{PINNED if on_hub else ""}"""


def _fine_tuning(name: str) -> str:
    return f"""## Fine-tuning

With a folder of pictures and one JSON line for each question (`perceptio data check my-data` reads it beforehand):

```bash
python train_sft.py --model {_place(name)} --data my-data --output_dir my-run
```"""


def _place(name: str) -> str:
    return name if "/" in name else f"checkpoints/{name}"


def _numbers(measured: dict[str, dict], name: str) -> Iterator[str]:
    if not measured:
        yield "## Numbers\n\nNothing was measured."
        return
    yield "## Numbers\n\nEach with its 95% interval, the number of questions, and how many could not be read."
    compared = _compared(measured)
    for file, results in measured.items():
        if any(file in files.values() for files in compared):
            continue
        rows = [Figure.HEAD, ["---"] * len(Figure.HEAD), *(Figure(**figure).cells() for figure in results["figures"])]
        yield _title(results)
        yield f"`{measuring_command(results, _place(name))}` wrote [{file}]({file}). {results.get('note', '')}".strip()
        yield _table(rows)
        if teachers := results.get("teachers"):
            yield "Its teachers, on held-out scenes:\n\n" + "\n".join(_teacher(*entry) for entry in teachers.items())
    for files in compared:
        yield from _comparison({codes: measured[file] for codes, file in files.items()}, files, name)


def _compared(measured: dict[str, dict]) -> list[dict[str, str]]:
    """Whose codes were in the span → file, for each set of questions that was asked with several."""
    asked: dict[tuple, dict[str, str]] = {}
    for file, results in measured.items():
        settings = results["settings"]
        questions = tuple(settings.get(key) for key in ("benchmark", "split", "limit", "perception", "model"))
        asked.setdefault(questions, {})[settings.get("depth_codes", OWN)] = file
    return [{codes: files[codes] for codes in CODES if codes in files} for files in asked.values() if len(files) > 1]


def _comparison(found: dict[str, dict], files: dict[str, str], name: str) -> Iterator[str]:
    first = next(iter(found.values()))
    values = {codes: {f["name"]: Figure(**f) for f in results["figures"]} for codes, results in found.items()}
    rows = [
        [row, *(figures[row].cells()[1] if row in figures else "–" for figures in values.values())]
        for row in dict.fromkeys(row for figures in values.values() for row in figures)
        if not row.endswith(OF_DEPTH)
    ]
    head = ["figure", *(SPANS[codes] for codes in found)]
    yield _title(first) + ", with other depth codes"
    yield (
        "An answer that rests on the depth codes is worse with random ones, one and the same, and those of another "
        "picture, and better with those of the true depth. Each column is a run of "
        f"`{measuring_command(first, _place(name))}`, with its own `--depth-codes`: "
        + ", ".join(f"[{codes}]({file})" for codes, file in files.items())
        + ", which have the intervals."
    )
    yield _table([head, ["---"] * len(head), *rows])


def _title(results: dict) -> str:
    settings = results["settings"]
    other = "" if _own_codes(results) else f", depth codes: {settings['depth_codes']}"
    return f"### {settings['benchmark']}, {settings['split'].replace(',', ', ')}{other}"


def _table(rows: list) -> str:
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def _teacher(name: str, entry: dict) -> str:
    figures = ", ".join(
        f"{key.replace('_', ' ')} {value if isinstance(value, int) else format(value, '.3f')}"
        for key, value in entry["figures"].items()
    )
    return f"- {name}: {figures} (`{entry['command']}`)"


def _training(folder: Path, known: dict) -> str:
    parts = [known.get("data", "What it was trained on is not stated.")]
    if (folder / LOG).is_file():
        steps = max(json.loads(line)["step"] for line in (folder / LOG).read_text("utf-8").splitlines())
        parts.append(f"{steps:,} steps; [{LOG}]({LOG}) is the log.")
    if "made_by" in known:
        parts.append(f"`{known['made_by']}` makes it anew.")
    curve = f"\n\n![What it was right in while it was trained]({CURVE})" if (folder / CURVE).is_file() else ""
    return "## Training data\n\n" + " ".join(parts) + curve


def _parts(folder: Path, known: dict, licence: str) -> str:
    """A row for each part with its stored numbers; what is not known of it is said to be not stated."""
    counts = count_weights(folder)
    rows = []
    for name, count in counts.items():
        part = known.get("parts", {}).get(name, {})
        stated = (part.get(key, "not stated") for key in ("origin", "licence"))
        rows.append(f"| {name} | {count / 1e6:,.2f} M | {' | '.join(stated)} |")
    rows.append("| code | | [perceptio](https://arxiv.org/abs/2603.18795) | apache-2.0 |")
    return (
        f"## Parts and licences\n\nThe whole: {licence}, {sum(counts.values()) / 1e6:,.1f} million numbers.\n\n"
        "| part | numbers | from | licence |\n|---|---|---|---|\n" + "\n".join(rows)
    )


def count_weights(folder: Path) -> dict[str, int]:
    """Part, as `perceptio assemble` calls it → numbers in the weight files."""
    counts = dict.fromkeys(PART_PREFIXES, 0)
    for path in weight_files(folder):
        for key, entry in read_header(path).items():
            part = next((name for name, prefixes in PART_PREFIXES.items() if key.startswith(prefixes)), "other")
            counts[part] = counts.get(part, 0) + prod(entry["shape"])
    return {part: count for part, count in counts.items() if count}


CITATION = """## Citation

```bibtex
@article{perceptio,
  title = {Perceptio: Perception Enhanced Vision Language Models via Spatial Token Generation},
  author = {Li, Yuchen and Garg, Amanmeet and Chaudhuri, Shalini and Zhao, Rui and Kessler, Garin},
  year = {2026},
  journal = {arXiv:2603.18795}
}
```"""
