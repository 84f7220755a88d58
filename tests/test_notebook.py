"""The notebook runs from top to bottom in a process of its own, and says what its model is."""

import json
import os
import re
import shutil
from pathlib import Path

import warm

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def code(last: str = "") -> str:
    """The cells of code, up to the one that holds `last`."""
    found = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
    end = next((index for index, source in enumerate(found, start=1) if last and last in source), len(found))
    return "\n\n".join(found[:end])


def run(text: str, folder: Path) -> str:
    (folder / "cells.py").write_text(text, encoding="utf-8")
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    done = warm.run(["cells.py"], folder, surroundings)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def default_model(folder: Path) -> str:
    return f"import pathlib, perceptio\nperceptio.DEFAULT_MODEL = pathlib.Path({str(folder)!r})"


def test_it_runs_from_top_to_bottom_and_learns(tmp_path):
    end = "assert drawn.width > 600 and wall.getbbox()"
    printed = run(f"{default_model(tmp_path / 'nowhere')}\n{code()}\n{end}\n", tmp_path)
    lines = re.findall(r"^(\w*loss) +(.*)$", printed, re.MULTILINE)
    losses = {name: [float(loss) for loss in line.split(" → ")] for name, line in lines}
    assert losses["loss"][-1] < 0.95 * losses["loss"][0] and len(losses) == 4
    assert losses["depth_token_loss"][-1] < 0.8 * losses["depth_token_loss"][0]
    assert "This model is untrained" in printed and "[SEG]<d_start>" in printed and "should be" in printed


def test_it_takes_the_trained_model_where_there_is_one(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder(), tmp_path / "ours")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "untrained": False}), encoding="utf-8")
    printed = run(f"{default_model(folder)}\n{code('parameters, ')}\nprint(folder, trained)\n", tmp_path)
    assert f"{folder} True" in printed and "This model is untrained" not in printed


def test_it_is_kept_without_outputs():
    """Pictures in it would be kept twice, and would show a model that nobody has."""
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS if "outputs" in cell)
