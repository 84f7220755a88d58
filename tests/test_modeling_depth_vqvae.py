"""The depth tokenizer: laws of its codebook, its conventions, and its refusals."""

import pytest
import torch

from perceptio.configuration_perceptio import PerceptioDepthConfig
from perceptio.modeling_depth_vqvae import DepthVQVAE, codebook_hash

CONFIG = PerceptioDepthConfig(image_size=24, grid_size=3, num_codes=8, code_dim=16, channels=[8, 16, 16])


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
