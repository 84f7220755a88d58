"""The world's parts by themselves: meshes, colours, the camera, light, phrases, and its command."""

import json
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from perceptio.cli import main
from perceptio.data.shards import read_shards
from perceptio.data.validate import check_records
from perceptio.world import phrases
from perceptio.world.marks import GAP, choose_points, draw_points
from perceptio.world.render import Camera, Geometry, Light, Piece, Setting, render
from perceptio.world.scene import lay_out, sample_scene
from perceptio.world.shapes import FILLERS, NOUNS, VARIANTS, filler, mesh
from perceptio.world.surfaces import (
    COLOURS,
    MIXES,
    Surface,
    albedo,
    may_be_taken_for,
    noise_at,
    sample_colour,
    to_linear,
)
from perceptio.world.views import View

GREY = to_linear([0.6, 0.6, 0.6])


@pytest.mark.parametrize("noun", NOUNS)
def test_every_thing_stands_on_the_ground_at_unit_size(noun):
    for variant in range(VARIANTS):
        for fineness in (1.0, 0.7, 0.5):
            shape = mesh(noun, variant, fineness)
            assert abs(shape.vertices[:, 1].min()) < 1e-5 and abs(max(shape.extent) - 1) < 1e-5
            assert np.allclose(np.linalg.norm(shape.normals, axis=-1), 1, atol=1e-4)
        assert len(mesh(noun, variant, 0.5).faces) <= len(mesh(noun, variant).faces)
        assert np.abs(np.subtract(mesh(noun, variant, 0.5).extent, mesh(noun, variant).extent)).max() < 0.12


@pytest.mark.parametrize("name", FILLERS)
def test_fillers_stand_on_the_ground(name):
    shape = filler(name, 3)
    assert abs(shape.vertices[:, 1].min()) < 1e-5 and abs(max(shape.extent) - 1) < 1e-5


def test_colours_of_different_names_are_told_apart_unless_they_are_listed_as_alike():
    """Compared in CIELAB under white light: what is not listed as alike is plainly another colour."""
    rng = np.random.default_rng(0)

    def lab(rgb):
        xyz = rgb @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
        f = np.cbrt(xyz / (0.9505, 1, 1.089))
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    samples = {name: [lab(sample_colour(rng, name)) for _ in range(20)] for name in COLOURS}
    for first in COLOURS:
        for second in COLOURS:
            if not may_be_taken_for(first, second):
                nearest = min(np.linalg.norm(a - b) for a in samples[first] for b in samples[second])
                assert nearest > 25, (first, second, nearest)


@pytest.mark.parametrize("kind", MIXES)
def test_patterns_stay_between_their_two_colours(kind):
    points = np.random.default_rng(0).uniform(-3, 3, (3, 500)).astype(np.float32)
    normals = np.repeat(np.float32([[0], [1], [0]]), 500, 1)
    a, b = np.float32([0.1, 0.2, 0.3]), np.float32([0.9, 0.8, 0.7])
    colour = albedo(Surface(kind, a, b, 0.4, grain=0.0), points, normals)
    assert colour.shape == (3, 500) and (colour >= a[:, None] - 0.26).all() and (colour <= b[:, None] + 0.26).all()
    assert (kind == "plain") == (np.ptp(colour) < 0.21)


def test_noise_tiles():
    u = np.linspace(-2, 2, 50, dtype=np.float32)
    assert np.allclose(noise_at(0, u, u), noise_at(0, u + 1, u - 3), atol=0.2)
    assert 0 <= noise_at(3, u, u).min() and noise_at(3, u, u).max() <= 1


def camera(**changes):
    return Camera(
        **{
            "position": np.array([0.5, 1.2, -4.0]),
            "target": np.array([0.0, 0.3, 0.0]),
            "width": 80,
            "height": 60,
            **changes,
        }
    )


def test_projection_inverts_the_rays():
    for view in (camera(), camera(roll=0.2, fov=0.7, width=60, height=90)):
        x, y = np.float32([0.5, 40, 59.5]), np.float32([0.5, 30, 2.5])
        points = view.position + 3.5 * view.rays(x, y).T
        found = view.project(points)
        assert (
            np.allclose(found[0], x, atol=1e-3) and np.allclose(found[1], y, atol=1e-3) and np.allclose(found[2], 3.5)
        )


