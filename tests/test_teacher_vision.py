"""The vision tower of perceptio-tiny: what its cells are asked, and a short training."""

import json

import numpy as np
import pytest
import torch

from perceptio.modeling_convolutions import PerceptioVisionModel
from perceptio.processing_perceptio import IMAGENET_MEAN, IMAGENET_STD
from perceptio.teachers.cells import DEPTH_OFFSET
from perceptio.teachers.convolutions import close_convolutions, convolutions, open_convolutions
from perceptio.teachers.freeze import main as main_of_freeze
from perceptio.teachers.scenes import cut_scene
from perceptio.teachers.vision import (
    CLASSES,
    LEAST_SHOWN,
    CellReader,
    VisionTrainingConfig,
    draw_cells,
    draw_tiles,
    fitted,
    frames,
    main,
    vision_config,
)
from perceptio.world.instances import scene_instances, write_instances
from perceptio.world.scene import sample_scene
from perceptio.world.shapes import NOUNS
from perceptio.world.surfaces import COLOURS, PATTERNS
from perceptio.world.views import inverse_depth, thing_map

SIDE = 112


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_instances(tmp_path_factory.mktemp("scenes"), count=8, side=SIDE, workers=0)


@pytest.fixture
def args(tmp_path):
    return VisionTrainingConfig(str(tmp_path), side=SIDE)


def drawn_with(scenes, args, marked: bool):
    """(scene, what was drawn, whether it was mirrored) of every scene."""
    for index in range(len(scenes)):
        for seed in range(40):
            drawn = draw_cells(scenes[index], args, np.random.default_rng(seed), whole=True)
            if bool(drawn["point"].any()) == marked:
                yield scenes[index], drawn, np.random.default_rng(seed).random() < 0.5
                break


def test_a_scene_names_what_it_shows():
    scene = sample_scene(np.random.default_rng([0, 0, 3]), SIDE, SIDE)
    row = scene_instances(3, side=SIDE)
    assert np.allclose(row["depth"], inverse_depth(scene.rendering.depth), atol=1e-3)
    for index in np.unique(thing_map(scene)):
        noun, colour, pattern = row["names"][index + 1]
        if index < 0:
            assert (noun, colour, pattern) == (0, 0, 0)
            continue
        thing = scene.things[index]
        assert (NOUNS[noun - 1], list(COLOURS)[colour - 1], PATTERNS[pattern - 1]) == (
            thing.noun, thing.colour, thing.pattern
        )  # fmt: skip
    there = row["places"][row["places"][:, 0] >= 0]
    values = [float(row["depth"][y, x]) for x, y in there]
    assert len(there) >= 2 and values == sorted(values, reverse=True)


def test_cells_are_asked_for_what_they_show(scenes, args):
    count = 0
    for scene, drawn, mirrored in drawn_with(scenes, args, marked=False):
        things, depth = scene["things"].numpy(), scene["depth"].float().numpy()
        if mirrored:
            things, depth = things[:, ::-1], depth[:, ::-1]
        assert drawn["noun"].shape == (16, 16) and drawn["pixel_values"].shape == (3, SIDE, SIDE)
        for row, column in np.random.default_rng(0).integers(0, 16, (30, 2)):
            names = scene["names"][things[7 * row + 3, 7 * column + 3]]
            found = [int(drawn[name][row, column]) for name in ("noun", "colour", "pattern")]
            assert found == names.tolist()
            mean = depth[7 * row : 7 * row + 7, 7 * column : 7 * column + 7].mean()
            assert abs(drawn["depth"][row, column].exp() - DEPTH_OFFSET - mean) < 2e-3
        count += 1
    assert count >= 6


