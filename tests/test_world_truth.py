"""The world's pictures, masks, depth and answers against a second computation that shares no code with them."""

import json
import re
import subprocess
import sys
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from truth import GRID, Truth, verdict

from perceptio.data.depths import decode_depth
from perceptio.data.validate import check_records
from perceptio.world.marks import draw_points
from perceptio.world.questions import KINDS, Asker
from perceptio.world.records import POINTS, SPLITS, WorldOptions, scene_records, world_dataset, world_records
from perceptio.world.scene import PLACES, sample_scene

PER_PLACE = 3
PLACE_NAMES = [place.__name__ for place in PLACES]


def judged(place: str, number: int):
    """(truth, asker, scene) of one scene."""
    rng = np.random.default_rng([77, PLACE_NAMES.index(place), number])
    scene = sample_scene(rng, 224, 224, place)
    return Truth(scene), Asker(scene, rng), scene


@pytest.mark.parametrize("place", PLACE_NAMES)
def test_pictures_depth_and_every_answer_agree_with_the_geometry(place):
    check_place(place, range(PER_PLACE))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACE_NAMES)
def test_many_more_scenes_agree(place):
    check_place(place, range(100, 125))


def check_place(place: str, numbers) -> None:
    wrong, asked = [], 0
    for number in numbers:
        truth, asker, scene = judged(place, number)
        rows, columns = truth.y.astype(int), truth.x.astype(int)
        things = np.append(scene.geometry.thing_of, -1)[scene.rendering.piece][rows, columns]
        assert (things == truth.thing).mean() > 0.985, (place, number)
        depth = scene.rendering.depth[rows, columns]
        both = np.isfinite(depth) & np.isfinite(truth.depth)
        assert (np.isfinite(depth) == np.isfinite(truth.depth)).mean() > 0.99, (place, number)
        close = np.abs(depth[both] - truth.depth[both]) < 0.002 * truth.depth[both] + 1e-3
        assert close.mean() > 0.985, (place, number, close.mean())
        check_inverse(asker.inverse[rows, columns], truth.depth, close, both)
        for kind in KINDS:
            question = asker.ask(kind)
            if question is not None:
                asked += 1
                fault = verdict(truth, question)
                wrong += [(place, number, question.text, question.answer, fault)] if fault else []
        for count in (2, 3, 4, 5):
            for lure in (None, True):
                question = asker.points(count, lure)
                if question is not None:
                    asked += 1
                    fault = points_fault(truth, question, count, lure)
                    wrong += [(place, number, count, question.answer, fault)] if fault else []
                    for later in asker.about_points(question, 4):
                        fault = later_fault(truth, asker, later, question.extra["points"])
                        wrong += [(place, number, later.text, later.answer, fault)] if fault else []
    assert not wrong
    assert asked > 3 * len(numbers)


def check_inverse(inverse, depth, close, both) -> None:
    """Affine in 1 / depth, 0 in the sky, from 0 to 1."""
    assert inverse.min() >= 0 and inverse.max() <= 1
    if not both.all():
        assert np.all(inverse[~both & np.isinf(depth)] < 0.02)
    x, y = 1 / depth[both][close], inverse[both][close]
    if np.ptp(x) > 0.01:
        slope, offset = np.polyfit(x, y, 1)
        assert slope > 0 and np.abs(slope * x + offset - y).max() < 0.01


def points_fault(truth, question, count: int, lure) -> str:
    places = question.extra["points"]
    letters = sorted(places)
    if letters != list("ABCDE"[:count]):
        return f"letters {letters}"
    x, y = np.array([places[letter] for letter in letters]).T
    _, depth = truth.look(x + 0.5, y + 0.5)
    nearest = letters[int(depth.argmin())]
    if question.answer != f"({nearest})":
        return f"nearest is {nearest} of {depth}"
    if np.sort(depth)[1] < 1.05 * depth.min():
        return f"two are almost as near: {depth}"
    apart = np.hypot(x[:, None] - x, y[:, None] - y)[np.triu_indices(count, 1)]
    if apart.min() < 20 / 336 * truth.width:
        return f"two points {apart.min():.1f} pixels apart"
    if lure and y[depth.argmin()] >= y.max():
        return "the nearest is the lowest"
    for px, py in zip(x, y, strict=True):
        around = question.image[py - 4 : py + 5, px - 4 : px + 5].astype(int)
        if (around[..., 0] - around[..., 1:].max(-1) > 60).sum() < 6:  # paler where it was drawn larger
            return f"no ring around {px}, {py}"
        above = question.image[max(0, py - 22) : py - 4, max(0, px - 8) : px + 9].max(-1)
        if (above < 45).sum() < 20 or np.ptp(above) < 80:
            return f"no letter above {px}, {py}"
    return ""


def later_fault(truth, asker, question, places) -> str:
    """Of a question about points that were drawn before."""
    letters = re.findall(r"point ([A-E])", question.text)
    x, y = np.array([places[letter] for letter in letters]).T
    if len(letters) == 2:
        _, depth = truth.look(x + 0.5, y + 0.5)
        if question.answer != f"({letters[int(depth.argmin())]})":
            return f"depths {depth}"
    elif question.answer != f"{min(9, int(asker.inverse[y[0], x[0]] * 10))}.":
        return f"{asker.inverse[y[0], x[0]]}"
    return "" if question.mask is None else "it has a mask of rings"