def plain_setting(**changes):
    sun = Light(np.float32([2, 2, 2]), direction=np.array([0, 1.0, 0]))
    values = {"lights": [sun], "sky_low": np.float32([0.5] * 3), "sky_high": np.float32([0.5] * 3), "ambient": 0.2}
    return Setting(**{**values, "ground_bounce": np.float32([0.3] * 3), "noise": 0.0, "vignette": 0.0, **changes})


def piece(name, size, at, thing=-1):
    from perceptio.world.scene import _part

    return Piece(
        _part(name), Surface("plain", GREY, GREY, grain=0.0), np.array(at, np.float64), np.float32(size), thing=thing
    )


def test_a_ball_is_where_geometry_puts_it():
    view = Camera(np.array([0, 0, -4.0]), np.zeros(3), 101, 101, 1.0)
    geometry = Geometry([piece("ball", (1, 1, 1), (0, 0, 0), 0)], view)
    found = render(geometry, view, plain_setting(), np.random.default_rng(0))
    assert abs(found.depth[50, 50] - 3.5) < 0.01
    edge = 0.5 / np.sqrt(16 - 0.25)  # tangent of the angle of the outline
    radius = np.sqrt((found.piece >= 0).sum() / np.pi)
    assert abs(radius - edge * view.focal()) < 0.35
    assert np.isinf(found.depth[0, 0]) and found.piece[0, 0] == -1


def test_what_stands_above_throws_a_shadow_and_what_is_behind_the_camera_is_left_out():
    view = camera()
    floor, lid = piece("block", (8, 0.02, 8), (0, -0.02, 0)), piece("block", (1.5, 0.05, 1.5), (0, 1.6, 0))
    behind = piece("block", (1, 1, 1), (0, 0, -20))
    rng = np.random.default_rng(0)
    bright = render(Geometry([floor, behind], view), view, plain_setting(), rng).image.astype(float)
    dark = render(Geometry([floor, lid], view), view, plain_setting(), rng).image.astype(float)
    assert len(Geometry([floor, behind], view).pieces) == 1 and len(Geometry([floor, behind]).pieces) == 2
    x, y, _ = view.project(np.array([[0, 0, 0.0], [2.0, 0, 0.0]]))
    (sx, lx), (sy, ly) = x.astype(int), y.astype(int)
    assert bright[sy, sx].mean() == pytest.approx(bright[ly, lx].mean(), rel=0.1)
    assert dark[sy, sx].mean() < 0.6 * dark[ly, lx].mean()


def view(index, noun="ball", colour="red", pattern="plain", x=0.5, near=2.0, clear=True, patterned=True):
    mask = np.zeros((4, 4), bool)
    return View(index, noun, colour, pattern, mask, 10, x, 0.5, near, near * 1.05, near * 1.1, clear, patterned)


def test_phrases_fit_one_thing_alone():
    red, blue = view(0), view(1, colour="blue", x=0.8)
    assert phrases.by_attributes(red, [red, blue]) == ["the red ball", "the plain red ball"]
    assert phrases.by_attributes(red, [red]) == ["the ball", "the red ball", "the plain ball", "the plain red ball"]
    orange = view(2, colour="orange", x=0.2)
    assert phrases.by_attributes(red, [red, orange]) == []  # one may be taken for the other
    striped = view(3, pattern="striped", x=0.2)
    assert phrases.by_attributes(striped, [red, striped]) == ["the striped ball", "the striped red ball"]
    far = view(3, pattern="striped", patterned=False)
    assert phrases.by_attributes(red, [red, far]) == []  # its pattern cannot be seen
    assert phrases.by_attributes(red, [red, view(4, noun="egg")]) == []


def test_order_is_asked_for_only_when_all_of_the_kind_are_plain_to_see():
    row = [view(index, x=x, near=n) for index, (x, n) in enumerate(((0.1, 3), (0.4, 2), (0.9, 5)))]
    assert phrases.by_place(row[0], row) == ["the ball farthest to the left"]
    assert phrases.by_place(row[1], row) == ["the second ball from the left", "the ball closest to the camera"]
    last = ["the ball farthest to the right", "the third ball from the left", "the ball farthest from the camera"]
    assert phrases.by_place(row[2], row) == last
    assert phrases.by_place(row[0], [*row, view(9, x=0.6, clear=False)]) == []
    near = [view(0, x=0.5), view(1, x=0.55, near=2.1)]
    assert phrases.by_place(near[0], near) == []