def test_a_marked_point_is_drawn_where_it_is_asked_for(scenes, args):
    count = 0
    for _, drawn, _ in drawn_with(scenes, args, marked=True):
        pixels = drawn["pixel_values"] * torch.tensor(IMAGENET_STD)[:, None, None]
        red, green, _ = (pixels + torch.tensor(IMAGENET_MEAN)[:, None, None]) * 255
        ring = (red - green > 60) & (red > 90)
        letters = drawn["point"][drawn["point"] > 0].tolist()
        assert 2 <= len(letters) <= 5 and len(set(letters)) == len(letters)
        for row, column in drawn["point"].nonzero().tolist():
            around = ring[max(0, 7 * row - 3) : 7 * row + 10, max(0, 7 * column - 3) : 7 * column + 10]
            assert around.sum() >= 3
            count += 1
    assert count >= 10


def numbered_scene(side: int = SIDE) -> dict[str, torch.Tensor]:
    """Four things in a picture whose red tells which is where, and whose depth grows from left to right."""
    things = torch.zeros(side, side, dtype=torch.uint8)
    for number, (top, left) in enumerate([(8, 8), (10, 60), (60, 12), (58, 64)], 1):
        things[top : top + 34, left : left + 34] = number
    names = torch.zeros(256, 3, dtype=torch.uint8)
    names[1:5] = torch.tensor([[3, 1, 1], [7, 5, 2], [11, 9, 1], [30, 12, 4]])
    depth = torch.linspace(0, 1, side).expand(side, side).half()
    places = torch.tensor([[20, 20], [75, 25], [30, 80], [90, 90], [-1, -1]], dtype=torch.int16)
    image = (50 * things)[..., None].repeat(1, 1, 3)
    return {"image": image, "things": things, "depth": depth, "names": names, "places": places,
            "frames": frames(things)}  # fmt: skip


def test_a_part_of_a_scene_is_cut_with_all_that_is_known_of_it():
    scene, sizes = numbered_scene(), set()
    for seed in range(30):
        image, things, depth, places = cut_scene(scene, SIDE, np.random.default_rng(seed), all_of_it=False)
        assert (image[..., 0].float() / 50).round().byte().eq(things).float().mean() > 0.9 and things.any()
        assert depth.min() == 0 and depth.max() == 1 and (depth.diff(dim=1) >= 0).all()
        for number, (x, y) in enumerate(places.tolist(), 1):
            assert x < 0 or things[y, x] == number
        sizes.add(int((things == things[things > 0][0]).sum()))
    assert len(sizes) > 10
    whole = cut_scene(scene, SIDE, np.random.default_rng(0), all_of_it=True)
    assert all(
        torch.equal(found, given) for found, given in zip(whole, (scene["image"], scene["things"]), strict=False)
    )


def test_a_picture_of_tiles_shows_a_thing_of_each_scene_and_asks_for_no_depth(args):
    torch.manual_seed(0)
    scenes = [numbered_scene() for _ in range(9)]
    drawn = draw_tiles(scenes, args, np.random.default_rng(3))
    assert drawn["depth"].isnan().all() and drawn["pixel_values"].shape == (3, SIDE, SIDE)
    tiles = drawn["noun"][:15, :15].unflatten(0, (3, 5)).unflatten(2, (3, 5)).transpose(1, 2).flatten(2)
    assert ((tiles > 0).sum(-1) >= 5).all() and len(tiles[tiles > 0].unique()) >= 3
    assert set(drawn["noun"].unique().tolist()) <= {0, 3, 7, 11, 30}
    known = {noun: colour for noun, colour, _ in scenes[0]["names"][1:5].tolist()}
    for noun, colour in zip(drawn["noun"].flatten().tolist(), drawn["colour"].flatten().tolist(), strict=True):
        assert colour == known.get(noun, 0)
    marked = drawn["point"][drawn["point"] > 0]
    assert 2 <= len(marked) <= 9
    reader = CellReader(vision_config(SIDE, 14, 32, 1, 2))
    loss = reader(**{name: tensor[None] for name, tensor in drawn.items()})["loss"]
    loss.backward()
    assert loss.isfinite() and all(weight.grad.isfinite().all() for weight in reader.parameters())