def test_the_oracle_itself_finds_faults():
    """A second opinion that agrees with everything proves nothing."""
    truth, asker, _ = judged("table", 1)
    found = Counter()
    for _ in range(30):
        for kind, other in (
            ("side", {"Left.": "Right.", "Right.": "Left."}),
            ("count", {f"{n}.": f"{n + 1}." for n in range(9)}),
        ):
            question = asker.ask(kind)
            if question is not None and not verdict(truth, question):
                question.answer = other[question.answer]
                found[kind, bool(verdict(truth, question))] += 1
        question = asker.ask("refer")
        if question is not None:
            question.mask = np.roll(question.mask, 40, 1)
            found["refer", bool(verdict(truth, question))] += 1
    assert found and all(caught for _, caught in found), found


def test_scenes_do_not_depend_on_workers_order_or_process():
    """The same numbers in another process, backwards, and by two workers."""
    options = WorldOptions(112, 112)
    straight = list(world_records(40, seed=3, options=options, workers=0))
    assert list(world_records(40, seed=3, options=options, workers=2)) == straight
    backwards = [scene_records(index, 3, options=options) for index in reversed(range(6))]
    assert [record for found in reversed(backwards) for record in found] == straight[: sum(map(len, backwards))]
    script = (
        "import hashlib, json, sys; from perceptio.world.records import *\n"
        "found = list(world_records(3, seed=3, options=WorldOptions(112, 112), workers=0))\n"
        "print(hashlib.sha256(repr(found).encode()).hexdigest())"
    )
    import hashlib

    fresh = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()[
        -1
    ]
    mine = [record for index in range(3) for record in scene_records(index, 3, options=options)]
    assert fresh == hashlib.sha256(repr(mine).encode()).hexdigest()
    assert list(world_records(2, seed=3, options=options, first=4, workers=0)) == [
        record for index in (4, 5) for record in scene_records(index, 3, options=options)
    ]


def test_scenes_rendered_while_they_are_read():
    """Through `datasets` and a DataLoader with two workers: every scene once."""
    from torch.utils.data import DataLoader

    options = WorldOptions(96, 96)
    dataset = world_dataset(70, seed=3, options=options)
    expected = [record["id"] for index in range(70) for record in scene_records(index, 3, options=options)]
    first = next(iter(dataset))
    assert first["image"].size == (96, 96) and first["depth"].mode.startswith("I")
    loader = DataLoader(dataset, batch_size=None, num_workers=2)
    assert sorted(record["id"] for record in loader) == sorted(expected)


def test_splits_hold_what_they_are_named_for_and_share_no_scene():
    seen = set()
    for split in SPLITS:
        records = list(world_records(3, seed=1, split=split, options=WorldOptions(160, 160), workers=0))
        assert not [problem for _, problems in check_records(records) for problem in problems]
        for record in records:
            kinds = [question["kind"] for question in json.loads(record["extra"])["questions"]]
            seen.add(record["image"]["bytes"])
            if split in POINTS:
                assert (
                    kinds == ["points"] and len(json.loads(record["extra"])["questions"][0]["points"]) == POINTS[split]
                )
            elif split == "lure":
                assert not json.loads(record["extra"])["questions"][0]["nearest_is_lowest"]
            elif split in ("refer", "absent"):
                assert kinds == [split]
        assert all(record["split"] == split for record in records)
    assert len(seen) >= 3 * len(SPLITS)


@pytest.fixture(scope="module")
def many():
    """Three hundred small scenes."""
    return list(world_records(300, seed=21, options=WorldOptions(112, 112, turns=4, points=1.0), workers=2))


def test_a_record_says_that_its_span_is_read_where_depth_is_asked_for(many):
    found = Counter()
    for record in many:
        extra = json.loads(record["extra"])
        asked = {question["kind"] for question in extra["questions"]}
        told = extra.get("read_span", False)
        assert told is bool(asked & {"closer", "nearest", "points", "near", "pair"})
        found[told, record["id"].endswith("-points")] += 1
    assert set(found) == {(True, True), (True, False), (False, False)}


def test_kinds_are_drawn_by_weight_and_only_the_repeated_ones_twice():
    options = WorldOptions(112, 112, turns=5, points=0, kinds={"colour": 3, "exists": 1}, repeated=("colour",))
    most = Counter()
    for record in world_records(6, seed=5, options=options, workers=0):
        questions = json.loads(record["extra"])["questions"]
        kinds = Counter(question["kind"] for question in questions)
        assert set(kinds) <= {"colour", "exists"}
        texts = [message["content"] for message in record["messages"][::2]]
        assert len(set(texts)) == len(texts) == len(questions)
        most |= kinds
    assert most["colour"] > 1 == most["exists"]


