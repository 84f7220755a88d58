"""The figures of a depth tokenizer, on maps of which the right figure is known."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from shard_samples import tiny_vqvae

from perceptio.data.depths import DepthError
from perceptio.data.label import load_vqvae
from perceptio.hub.manifest import verify_manifest
from perceptio.modeling_depth_vqvae import DepthVQVAE
from perceptio.vqvae import evaluate as module
from perceptio.vqvae import export as freezing
from perceptio.vqvae.evaluate import draw, edge_counts, edges, evaluate, legibility, relative_errors, spread
from perceptio.vqvae.export import depth_of_codes, export, sort_codes
from perceptio.vqvae.maps import pack


@pytest.fixture
def maps_folder(tmp_path):
    folder = tmp_path / "maps"
    folder.mkdir()
    maps = torch.rand(5, 24, 24, generator=torch.Generator().manual_seed(1))
    save_file({"maps": pack(maps)}, folder / "maps-00000.safetensors")
    note = {"source": "made up", "split": "test", "side": 24, "parts": [["maps-00000.safetensors", 5]]}
    (folder / "maps.json").write_text(json.dumps(note))
    return folder


def test_relative_errors_are_those_of_depth():
    """v = 0.4 is depth 2; found 0.15, depth 4: off by 100%.  In the second map half of the pixels are off by 10%."""
    true = torch.full((2, 4, 4), 0.4)
    found = true.clone()
    found[0] = 0.15
    found[1, :2] = 1 / 2.2 - 0.1
    abs_rel, delta1 = relative_errors(found, true)
    torch.testing.assert_close(abs_rel, torch.tensor([1.0, 0.05]))
    assert delta1.tolist() == [0.0, 1.0]
    near, far = relative_errors(torch.full((1, 2, 2), 1.0), true[:1, :2, :2])[0], abs_rel[0]
    assert near < far, "too near by any amount is off by less than all; depth has no such limit the other way"


def test_the_same_error_weighs_more_far_away():
    errors = [relative_errors(torch.full((1, 2, 2), v + 0.05), torch.full((1, 2, 2), v))[0].item() for v in (0.0, 0.9)]
    assert errors[0] == pytest.approx(1 / 3) and errors[1] == pytest.approx(1 / 21, rel=1e-4)


def test_edges_are_steps_and_not_slopes():
    depth = torch.linspace(0.2, 0.8, 40).expand(1, 40, 40).clone()
    assert not edges(depth).any()
    depth[:, 10:20, 10:20] = 1.0
    assert edges(depth)[0, 12, 9] and edges(depth)[0, 12, 19] and not edges(depth)[0, 15, 15]


def test_an_edge_may_be_off_by_one_pixel_and_not_by_three():
    def box(left: int) -> torch.Tensor:
        depth = torch.full((1, 40, 40), 0.1)
        depth[:, :, left:] = 0.9
        return depth

    assert edge_counts(box(20), box(20)).tolist() == [40.0] * 4
    assert edge_counts(box(21), box(20)).tolist() == [40.0] * 4
    assert edge_counts(box(23), box(20)).tolist() == [40.0, 0.0, 40.0, 0.0]


def test_usage_and_perplexity():
    assert spread(torch.tensor([5, 5, 5, 5])) == (1.0, pytest.approx(4.0))
    assert spread(torch.tensor([9, 0, 0, 0])) == (0.25, pytest.approx(1.0))


def test_legibility_is_what_a_code_says_of_its_cell_by_itself():
    levels = torch.rand(6, 3, 3)
    depth = levels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    order = levels.flatten().argsort().argsort().view(6, 3, 3)
    assert legibility(order, depth, 3, 54) == pytest.approx(1.0)
    assert legibility(torch.zeros_like(order), depth, 3, 54) == pytest.approx(0.0, abs=1e-6)


def test_what_evaluate_says_agrees_with_doing_it_by_hand():
    vqvae, maps = tiny_vqvae(), torch.rand(3, 24, 24)
    result = evaluate(vqvae, maps)
    ids = vqvae.encode(maps)
    found = vqvae.decode_ids(ids)
    assert result["mse"] == pytest.approx((found - maps).square().mean().item(), rel=1e-5)
    assert result["abs_rel"] == pytest.approx(((maps + 0.1) / (found + 0.1) - 1).abs().mean().item(), rel=1e-5)
    assert result["stable"] == pytest.approx((vqvae.encode(found) == ids).float().mean().item())
    assert result["usage"] == len(ids.unique()) / 8 and result["maps"] == 3
    assert evaluate(vqvae, maps, count=1)["maps"] == 1
    with pytest.raises(DepthError, match="no maps to evaluate"):
        evaluate(vqvae, maps[:0])


def test_figures_do_not_depend_on_the_batch(monkeypatch):
    vqvae, maps = tiny_vqvae(), torch.rand(7, 24, 24)
    whole = evaluate(vqvae, maps)
    monkeypatch.setattr(module, "BATCH", 2)
    assert evaluate(vqvae, maps) == pytest.approx(whole, rel=1e-5)


def test_the_picture_shows_every_map_and_its_codes():
    vqvae, maps = tiny_vqvae(), torch.rand(2, 24, 24)
    sheet = np.asarray(draw(vqvae, maps))
    panel, gap = module.PANEL, module.GAP
    assert sheet.shape == (24 + 2 * (panel + gap), 4 * panel + 5 * gap, 3)
    first, second = (sheet[24 : 24 + panel, gap + column * (panel + gap) :][:, :panel] for column in (0, 2))
    assert first.std() > 5 and not np.array_equal(first, second)


def test_codes_are_numbered_from_far_to_near_and_decode_as_before():
    vqvae = tiny_vqvae()
    maps = torch.rand(4, 24, 24)
    before, depths = vqvae(maps), depth_of_codes(vqvae)
    sort_codes(vqvae)
    assert torch.equal(depth_of_codes(vqvae), depths.sort().values)
    assert torch.equal(vqvae(maps), before)


def test_a_frozen_tokenizer_carries_the_hash_and_loads(tmp_path):
    vqvae = tiny_vqvae()
    export(vqvae.to(torch.bfloat16), tmp_path)
    assert verify_manifest(tmp_path) == []
    loaded = DepthVQVAE.from_pretrained(tmp_path)
    assert loaded.config.codebook_hash == loaded.codebook_hash() == vqvae.codebook_hash()
    assert loaded.codebook.dtype == torch.float32
    assert vqvae.codebook_hash() in (tmp_path / "README.md").read_text()


def test_a_tokenizer_with_nan_is_not_frozen(tmp_path):
    vqvae = tiny_vqvae()
    vqvae.codebook[3, 0] = float("nan")
    with pytest.raises(ValueError, match="`codebook` holds NaN"):
        export(vqvae, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_commands(maps_folder, tmp_path, capsys):
    tiny_vqvae().save_pretrained(tmp_path / "loose")
    assert freezing.main([str(tmp_path / "loose"), str(tmp_path / "frozen")]) == 0
    assert load_vqvae(tmp_path / "frozen").config.codebook_hash
    again = [str(tmp_path / "frozen"), str(tmp_path / "measured"), "--maps", str(maps_folder)]
    assert freezing.main(again) == 0
    stated = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    card = (tmp_path / "measured" / "README.md").read_text()
    assert f"| mse | {stated['mse']:.4g} |" in card and "5 maps of `made up`, split `test`" in card
    assert verify_manifest(tmp_path / "measured") == []
    out = tmp_path / "out"
    assert module.main([str(tmp_path / "frozen"), "--maps", str(maps_folder), "--out", str(out), "--rows", "2"]) == 0
    written = json.loads((out / "evaluation.json").read_text())
    assert written["maps"] == 5 and written["split"] == "test"
    assert Image.open(out / "evaluation.png").height == 24 + 2 * (module.PANEL + module.GAP)
    capsys.readouterr()
    assert module.main([str(tmp_path / "none"), "--maps", str(maps_folder), "--out", str(out)]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert freezing.main([str(tmp_path / "none"), str(tmp_path / "x")]) == 2
