"""The mean of the weights of several states of one model, each trained to the end of its learning rate.

    python -m perceptio.hub.average build/mean build/tiny/run/model build/before/model

The folder is that of the first, with other weights, and a `mean.json` that says of what.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..cli import refuse
from ..modeling_perceptio import PerceptioForConditionalGeneration
from ..processing_perceptio import PerceptioProcessor
from .assemble import KEPT_FLOAT32
from .manifest import write_manifest

MEAN = "mean.json"


@torch.no_grad()
def average(folder: Path, states: Sequence[Path]) -> Path:
    """Write the folder.  Every state counts alike; all have the same parts and the same depth tokenizer."""
    if len(states) < 2:
        raise ValueError(f"`states` is {[str(state) for state in states]}, expected at least two folders")
    for path in states:
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} holds no model, expected a folder with a config.json")
    first = PerceptioForConditionalGeneration.from_pretrained(states[0], dtype=torch.float32)
    mean = first.state_dict()
    for count, path in enumerate(states[1:], 2):
        weights = PerceptioForConditionalGeneration.from_pretrained(path, dtype=torch.float32).state_dict()
        unlike = sorted(key for key in {*mean, *weights}
                        if key not in mean or key not in weights or mean[key].shape != weights[key].shape
                        or key.startswith(KEPT_FLOAT32) and not torch.equal(mean[key], weights[key]))  # fmt: skip
        if unlike:
            raise ValueError(f"{path} is no state of the model in {states[0]}: they differ in {unlike[0]}")
        for key, weight in weights.items():
            if weight.is_floating_point() and not key.startswith(KEPT_FLOAT32):
                mean[key].lerp_(weight, 1 / count)
    first.save_pretrained(folder)
    PerceptioProcessor.from_pretrained(states[0]).save_pretrained(folder)
    (folder / MEAN).write_text(json.dumps({"states": len(states)}) + "\n", encoding="utf-8")
    write_manifest(folder)
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("states", type=Path, nargs="+", metavar="STATE", help="folder of a state of the model")
    options = parser.parse_args(arguments)
    try:
        average(options.folder, options.states)
    except (ValueError, OSError) as error:
        return refuse(error)
    print(f"wrote {options.folder}: the mean of {len(options.states)} states")
    return 0


if __name__ == "__main__":
    sys.exit(main())
