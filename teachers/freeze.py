"""Freeze a trained part of perceptio-tiny, so that a language model can be trained on it without its own training.

    python -m perceptio.teachers.freeze build/tiny/sam-whole checkpoints/sam-tiny --first build/tiny/sam
    python -m perceptio.teachers.freeze build/tiny/vision-large checkpoints/vision-tiny --first build/tiny/vision

Writes the weights in half precision, the figures on held-out scenes, the log of the training, a card and checksums.
`python -m perceptio.hub.train_tiny --frozen` begins with these, and `--start` of the trainers goes on from one.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..cli import refuse
from ..data.manifest import write_json
from ..hub.assemble import put_in_place
from ..hub.manifest import write_manifest
from ..modeling_convolutions import PerceptioMaskModel, PerceptioVisionModel
from ..training.checkpoints import STATE, checkpoints

KINDS = {"sam2": PerceptioMaskModel, "internvl_vision": PerceptioVisionModel}
FIGURES, LOG = "evaluation.json", "log.jsonl"
CARD = """---
library_name: transformers
license: apache-2.0
tags: [perceptio]
---
# {name}

A part of perceptio-tiny that stays frozen while the rest is trained: a `{kind}` of {count:,} parameters, trained
from nothing on rendered scenes in {steps:,} steps ({log}). The weights are stored in half precision.

```python
import torch
from perceptio.modeling_convolutions import {kind}

model = {kind}.from_pretrained(folder, dtype=torch.float32)
```

On held-out scenes, before the weights were rounded:

| figure | value |
|---|---|
{rows}
"""


def freeze(run: Path, folder: Path, first: Sequence[Path] = ()) -> Path:
    """run: the output folder of a trainer of `perceptio.teachers`, finished.  first: those of the trainings that it
    went on from, or what was frozen of them.  A folder that is there is replaced at the end."""
    model = load_part(run / "model")
    found = [name for name, weight in model.state_dict().items() if not torch.isfinite(weight).all()]
    if found:
        raise ValueError(f"`{found[0]}` holds NaN or infinite values: this training did not end well")
    figures = json.loads((run / "model" / FIGURES).read_text("utf-8"))
    log = [line for one in (*first, run) for line in _log(one)]
    half = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(half, ignore_errors=True)
    model.half().save_pretrained(half)
    write_json(half / FIGURES, figures)
    (half / LOG).write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    (half / "README.md").write_text(_card(folder.name, model, figures, log), encoding="utf-8")
    write_manifest(half)
    put_in_place(half, folder)
    return folder


def load_part(folder) -> PreTrainedModel:
    """A segmenter or a vision tower in float32, whatever it is stored in."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json, expected the folder of a segmenter or a vision tower")
    kind = json.loads(path.read_text("utf-8")).get("model_type")
    if kind not in KINDS:
        raise ValueError(f"{folder} holds a model of the type {kind!r}, expected one of {', '.join(KINDS)}")
    return KINDS[kind].from_pretrained(folder, dtype=torch.float32)


def _log(folder: Path) -> list[dict]:
    if (folder / LOG).is_file():
        return [json.loads(line) for line in (folder / LOG).read_text("utf-8").splitlines()]
    return json.loads((checkpoints(folder)[-1] / STATE).read_text("utf-8"))["log_history"]


def _card(name: str, model: PreTrainedModel, figures: dict, log: list[dict]) -> str:
    rows = [f"| {key.replace('_', ' ')} | {value if isinstance(value, int) else format(value, '.3f')} |"
            for key, value in figures.items()]  # fmt: skip
    told = [line["step"] for line in log]
    ends = [step for step, after in pairwise([*told, 0]) if after < step]  # every training begins at the first step
    return CARD.format(
        name=name,
        kind=type(model).__name__,
        count=sum(weight.numel() for weight in model.parameters()),
        steps=sum(ends),
        log=LOG,
        rows="\n".join(rows),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of perceptio.teachers.sam or .vision")
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--first", type=Path, nargs="+", default=[], metavar="DIR",
                        help="output or frozen folders of the trainings that RUN goes on from")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        freeze(options.run, options.folder, options.first)
    except (ValueError, OSError, IndexError) as error:
        return refuse(ValueError(f"{options.run} does not hold a finished training: {error}"))
    print(f"wrote {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
