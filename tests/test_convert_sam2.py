"""Meta's SAM2 layout against transformers' model, and against the `sam2` package where it is installed."""

import hashlib
import json
import math
import pickle

import pytest
import torch
from transformers import Sam2Config, Sam2Model

from perceptio.hub.convert_sam2 import (
    IGNORED_META,
    VARIANTS,
    config_of_meta,
    load_meta_checkpoint,
    open_sam2,
    plan_sam2,
    read_sam2_config,
    sam2_config,
)
from perceptio.hub.layouts import sam2_shapes
from perceptio.hub.weights import Shaped, check_plan

SIDE, WIDTH = 64, 32


def small_config():
    widths, grid = [16, 32, 64, 128], SIDE // 4
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "image_size": [SIDE, SIDE],
        "hidden_size": widths[0],
        "num_attention_heads": 1,
        "blocks_per_stage": [1, 2, 3, 1],
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [4, 2, 2, 2],
        "global_attention_blocks": [4],
        "window_positional_embedding_background_size": [3, 3],
    }
    vision = {
        "backbone_config": backbone,
        "backbone_channel_list": widths[::-1],
        "backbone_feature_sizes": [[grid, grid], [grid // 2, grid // 2], [grid // 4, grid // 4]],
        "fpn_hidden_size": WIDTH,
    }
    return Sam2Config(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": WIDTH, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 16},
        mask_decoder_config={
            "hidden_size": WIDTH, "mlp_dim": 48, "num_attention_heads": 4, "iou_head_hidden_dim": WIDTH,
        },
    )  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_sizes_have_a_target_for_every_key(variant):
    shapes = sam2_shapes(variant)
    plan, ignored = plan_sam2(shapes)
    with torch.device("meta"):
        targets = Sam2Model(sam2_config(variant)).state_dict()
    check_plan(variant, plan, shapes, targets, ignored)
    assert {key: recipe(Shaped(shapes)).shape for key, recipe in plan.items()} == {
        key: value.shape for key, value in targets.items()
    }
    assert all(key.startswith(IGNORED_META) for key in ignored) and ignored
    parameters = sum(math.prod(shape) for key, shape in shapes.items() if "gaussian_matrix" not in key)
    assert round(parameters / 1e6, 1) == {"tiny": 39.0, "small": 46.1, "base-plus": 80.9, "large": 224.4}[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_size_is_recognised_from_the_weights(variant):
    found = config_of_meta(Shaped(sam2_shapes(variant))).vision_config.backbone_config
    assert tuple(found.blocks_per_stage) == VARIANTS[variant].blocks
    assert tuple(found.global_attention_blocks) == VARIANTS[variant].whole


def test_unknown_size_is_refused():
    shapes = {**sam2_shapes("tiny"), "image_encoder.trunk.patch_embed.proj.bias": (80,)}
    with pytest.raises(ValueError, match="80 wide and 12 blocks.*large"):
        config_of_meta(Shaped(shapes))


def test_leftover_key_is_named():
    shapes = {**sam2_shapes("tiny"), "sam_mask_decoder.surprise": (1,)}
    plan, ignored = plan_sam2(shapes)
    with torch.device("meta"):
        targets = Sam2Model(sam2_config("tiny")).state_dict()
    with pytest.raises(ValueError, match=r"1 left over in the source: sam_mask_decoder\.surprise"):
        check_plan("SAM2", plan, shapes, targets, ignored)


def test_transformers_layout_of_the_published_folders(tmp_path):
    """The Hub's folders hold the video model, and older ones the shared position matrix only once."""
    state = Sam2Model(small_config()).state_dict()
    keys = set(state) - {"prompt_encoder.shared_embedding.positional_embedding"}
    extra = {"memory_attention.layers.0.linear1.weight", "no_object_pointer", "memory_temporal_positional_encoding"}
    plan, ignored = plan_sam2(keys | extra)
    assert ignored == extra
    check_plan("SAM2", plan, keys | extra, state, ignored)

    config = small_config()
    values = {**config.to_dict(), "model_type": "sam2_video"}
    values["mask_decoder_config"]["model_type"] = "sam2_video_mask_decoder"
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_sam2_config(tmp_path / "config.json").to_dict()["vision_config"] == config.to_dict()["vision_config"]


def test_pickled_code_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (exec, ("raise SystemExit('the pickle was run')",))

    for name, write in {
        "torch.pt": torch.save,
        "plain.pt": lambda value, path: path.write_bytes(pickle.dumps(value)),
    }.items():
        write({"model": Trap()}, tmp_path / name)
        with pytest.raises(ValueError, match="cannot be read as a checkpoint of tensors"):
            load_meta_checkpoint(tmp_path / name)


def test_checkpoint_file_is_checked(tmp_path):
    path = tmp_path / "small.pt"
    torch.save({"model": {"image_encoder.trunk.pos_embed": torch.ones(1)}}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(load_meta_checkpoint(path, sha256=digest)) == {"image_encoder.trunk.pos_embed"}
    with pytest.raises(ValueError, match=digest):
        load_meta_checkpoint(path, sha256="0" * 64)
    torch.save({"weights": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="'model'"):
        load_meta_checkpoint(path)
    torch.save({"model": {"vision_encoder.x": torch.ones(1)}}, path)
    with pytest.raises(ValueError, match="image_encoder"):
        open_sam2(path)
    (tmp_path / "config.json").write_text('{"model_type": "sam"}')
    with pytest.raises(ValueError, match="'sam'"):
        open_sam2(tmp_path)


@pytest.fixture(scope="module")
def meta():
    """A small network of Meta's own classes, random, in one module with the keys of a checkpoint."""
    reason = "the `sam2` package is the oracle of Meta's layout (SAM2_BUILD_CUDA=0 pip install --no-deps sam2 ...)"
    pytest.importorskip("sam2", reason=reason, exc_type=ImportError)
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine
    from sam2.modeling.sam.mask_decoder import MaskDecoder
    from sam2.modeling.sam.prompt_encoder import PromptEncoder
    from sam2.modeling.sam.transformer import TwoWayTransformer

    torch.manual_seed(0)
    network = torch.nn.Module()
    trunk = Hiera(
        embed_dim=16, num_heads=1, stages=(1, 2, 3, 1), global_att_blocks=(4,), window_spec=(4, 2, 2, 2),
        window_pos_embed_bkg_spatial_size=(3, 3),
    )  # fmt: skip
    neck = FpnNeck(
        PositionEmbeddingSine(WIDTH), WIDTH, [128, 64, 32, 16], fpn_top_down_levels=[2, 3], fpn_interp_model="nearest"
    )
    network.image_encoder = ImageEncoder(trunk, neck, scalp=1)
    network.sam_prompt_encoder = PromptEncoder(WIDTH, (SIDE // 16, SIDE // 16), (SIDE, SIDE), mask_in_chans=16)
    network.sam_mask_decoder = MaskDecoder(
        transformer_dim=WIDTH,
        transformer=TwoWayTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=48, num_heads=4),
        iou_head_hidden_dim=WIDTH, use_high_res_features=True, iou_prediction_use_sigmoid=True, pred_obj_scores=True,
        pred_obj_scores_mlp=True, dynamic_multimask_via_stability=True,
    )  # fmt: skip
    network.no_mem_embed = torch.nn.Parameter(torch.zeros(1, 1, WIDTH))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


@pytest.fixture(scope="module")
def converted(meta, tmp_path_factory):
    path = tmp_path_factory.mktemp("meta") / "small.pt"
    torch.save({"model": meta.state_dict()}, path)
    config, weights = open_sam2(path, config=small_config())
    plan, ignored = plan_sam2(weights)
    assert not ignored
    model = Sam2Model(config).eval()
    model.load_state_dict({key: recipe(weights) for key, recipe in plan.items()}, strict=True)
    return model


def test_listed_shapes_are_those_of_metas_model(meta):
    from hydra import compose
    from hydra.utils import instantiate

    network = instantiate(compose(config_name="configs/sam2.1/sam2.1_hiera_t.yaml").model, _recursive_=True)
    assert sam2_shapes("tiny") == {key: tuple(value.shape) for key, value in network.state_dict().items()}


@torch.no_grad()
def test_image_encoder_equals_metas(meta, converted):
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    expected = meta.image_encoder(pixels)["backbone_fpn"]
    found = converted.vision_encoder(pixels).fpn_hidden_states
    assert [tuple(maps.shape[-2:]) for maps in found] == [(16, 16), (8, 8), (4, 4)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("several", [True, False], ids=["candidates", "single"])
@torch.no_grad()
def test_prompts_and_mask_decoder_equal_metas(meta, converted, several):
    generator = torch.Generator().manual_seed(2)
    coarse, middle, fine = (torch.randn(1, WIDTH, SIDE // k, SIDE // k, generator=generator) for k in (16, 8, 4))
    points, labels = torch.tensor([[[10.0, 20.0], [50.0, 3.0]]]), torch.tensor([[1, 0]])

    sparse, dense = meta.sam_prompt_encoder((points, labels), None, None)
    place = meta.sam_prompt_encoder.get_dense_pe()
    high = [meta.sam_mask_decoder.conv_s0(fine), meta.sam_mask_decoder.conv_s1(middle)]
    expected = meta.sam_mask_decoder(
        coarse + meta.no_mem_embed.view(1, -1, 1, 1), place, sparse, dense, several, False, high
    )

    our_sparse, our_dense = converted.prompt_encoder(points[:, None], labels[:, None], None, None)
    our_place = converted.get_image_wide_positional_embeddings()
    torch.testing.assert_close(our_sparse[:, 0], sparse, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(our_dense, dense, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(our_place, place, atol=1e-5, rtol=1e-4)

    decoder = converted.mask_decoder
    found = decoder(
        image_embeddings=coarse + converted.no_memory_embedding.view(1, -1, 1, 1),
        image_positional_embeddings=our_place,
        sparse_prompt_embeddings=our_sparse,
        dense_prompt_embeddings=our_dense,
        multimask_output=several,
        high_resolution_features=[decoder.conv_s0(fine), decoder.conv_s1(middle)],
    )
    for one, other in zip((found[0], found[1], found[3]), (expected[0], expected[1], expected[3]), strict=True):
        torch.testing.assert_close(one[:, 0], other, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_mask_prompt_equals_metas(meta, converted):
    mask = torch.randn(1, 1, SIDE // 4, SIDE // 4, generator=torch.Generator().manual_seed(3))
    _, expected = meta.sam_prompt_encoder(None, None, mask)
    _, found = converted.prompt_encoder(None, None, None, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