def test_neighbours():
    cube = view(5, noun="cube", x=0.5, near=3)
    left, right = view(0, x=0.2, near=1.5), view(1, x=0.8, near=6)
    assert phrases.by_neighbour(left, [left, right, cube]) == [
        "the ball to the left of the cube",
        "the ball in front of the cube",
    ]
    assert phrases.by_neighbour(right, [left, right, cube]) == [
        "the ball to the right of the cube",
        "the ball behind the cube",
    ]


def test_what_is_absent_is_not_there_in_the_most_generous_reading():
    rng = np.random.default_rng(0)
    found = [view(0), view(1, noun="cube", colour="grey")]
    for _ in range(300):
        words, noun, colour = phrases.absent(rng, found, list(NOUNS), {"table"})
        assert noun != "table" and not any(phrases.may_fit(other, noun, colour) for other in found), words
    assert phrases.with_article("orange egg") == "an orange egg" and phrases.plural("bench") == "benches"


def test_points_obey_their_distances_and_the_lure():
    rng = np.random.default_rng(0)
    inverse = np.linspace(0, 1, 300)[:, None] + np.zeros((300, 300))  # lower is nearer, as on a floor
    depth = 1 / (0.1 + inverse)
    assert choose_points(rng, inverse, depth, 3, lure=True) is None
    points = choose_points(rng, inverse, depth, 3, lure=False)
    values = [inverse[y, x] for x, y in points]
    assert values == sorted(values, reverse=True) and min(-np.diff(values)) > GAP
    assert points[0][1] == max(y for _, y in points)
    up = choose_points(rng, inverse[::-1], depth[::-1], 3, lure=True)
    assert up[0][1] < max(y for _, y in up) - 15


def test_marks_leave_the_picture_itself_alone():
    image = np.full((224, 224, 3), 128, np.uint8)
    marked = draw_points(image, [(100, 110)], "A")
    assert (image == 128).all() and (marked[110, 100] == 128).all()
    ring = marked[110 - 3 : 110 + 4, 100 - 4 : 100 + 5]
    assert ((ring[..., 0] > 200) & (ring[..., 1] < 60)).sum() >= 8
    assert (marked[88:108, 90:110].max(-1) < 10).sum() > 30  # the box of the letter, above the ring


def test_the_command_writes_a_data_set_and_a_sheet(tmp_path, capsys):
    assert main(["world", "build", str(tmp_path / "w"), "--scenes", "3", "--workers", "0", "--size", "96"]) == 0
    records = list(read_shards(tmp_path / "w"))
    assert len(records) >= 3 and not [problem for _, problems in check_records(records) for problem in problems]
    assert Image.open(BytesIO(records[0]["image"]["bytes"])).size == (96, 96)
    assert json.loads(records[0]["extra"])["questions"][0]["kind"]
    assert (tmp_path / "w" / "README.md").is_file()
    assert main(["world", "build", str(tmp_path / "w"), "--scenes", "3"]) == 2
    assert "already has" in capsys.readouterr().err
    assert main(["world", "sheet", str(tmp_path / "s.png"), "--scenes", "2", "--columns", "2"]) == 0
    assert Image.open(tmp_path / "s.png").width > 700
    for wrong in (["sheet", "x.gif"], ["build", "x", "--scenes", "0"], ["build", "x", "--size", "9"]):
        assert main(["world", *wrong]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_in_the_air_the_larger_looking_of_two_things_is_the_nearer():
    """Nothing else tells there how far a thing is."""
    pairs = 0
    for seed in range(40):
        scene = lay_out(np.random.default_rng(seed), 224, 224, "studio")
        away = np.array([np.linalg.norm(thing.position - scene.camera.position) for thing in scene.things])
        looks = np.array([thing.size for thing in scene.things]) / away
        plain = looks[:, None] > 1.2 * looks
        assert (away[:, None] < np.broadcast_to(away, plain.shape))[plain].all()
        pairs += plain.sum()
    assert pairs > 500


def test_each_place_has_scenes_with_several_things():
    from perceptio.world.scene import PLACES

    for place in PLACES:
        scene = sample_scene(np.random.default_rng(5), 96, 96, place.__name__)
        assert scene.place == place.__name__ and len(scene.things) >= 4 and scene.rendering.image.std() > 5
