"""Importing the package has no side effects, is quick, and needs no optional package."""

import json
import os
import subprocess
import sys

import pytest

WATCH = """
import builtins, json, os, socket, sys, threading, time
connections, written, before = [], [], dict(os.environ)
socket.socket.connect = lambda self, address: connections.append(str(address))
original = builtins.open
def watching(file, mode="r", *args, **kwargs):
    if any(letter in mode for letter in "wax+") and str(file) != os.devnull:
        written.append(str(file))
    return original(file, mode, *args, **kwargs)
builtins.open = watching
{block}
begin = time.perf_counter()
{base}
threads, start = threading.active_count(), time.perf_counter()
import perceptio
print(json.dumps({{"connections": connections, "written": [f for f in written if "perceptio" in f],
    "threads": threading.active_count() - threads, "share": (time.perf_counter() - start) / (start - begin),
    "environment": sorted(k for k in os.environ if os.environ[k] != before.get(k) and "PERCEPTIO" in k.upper())}}))
"""
# What any user of these parts of transformers has loaded already.
BASE = """
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers import InternVLForConditionalGeneration, Sam2Model, GenerationMixin, LogitsProcessor, AddedToken
from transformers.pipelines import PIPELINE_REGISTRY
"""
BLOCK = """
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name.split(".")[0] in {names!r} else find(name, path, target)
)
"""


def imported(tmp_path, base: str = "", block: str = "") -> dict:
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    code = WATCH.format(base=base, block=block)
    run = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def beyond_transformers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("import")
    return folder, imported(folder, BASE)


def test_it_opens_no_connection_writes_no_file_and_starts_no_thread(beyond_transformers):
    folder, found = beyond_transformers
    assert found["connections"] == [] and found["written"] == [] and found["threads"] == 0
    assert found["environment"] == [] and list(folder.iterdir()) == []


def test_it_takes_little_beyond_transformers(beyond_transformers):
    assert beyond_transformers[1]["share"] < 0.1


@pytest.mark.parametrize(
    "names", [["pycocotools", "torchvision"], ["torchao", "peft"], ["accelerate", "datasets", "trl"]]
)
def test_it_needs_no_optional_package(names, tmp_path):
    imported(tmp_path, block=BLOCK.format(names=names))


def test_a_feature_without_its_package_names_the_extra(monkeypatch):
    import torch

    from perceptio.processing_perceptio import run_length

    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r'pip install "perceptio\[data\]"'):
        run_length(torch.zeros(2, 2, dtype=torch.bool))
