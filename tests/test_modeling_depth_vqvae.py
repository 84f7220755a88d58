"""The depth tokenizer: laws of its codebook, its conventions, and its refusals."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from perceptio.configuration_perceptio import PerceptioDepthConfig
from perceptio.modeling_depth_vqvae import DepthVQVAE, codebook_hash

CONFIG = PerceptioDepthConfig(
    image_size=24,
    grid_size=3,
    num_codes=8,
    code_dim=16,
    hidden_size=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    num_attention_heads=2,
)


@pytest.fixture(scope="module")
def vqvae() -> DepthVQVAE:
    torch.manual_seed(0)
    return DepthVQVAE(CONFIG).eval()


def test_nearest_inverts_lookup(vqvae):
    ids = torch.randint(8, (5, 3, 3))
    assert torch.equal(vqvae.nearest(vqvae.lookup(ids)), ids)


def test_the_grid_is_row_major(vqvae):
    ids = torch.arange(9) % 8
    latents = vqvae.lookup(ids[None])
    assert torch.equal(latents[0, :, 1, 2], vqvae.codebook[ids[5]])
    assert torch.equal(latents, vqvae.lookup(ids.view(1, 3, 3)))


def test_soft_merge_of_certain_logits_is_lookup(vqvae):
    ids = torch.randint(8, (2, 9))
    certain = torch.nn.functional.one_hot(ids, 8) * 1e4
    torch.testing.assert_close(vqvae.soft_merge(certain.float()), vqvae.lookup(ids))


def test_soft_merge_carries_a_gradient_to_the_logits_and_none_to_the_codebook(vqvae):
    logits = torch.randn(1, 9, 8, requires_grad=True)
    vqvae.decode(vqvae.soft_merge(logits)).square().sum().backward()
    assert logits.grad.abs().sum() > 0 and vqvae.codebook.grad is None


def test_the_codebook_is_a_buffer_that_is_saved(vqvae):
    assert "codebook" in vqvae.state_dict() and "codebook" not in dict(vqvae.named_parameters())


def test_shapes_and_range(vqvae):
    depth = torch.rand(2, 30, 50)
    ids = vqvae.encode(depth)
    assert ids.shape == (2, 3, 3) and vqvae(depth).shape == (2, 24, 24)
    decoded = vqvae.decode_ids(ids)
    assert decoded.dtype == torch.float32 and 0 <= decoded.min() and decoded.max() <= 1


def test_encoding_does_not_depend_on_the_resolution_of_a_flat_map(vqvae):
    assert torch.equal(vqvae.encode(torch.full((1, 24, 24), 0.3)), vqvae.encode(torch.full((1, 7, 61), 0.3)))


def test_decoding_depends_neither_on_the_batch_nor_on_gradients(vqvae):
    ids = torch.randint(8, (5, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        together = vqvae.decode_ids(ids)
        alone = torch.cat([vqvae.decode_ids(one) for one in ids.split(1)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(vqvae.decode_ids(ids), together, atol=1e-6, rtol=0)


def test_saved_and_loaded_alone(vqvae, tmp_path):
    vqvae.save_pretrained(tmp_path)
    loaded = DepthVQVAE.from_pretrained(tmp_path)
    assert loaded.codebook_hash() == vqvae.codebook_hash()
    depth = torch.rand(1, 24, 24)
    assert torch.equal(loaded(depth), vqvae(depth))


def test_the_hash_sees_values_and_shape_and_not_the_layout(vqvae):
    codebook = vqvae.codebook
    assert codebook_hash(codebook) == codebook_hash(codebook.T.contiguous().T)
    changed = codebook.clone()
    changed[0, 0] += 1e-6
    assert codebook_hash(changed) != codebook_hash(codebook)
    assert codebook_hash(codebook.view(16, 8)) != codebook_hash(codebook)


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (torch.full((1, 4, 4), torch.nan), "NaN or infinite"),
        (torch.full((1, 4, 4), torch.inf), "NaN or infinite"),
        (torch.full((1, 4, 4), -0.5), "ranges from -0.5 to -0.5"),
        (torch.full((1, 4, 4), 255.0), "normalise it per picture"),
        (torch.zeros(4, 4), r"expected \[batch, height, width\]"),
        (torch.zeros(1, 4, 0), r"has shape \(1, 4, 0\)"),
        (torch.full((1, 4, 4), 200, dtype=torch.uint8), "is torch.uint8, expected floats in .0, 1."),
    ],
)
def test_bad_depth_is_refused_with_the_remedy(vqvae, depth, message):
    with pytest.raises(ValueError, match=message):
        vqvae.encode(depth)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.full((1, 9), 8), "another codebook"),
        (torch.full((1, 9), -1), "another codebook"),
        (torch.zeros(1, 8, dtype=torch.long), r"expected whole numbers \[batch, 9\]"),
        (torch.zeros(1, 9), "expected whole numbers"),
    ],
)
def test_bad_ids_are_refused(vqvae, ids, message):
    with pytest.raises(ValueError, match=message):
        vqvae.lookup(ids)


def test_soft_merge_refuses_logits_of_the_whole_vocabulary(vqvae):
    with pytest.raises(ValueError, match=r"expected \[batch, 9, 8\]"):
        vqvae.soft_merge(torch.zeros(1, 9, 512))


def test_the_warp_has_an_inverse_and_makes_equal_ratios_equal_steps(vqvae):
    depth = torch.linspace(0, 1, 101)
    warped = vqvae.warp(depth)
    assert warped[0] == -1 and warped[-1] == pytest.approx(1, abs=1e-6) and (warped.diff() > 0).all()
    torch.testing.assert_close(vqvae.unwarp(warped), depth, atol=1e-6, rtol=1e-5)
    offset = CONFIG.depth_offset
    near, far = (vqvae.warp(torch.tensor([v, 1.1 * (v + offset) - offset])).diff() for v in (0.8, 0.01))
    torch.testing.assert_close(near, far)


def test_training_the_decoded_map_moves_the_latents_towards_it(vqvae):
    """What the reconstruction loss of the whole model rests on: a gradient through the frozen decoder."""
    ids = torch.randint(8, (1, 9), generator=torch.Generator().manual_seed(1))
    target = vqvae.decode(vqvae.lookup(ids)).detach()
    logits = torch.zeros(1, 9, 8, requires_grad=True)
    optimizer, errors = torch.optim.Adam([logits], 0.3), []
    for _ in range(40):
        error = (vqvae.decode(vqvae.soft_merge(logits)) - target).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.2 * errors[0]


def _damage(folder, kind):
    path = folder / "model.safetensors"
    weights = load_file(path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-50])
        return
    if kind == "missing":
        weights.pop("encoder.trunk.leave.bias")
    elif kind == "strange":
        weights["decoder.head.weight"] = torch.zeros(3)
    elif kind == "shape":
        weights["decoder.mend2.bias"] = torch.zeros(2)
    elif kind == "nan":
        weights["decoder.mend2.bias"] = torch.full((1,), torch.nan)
    elif kind == "codebook":
        weights["codebook"] = weights["codebook"] + 1
    save_file(weights, path, metadata={"format": "pt"})


DAMAGE = {
    "cut": "model.safetensors",
    "missing": "lacks weights, which would be random .encoder.trunk.leave.bias",
    "strange": "no place for .decoder.head.weight",
    "shape": "of other shapes than its config.json asks for .*mend2.bias",
    "nan": "NaN or infinite values in decoder.mend2.bias",
    "codebook": "has hash [0-9a-f]{16}, but its config.json records",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_does_not_load(vqvae, tmp_path, kind):
    vqvae.save_pretrained(tmp_path)
    _damage(tmp_path, kind)
    with pytest.raises(ValueError, match=DAMAGE[kind]):
        DepthVQVAE.from_pretrained(tmp_path)