def test_things_that_show_well_are_framed():
    scene = numbered_scene()
    found = {tuple(frame.flatten().tolist()) for frame in scene["frames"]}
    assert found == {(8, 8, 41, 41), (10, 60, 43, 93), (60, 12, 93, 45), (58, 64, 91, 97)}
    things = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    things[:4, :4], things[50:70, 20:90] = 3, 9
    assert 16 < LEAST_SHOWN * SIDE**2 and frames(things).tolist() == [[[50, 20], [69, 89]]]
    assert frames(torch.zeros_like(things)).tolist() == [[[0, 0], [SIDE - 1, SIDE - 1]]]


def test_convolutions_are_trained_with_norms_and_kept_without():
    torch.manual_seed(0)
    reader = CellReader(vision_config(56, 14, 32, 1, 2, (8, 16), (1, 2)))
    plain = set(reader.tower.state_dict())
    open_convolutions(reader.tower, norms=True)
    pictures = [torch.randn(4, 3, 56, 56) * 2 + 1 for _ in range(20)]
    for picture in pictures:
        reader.read(picture)
    pairs = convolutions(reader.tower)
    kept = [pair[0].parametrizations.weight.original for pair in pairs if hasattr(pair[0], "parametrizations")]
    assert len(pairs) == 9 and [matrix.ndim for matrix in kept] == [2] * 8
    reader.eval()
    with torch.no_grad():
        before = reader.read(pictures[0])
        close_convolutions(reader.tower)
        after = reader.read(pictures[0])
    assert set(reader.tower.state_dict()) == plain and not list(reader.tower.buffers())
    assert all(torch.allclose(after[name], value, atol=1e-4) for name, value in before.items())


def test_a_tower_goes_on_with_pictures_and_patches_of_another_size():
    torch.manual_seed(0)
    old, new = (CellReader(vision_config(side, patch, 32, 1, 2)).tower for side, patch in ((56, 14), (80, 10)))
    same = fitted(old.state_dict(), old.state_dict())
    assert all(torch.allclose(same[name], weight, atol=1e-6) for name, weight in old.state_dict().items())
    new.load_state_dict(fitted(old.state_dict(), new.state_dict()))
    even = [tower.embeddings.patch_embeddings(torch.ones(1, 3, side, side)) for tower, side in ((old, 56), (new, 80))]
    even = [part[0] if isinstance(part, tuple) else part for part in even]
    assert (even[0][0, 0] - even[1][0, 0]).norm() < 0.15 * even[0][0, 0].norm()
    before, after = old.embeddings.position_embeddings[0, 1:], new.embeddings.position_embeddings[0, 1:]
    nearest = torch.nn.functional.cosine_similarity(after[:, None], before[None], dim=-1).argmax(1).view(8, 8)
    rows, columns = torch.meshgrid(torch.arange(8) // 2, torch.arange(8) // 2, indexing="ij")
    assert (nearest == rows * 4 + columns).float().mean() > 0.8


def test_cells_are_read_where_they_are():
    """What changes in one patch alone is asked of that patch: its four cells, in their places."""
    torch.manual_seed(0)
    reader = CellReader(vision_config(56, 14, 32, 1, 2)).eval()
    states = torch.zeros(1, 17, 32)
    states[0, 1 + 4 * 1 + 2, 0] = 1  # the patch in row 1, column 2

    class Tower(torch.nn.Module):
        def forward(self, pixel_values):
            return type("Output", (), {"last_hidden_state": states})

    reader.tower = Tower()
    found = reader.read(torch.zeros(1, 3, 56, 56))
    assert [found[name].shape[-1] for name in CLASSES] == list(CLASSES.values())
    blocks = found["depth"][0].unflatten(0, (4, 2)).unflatten(2, (4, 2)).transpose(1, 2)  # [row, column, 2, 2]
    usual = blocks[0, 0]
    differs = (blocks - usual).abs().amax((2, 3)) > 1e-6
    assert found["depth"].shape == (1, 8, 8) and differs.nonzero().tolist() == [[1, 2]]


def test_attention_begins_near_by():
    """Of a picture of noise, in the first layer: a place looks at its neighbours, without training."""
    torch.manual_seed(0)
    tower = CellReader(vision_config(112, 14, 64, 1, 2)).tower.eval()
    states = tower(torch.randn(2, 3, 112, 112), output_attentions=True)
    seen = states.attentions[0][:, :, 1:, 1:].mean((0, 1))  # [64, 64]
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], -1)
    apart = torch.cdist(places, places)
    near, far = seen[(apart > 0) & (apart < 1.5)].mean(), seen[apart > 4].mean()
    assert near > 1.08 * far and seen.diagonal().mean() > near


