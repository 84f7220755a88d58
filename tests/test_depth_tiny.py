"""The depth tokenizer that ships, on rendered scenes that it was not trained on."""

import json
import re
from pathlib import Path

import pytest
import torch

from perceptio.data.label import load_vqvae
from perceptio.hub.manifest import verify_manifest
from perceptio.vqvae.evaluate import evaluate
from perceptio.vqvae.export import depth_of_codes
from perceptio.vqvae.maps import shrink
from perceptio.world.maps import world_maps

FOLDER = Path(__file__).parent.parent / "checkpoints" / "depth-tiny"


@pytest.fixture(scope="module")
def vqvae():
    return load_vqvae(FOLDER)


@pytest.fixture(scope="module")
def maps(vqvae):
    """Of the split and of the scenes that evaluation.json does not count."""
    side = vqvae.config.image_size
    return torch.stack([shrink(depth, side) for depth in world_maps(150, split="test", first=5000)])


@pytest.fixture(scope="module")
def found(vqvae, maps):
    return evaluate(vqvae, maps)


def test_the_folder_is_whole_and_small():
    assert verify_manifest(FOLDER) == []
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 10 << 20


def test_it_uses_its_codes(found):
    assert found["usage"] >= 0.95 and found["perplexity"] >= 64


def test_what_it_decodes_has_the_same_codes_again(found):
    assert found["stable"] >= 0.99


def test_its_figures_on_other_scenes_are_those_that_it_states(found):
    stated = json.loads((FOLDER / "evaluation.json").read_text())
    assert found["abs_rel"] == pytest.approx(stated["abs_rel"], rel=0.15)
    assert found["delta1"] == pytest.approx(stated["delta1"], abs=0.015)
    assert stated["split"] == "test" and stated["maps"] >= 1000


def test_its_codes_are_numbered_from_far_to_near_and_can_be_read_one_by_one(vqvae, found):
    depths = depth_of_codes(vqvae)
    assert (depths.diff() >= 0).all() and depths[0] < 0.05 and depths[-1] > 0.8
    assert found["legibility"] > 0.96


def test_the_order_of_two_points_survives(vqvae, maps):
    """What closest-point questions rest on: of pixels that differ by a fifth of the range, the nearer stays nearer."""
    rng = torch.Generator().manual_seed(0)
    side, back = vqvae.config.image_size, vqvae(maps)
    rows = torch.arange(len(maps)).repeat_interleave(40)
    (ay, ax), (by, bx) = torch.randint(side, (2, 2, len(rows)), generator=rng)
    true = maps[rows, ay, ax] - maps[rows, by, bx]
    kept = (back[rows, ay, ax] - back[rows, by, bx])[true.abs() > 0.2].sign() == true[true.abs() > 0.2].sign()
    assert len(kept) > 1000 and kept.float().mean() > 0.98


def test_the_card_states_what_was_measured():
    card, stated = (FOLDER / "README.md").read_text(), json.loads((FOLDER / "evaluation.json").read_text())
    for name in ("abs_rel", "delta1", "perplexity", "stable"):
        assert re.search(rf"\| {name} \| {stated[name]:.4g} \|", card), name