def test_no_two_questions_of_a_kind_are_about_the_same_two_things():
    options = WorldOptions(112, 112, turns=6, points=0, kinds={"side": 1, "closer": 1}, repeated=("side", "closer"))
    several = 0
    for record in world_records(12, seed=6, options=options, workers=0):
        for kind in ("side", "closer"):
            asked = [q["things"] for q in json.loads(record["extra"])["questions"] if q["kind"] == kind]
            assert len({frozenset(things) for things in asked}) == len(asked), record["id"]
            several += len(asked) > 1
    assert several >= 5


def test_guessing_by_position_does_not_pay(many):
    """First-named or second, left or right, yes or no, each letter: within four standard errors of even."""
    counts = Counter()
    for record in many:
        kinds = [question["kind"] for question in json.loads(record["extra"])["questions"]]
        for kind, question, answer in zip(kinds, record["messages"][::2], record["messages"][1::2], strict=True):
            said = answer["content"]
            if kind == "closer":
                counts["closer", question["content"].lower().split(said[:-1].lower())[0].count(" or ") == 0] += 1
            elif kind in ("side", "exists"):
                counts[kind, said in ("Left.", "Yes.")] += 1
            elif kind == "points":
                points = json.loads(record["extra"])["questions"][0]["points"]
                counts["points", "A" in said] += 1
                counts["points expected", "A"] += 1 / len(points)
    for kind in ("closer", "side", "exists"):
        yes, no = counts[kind, True], counts[kind, False]
        assert yes + no > 30 and abs(yes - no) < 4 * np.sqrt(yes + no), (kind, yes, no)
    total = counts["points", True] + counts["points", False]
    expected = counts["points expected", "A"]
    assert total > 80 and abs(counts["points", True] - expected) < 4 * np.sqrt(expected)


def test_every_kind_and_every_place_occurs(many):
    extras = [json.loads(record["extra"]) for record in many]
    kinds = Counter(question["kind"] for extra in extras for question in extra["questions"])
    assert set(kinds) == {*KINDS, "points"} and min(kinds.values()) >= 8
    places = Counter(extra["place"] for extra in extras if extra["questions"][0]["kind"] != "points")
    for builder, share in PLACES.items():
        assert abs(places[builder.__name__] - share * 300) < 4 * np.sqrt(share * 300) + 1, places


def test_no_two_pictures_are_alike(many):
    """Thumbnails of 24 × 24: even the most alike of all pairs differ by more than a tenth of the usual difference."""
    thumbs = []
    for record in many:
        if "points" not in record["id"]:
            picture = Image.open(BytesIO(record["image"]["bytes"])).resize((24, 24), Image.Resampling.BOX)
            thumbs.append(np.asarray(picture, float).ravel())
    thumbs = np.array(thumbs)
    differences = [np.abs(thumbs[index + 1 :] - thumb).mean(1) for index, thumb in enumerate(thumbs[:-1])]
    assert len(thumbs) == 300
    usual, least = np.median(np.concatenate(differences)), min(map(np.min, differences))
    assert usual > 40 and least > 14, (usual, least)


def test_depth_survives_in_the_record():
    rng = np.random.default_rng([0, 0, 5])
    scene = sample_scene(rng, 224, 224)
    record = scene_records(5)[0]
    truth = Truth(scene)
    depth = decode_depth(record["depth"]["bytes"])[truth.y.astype(int), truth.x.astype(int)]
    assert depth.shape == (GRID * GRID,)
    assert np.corrcoef(depth, np.where(np.isfinite(truth.depth), 1 / truth.depth, 0))[0, 1] > 0.995


@pytest.mark.parametrize(
    "field, wrong",
    [
        ("width", 10),
        ("height", 5000),
        ("turns", 0),
        ("points", 1.5),
        ("point_turns", 0),
        ("kinds", {"riddle": 1}),
        ("kinds", {}),
        ("kinds", {"absent": 1}),
        ("repeated", ("riddle",)),
        ("width", "9"),
    ],
)
def test_wrong_options_are_named(field, wrong):
    with pytest.raises(ValueError, match=f"`{field}` is .*expected"):
        WorldOptions(**{field: wrong})
    with pytest.raises(ValueError, match="`split` is 'all', expected one of train"):
        scene_records(0, split="all")


@pytest.mark.parametrize("larger", [0.5, 2.0])
def test_marks_are_those_of_a_picture_that_was_marked_in_another_size(larger):
    """As if it had been brought to its size, and drawn on, elsewhere."""
    image = scene_records(3, 77, "refer")[0]["image"]["bytes"]
    picture = Image.open(BytesIO(image)).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    side = int(224 * larger)
    elsewhere = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))
    places = [(60, 90), (150, 120)]
    marked = draw_points(elsewhere, [(int(x * larger), int(y * larger)) for x, y in places], "BD")
    back = np.asarray(Image.fromarray(marked).resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    found, plain = (draw_points(np.asarray(picture), places, "BD", size).astype(int) for size in (larger, 1.0))
    for x, y in places:
        about = slice(y - 20, y + 8), slice(x - 10, x + 10)
        assert np.abs(found[about] - back[about]).mean() < 3 < np.abs(plain[about] - back[about]).mean()