def check_going_on(before, words, arguments):
    """A training with larger pictures that begins with what the first left, on its scenes; the part tells of both."""
    after = before / "after"
    changed = {"output_dir": after, "side": 84, "start": before / "model", "scenes_folder": before / "scenes",
               "max_steps": 5}  # fmt: skip
    assert main([*words, *(str(part) for name, value in changed.items() for part in (f"--{name}", value))]) == 0
    assert not (after / "scenes").exists()
    assert main_of_freeze([str(after), str(before / "part"), "--first", str(before)]) == 0
    log = [json.loads(line) for line in (before / "part" / "log.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [*range(5, 41, 5), 5]
    assert f"{arguments['max_steps'] + 5} steps" in (before / "part" / "README.md").read_text("utf-8")
    tower = PerceptioVisionModel.from_pretrained(before / "part", dtype=torch.float32)
    assert tower(torch.zeros(1, 3, 84, 84)).last_hidden_state.shape == (1, 37, 32)
    towers = [PerceptioVisionModel.from_pretrained(folder / "model") for folder in (before, after)]
    first, second = (tower.embeddings.patch_embeddings.last[0].weight for tower in towers)
    assert 0 < (first - second).norm() < 0.2 * first.norm()


@pytest.mark.parametrize("stages", [(), ("--conv_widths", "16", "32", "--conv_depths", "1", "1")])
def test_a_short_training_learns_and_leaves_a_tower(stages, tmp_path, capsys):
    arguments = {"output_dir": tmp_path, "scenes": 12, "eval_scenes": 4, "side": 56, "scene_side": 64, "width": 32,
                 "layers": 2, "heads": 2, "per_device_train_batch_size": 4, "max_steps": 40, "learning_rate": 3e-3,
                 "logging_steps": 5, "save_steps": 20, "report_to": "none", "disable_tqdm": True, "bf16": False,
                 "train_sampling_strategy": "sequential"}  # fmt: skip
    words = [*stages, *(str(part) for name, value in arguments.items() for part in (f"--{name}", value))]
    assert main(words) == 0
    state = json.loads((tmp_path / "checkpoint-40" / "trainer_state.json").read_text())
    losses = [line["loss"] for line in state["log_history"] if "loss" in line]
    assert losses[-1] < losses[0] - 1.2, losses
    figures = json.loads((tmp_path / "model" / "evaluation.json").read_text())
    assert figures["scenes"] == 4 and all(0 <= figures[name] <= 1 for name in (*CLASSES, "depth"))
    tower = PerceptioVisionModel.from_pretrained(tmp_path / "model")
    assert tower(torch.zeros(1, 3, 56, 56)).last_hidden_state.shape == (1, 17, 32)
    if stages:
        check_going_on(tmp_path, words, arguments)
        return
    for field, value in (("side", "100"), ("cells", "4")):
        assert main([*words, f"--{field}", value]) == 2
        assert f"`{field}` is {value}" in capsys.readouterr().err
