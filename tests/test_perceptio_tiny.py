"""The model that comes with the package: whole, small, the default, and as good as its card says."""

import json
import re
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from warm import run

import perceptio
from perceptio.evaluation import CODES
from perceptio.evaluation.benchmark import Figure, open_benchmark
from perceptio.evaluation.predict import Predictor
from perceptio.evaluation.run import Settings, run_benchmark
from perceptio.hub.card import EVALUATION, read_evaluations
from perceptio.hub.manifest import scan_pickles, verify_manifest
from perceptio.world.records import scene_records

FOLDER = perceptio.DEFAULT_MODEL
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no trained Perceptio comes with this version")
MOST_PARAMETERS, MOST_BYTES, LARGEST_SHARD = 24_000_000, 48 * 2**20, 15 * 2**20
SPLITS = ("test", "points3", "points4", "points5", "lure", "refer", "absent")


@pytest.fixture(scope="module")
def see():
    from transformers import pipeline

    return pipeline("perceptio")


@pytest.fixture(scope="module")
def figures() -> dict[str, Figure]:
    evaluation = json.loads((FOLDER / "evaluation.json").read_text("utf-8"))
    return {figure["name"]: Figure(**figure) for figure in evaluation["figures"]}


def test_it_is_whole_and_small(see):
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert verify_manifest(FOLDER) == [] and scan_pickles(FOLDER) == []
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert max(path.stat().st_size for path in FOLDER.glob("*.safetensors")) <= LARGEST_SHARD
    assert sum(weight.numel() for weight in see.model.parameters()) <= MOST_PARAMETERS
    assert not see.model.config.untrained and see.model.dtype == torch.float32


def test_its_code_is_the_packages():
    """A folder that was frozen before a change of the code would be another model on the Hub than here."""
    for path in FOLDER.glob("*.py"):
        assert path.read_bytes() == (FOLDER.parent.parent / path.name).read_bytes(), path.name


def test_its_codes_are_those_of_the_tokenizer_beside_it(see):
    alone = perceptio.DepthVQVAE.from_pretrained(perceptio.DEFAULT_DEPTH_MODEL)
    assert alone.codebook_hash() == see.model.depth_model.codebook_hash()


def test_every_split_was_measured_and_every_span_is_whole(figures):
    for split in SPLITS:
        whole = figures[f"{split}: whole depth spans"]
        assert whole.value == 100.0 and whole.invalid == 0 and whole.n >= 100


def test_the_card_is_that_of_the_figures(figures):
    rows = re.findall(r"^\| (.*) \|$", (FOLDER / "README.md").read_text("utf-8"), flags=re.MULTILINE)
    for figure in figures.values():
        assert " | ".join(figure.cells()) in rows


def test_the_card_compares_what_was_measured_with_other_codes():
    """As `bench/ablations.py` found it on the same weights."""
    written = json.loads((FOLDER.parent.parent / "bench/results/ablations.json").read_text("utf-8"))["codes"]["with"]
    found = {r["settings"]["depth_codes"]: r for n, r in read_evaluations(FOLDER).items() if n != EVALUATION}
    assert list(written) == list(CODES) and set(found) == set(CODES)
    rows = re.findall(r"^\| (.*) \|$", (FOLDER / "README.md").read_text("utf-8"), flags=re.MULTILINE)
    for split in SPLITS[1:5]:
        name = f"{split}: closest point"
        measured = [next(f for f in found[codes]["figures"] if f["name"] == name) for codes in CODES]
        assert [figure["value"] for figure in measured] == [
            written[codes][split]["closest point"]["value"] for codes in CODES
        ]
        assert " | ".join([name, *(Figure(**figure).cells()[1] for figure in measured)]) in rows


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Of a seed of their own."""
    from perceptio.data.shards import write_shards

    folder = tmp_path_factory.mktemp("scenes")
    for split in ("refer", "points3"):
        records = [record for index in range(24) for record in scene_records(index, 77, split)]
        write_shards(records, folder, split=split)
    return folder


@pytest.mark.parametrize(
    "perception, names",
    [
        (None, ("refer: gIoU", "refer: delta1, aligned", "points3: closest point")),
        ("seg", ("refer: gIoU",)),
        ("depth", ("refer: delta1, aligned",)),
    ],
)
def test_new_scenes_are_seen_as_well_as_its_card_says(see, scenes, perception, names, tmp_path, figures):
    """Asked for both, or for one alone: no figure lies further from the card than so few questions explain."""
    predictor = Predictor(see, open_benchmark("world").answer_tokens)
    split = "all" if perception is None else "refer"
    settings = Settings(split=split, batch_size=24, perception=perception)
    results = run_benchmark(open_benchmark("world"), predictor, scenes, tmp_path / "out", settings, {})
    found = {figure["name"]: Figure(**figure) for figure in results["figures"]}
    for name in names:
        assert found[name].low <= figures[name].high and figures[name].low <= found[name].high, name


def test_it_works_from_the_package_alone_without_a_network(tmp_path):
    """As the README begins, in a process that can open no connection."""
    picture = scene_records(3, 77, "refer")[0]["image"]["bytes"]
    Image.open(BytesIO(picture)).save(tmp_path / "scene.png")
    code = """
import socket
socket.socket.connect = None
import perceptio
from transformers import pipeline
result = pipeline("perceptio")(image="scene.png", text="What is in this picture?")
print(result["generated_text"], len(result["depth_codes"]), result["problems"])
"""
    done = run(["-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r".+ 100 \[\]\n", done.stdout)


def test_a_batch_is_what_each_question_gets_by_itself(see):
    records = [record for i in range(4) for record in scene_records(i, 78, "refer")]
    asked = [
        {"image": Image.open(BytesIO(record["image"]["bytes"])), "text": record["messages"][0]["content"]}
        for record in records
    ]
    together, alone = see(asked, batch_size=4), [see(one) for one in asked]
    compared = 0
    for many, one in zip(together, alone, strict=True):
        assert many["generated_text"] == one["generated_text"] and many["depth_codes"] == one["depth_codes"]
        masks = [found["masks"][0]["mask"] for found in (many, one)]
        assert (masks[0] is None) == (masks[1] is None)
        if masks[0] is not None:
            assert (np.asarray(masks[0]) == np.asarray(masks[1])).mean() > 0.999
            compared += 1
    assert compared >= 2
