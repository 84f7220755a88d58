"""Recipes: what is wrong with one is said at once, and what is right is mixed exactly."""

import json
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from perceptio.data.masks import encode_mask
from perceptio.data.mixture import Mixture, RecordTable, apportion, with_perception, without_perception
from perceptio.data.recipe import describe, load_reader, mix, open_recipe, parse_recipe, read_recipe
from perceptio.data.record import DataError, assistant, make_record, user
from perceptio.data.row_groups import Group
from perceptio.data.shards import write_shards
from perceptio.data.sources import READERS
from perceptio.data.validate import check_record

RECIPES = sorted((Path(__file__).parents[1] / "recipes" / "data").glob("*.yaml"))


class Numbers(RecordTable):
    """A table whose records are numbers, in row groups of ten."""

    def __init__(self, rows: int):
        super().__init__(Group("numbers", n, 10 * n, min(10 * n + 10, rows)) for n in range(-(-rows // 10)))

    def __getitem__(self, row: int) -> int:
        return row


def mixture(rows: dict[str, int], **recipe) -> Mixture:
    entries = recipe.pop("sources", [{} for _ in rows])
    sources = [
        {"reader": "shards", "path": name, "name": name, **entry} for name, entry in zip(rows, entries, strict=True)
    ]
    return Mixture(parse_recipe({"sources": sources, **recipe}), [Numbers(count) for count in rows.values()])


def places(epoch) -> list[tuple[int, int]]:
    return list(zip(epoch.source.tolist(), epoch.row.tolist(), strict=True))


def test_every_row_is_there_as_often_as_it_is_repeated():
    epoch = mixture({"a": 37, "b": 5}, sources=[{"repeats": 2}, {"repeats": 4}]).epoch()
    expected = {(0, row): 2 for row in range(37)} | {(1, row): 4 for row in range(5)}
    assert Counter(places(epoch)) == expected and len(epoch) == 94


def test_part_of_a_repeat_holds_no_row_twice():
    epoch = mixture({"a": 100}, sources=[{"repeats": 1.25}]).epoch()
    counts = Counter(Counter(places(epoch)).values())
    assert counts == {1: 75, 2: 25}


def test_weights_share_an_epoch_of_the_given_length():
    epoch = mixture({"a": 10, "b": 1000}, rows_per_epoch=401, sources=[{"weight": 3}, {"weight": 1}]).epoch()
    assert np.bincount(epoch.source).tolist() == [301, 100]
    assert apportion([1, 1, 1], 10) == [4, 3, 3] and apportion([0.0, 2.0], 7) == [0, 7]


def test_every_stretch_of_an_epoch_holds_the_sources_in_their_shares():
    """Not only the whole: a source may not come all at once."""
    epoch = mixture({"a": 1000, "b": 100, "c": 10}).epoch()
    for source, rows in enumerate((1000, 100, 10)):
        seen = np.cumsum(epoch.source == source)
        due = rows * np.arange(1, len(epoch) + 1) / len(epoch)
        assert np.abs(seen - due).max() <= 3


def test_the_order_is_that_of_the_seed_and_the_epoch():
    rows = {"a": 50, "b": 20}
    first = places(mixture(rows).epoch(0))
    assert first == places(mixture(rows).epoch(0))
    assert first != places(mixture(rows).epoch(1)) and first != places(mixture(rows, seed=1).epoch(0))
    assert [row for _, row in first] != sorted(row for _, row in first)


def test_another_source_does_not_change_the_rows_of_the_first():
    alone = [row for _, row in places(mixture({"a": 50}).epoch())]
    beside = [row for source, row in places(mixture({"b": 9, "a": 50}).epoch()) if source == 1]
    assert alone == beside


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_readers_share_an_epoch_however_many_they_are(world):
    epoch = mixture({"a": 50, "b": 21}).epoch()
    parts = [list(epoch.part(rank, world)) for rank in range(world)]
    joined = [parts[place % world][place // world] for place in range(len(epoch))]
    assert joined == list(epoch)
    resumed = [record for rank in range(world) for record in epoch.part(rank, world, start=30)]
    assert sorted(resumed) == sorted(list(epoch)[30:])


def test_a_reader_past_the_last_is_an_error():
    with pytest.raises(ValueError, match="`rank` is 2 of a `world` of 2, expected 0 to 1"):
        mixture({"a": 5}).epoch().part(2, 2)


def test_a_curriculum_changes_the_shares_from_epoch_to_epoch():
    """AURORA's: the map alone goes from all of an epoch to half of it, what needs it fills up the rest."""
    shares = {"share_by_epoch": [1, 0.9, 0.5]}, {"share_by_epoch": [0, 0.1, 0.5]}
    weights = mixture({"depth": 200, "points": 10}, rows_per_epoch=200, sources=shares)
    assert [weights.counts(epoch) for epoch in range(4)] == [[200, 0], [180, 20], [100, 100], [100, 100]]
    repeats = mixture({"depth": 200, "points": 10}, sources=[shares[0], {"repeats": 20, **shares[1]}])
    assert [repeats.counts(epoch) for epoch in range(3)] == [[200, 0], [180, 20], [100, 100]]
    assert np.bincount(repeats.epoch(2).source).tolist() == [100, 100]


def test_the_order_stays_within_a_few_row_groups():
    """Each is a read of megabytes: rows must not come from all of them in turn."""
    rows = [row for _, row in places(mixture({"a": 1000}).epoch())]
    groups = [row // 10 for row in rows]
    assert max(len(set(groups[start : start + 40])) for start in range(0, 1000, 40)) <= 4


def test_a_table_shows_rows_and_shares():
    text = mixture({"a": 37, "b": 5}, sources=[{"repeats": 2}, {"repeats": 4.5}]).describe()
    assert [line.split() for line in text.splitlines()] == [
        ["source", "reader", "rows", "repeats", "in", "the", "epoch", "share"],
        ["a", "shards", "37", "2", "74", "77.1%"],
        ["b", "shards", "5", "4.5", "22", "22.9%"],
        ["all", "42", "96", "100.0%"],
    ]


def test_an_epoch_without_a_record_is_an_error():
    for recipe in ({}, {"rows_per_epoch": 5}):
        opened = mixture({"a": 3}, sources=[{"share_by_epoch": [1, 0]}], **recipe)
        assert len(opened.epoch(0))
        with pytest.raises(DataError, match="epoch 1 of the recipe has no record.*share_by_epoch"):
            opened.epoch(1)


def test_a_source_without_a_record_is_an_error():
    with pytest.raises(DataError, match="`b`: no record"):
        mixture({"a": 3, "b": 0})


def test_all_that_is_wrong_with_a_recipe_is_said_at_once():
    with pytest.raises(DataError) as raised:
        parse_recipe(
            {
                "sed": 3,
                "seed": -1,
                "sources": [
                    {"reader": "lava", "path": "x", "repeets": 2},
                    {
                        "reader": "llava",
                        "name": "a",
                        "path": "x",
                        "options": {"image": "y", "text_only": 1},
                        "take": 0,
                    },
                    {"reader": "shards", "name": "a", "weight": 2, "perception": "segmentation", "without": "none"},
                    "llava",
                ],
            },
            "mine.yaml",
        )
    found = {problem.field: str(problem) for problem in raised.value.problems}
    assert set(found) == {
        "sed",
        "seed",
        "sources[0].reader",
        "sources[0].repeets",
        "sources[1].options.image",
        "sources[1].options.text_only",
        "sources[1].take",
        "sources[2].path",
        "sources[2].weight",
        "sources[2].perception",
        "sources[2].without",
        "sources[2].name",
        "sources[3]",
    }
    assert "write `seed`" in found["sed"] and "write `repeats`" in found["sources[0].repeets"]
    assert "write `llava`" in found["sources[0].reader"] and "write `images`" in found["sources[1].options.image"]
    assert all(text.startswith("mine.yaml") for text in found.values())


@pytest.mark.parametrize("content", [None, [], "text", {}, {"sources": []}, {"sources": {"a": 1}}, {"sources": [{}]}])
def test_what_is_no_recipe_is_an_error_and_no_crash(content):
    with pytest.raises(DataError):
        parse_recipe(content)


@pytest.mark.parametrize(
    "text", ["a: [", "a: \x00", "a: 2020-13-45", "!!python/object/apply:os.system ['true']", None]
)
def test_an_unreadable_file_is_named(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match="recipe.yaml.*not readable"):
        read_recipe(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_are_good(path):
    recipe = read_recipe(path, root="elsewhere")
    assert recipe.root == "elsewhere" and len({source.name for source in recipe.sources}) == len(recipe.sources)


@pytest.mark.parametrize("name", sorted(READERS))
def test_every_reader_takes_a_root_and_a_tally(name):
    import inspect

    parameters = inspect.signature(load_reader(name)).parameters
    assert {"root", "tally", "split"} <= set(parameters)


def png(size=(12, 8)) -> bytes:
    from io import BytesIO

    file = BytesIO()
    Image.linear_gradient("L").resize(size).save(file, "PNG")
    return file.getvalue()


def record(number: int, source: str, perception: str = "seg") -> dict:
    mask = np.zeros((8, 12), bool)
    mask[2:5, 3:7] = True
    return make_record(
        id=f"{source}/{number}",
        image=png(),
        messages=[user("Where is it?"), assistant("Here, and here.", perception)],
        masks=[encode_mask(mask), {**encode_mask(~mask), "offset": 4}] if "seg" in perception else [],
        source=source,
        licence="CC0",
    )


def test_a_mode_of_the_recipe_replaces_that_of_the_records():
    plain = with_perception(record(1, "a"), "none")
    assert plain["masks"] == [] and plain["messages"][1]["perception"] == "none" and check_record(plain) == []
    coded = {**record(1, "a"), "depth_codes": [1, 2, 3, 4], "depth_codebook": "0" * 8}
    assert with_perception(coded, "seg+depth")["depth_codes"] == [1, 2, 3, 4]
    assert with_perception(coded, "seg")["depth_codes"] is None
    with pytest.raises(DataError, match="field `depth`: none in a/1"):
        with_perception(record(1, "a"), "seg+depth")
    with pytest.raises(DataError, match="field `masks`: none in a/1"):
        with_perception(record(1, "a", "none"), "seg")


def test_a_recipe_may_leave_parts_of_perception_out():
    """Of the records' own modes: a later turn without a depth span does not get one."""
    coded = {**record(1, "a", "seg+depth"), "depth_codes": [1, 2, 3, 4], "depth_codebook": "0" * 8}
    later = [*coded["messages"], user("And now?"), assistant("There.", "seg")]
    masks = [*coded["masks"], {**coded["masks"][0], "turn": 3}]
    coded = {**coded, "messages": later, "masks": masks}

    def modes(found):
        return [message["perception"] for message in found["messages"][1::2]]

    no_depth, no_mask, nothing = (without_perception(coded, mode) for mode in ("depth", "seg", "seg+depth"))
    assert modes(no_depth) == ["seg", "seg"] and no_depth["depth_codes"] is None and no_depth["masks"] == masks
    assert modes(no_mask) == ["depth", "none"] and no_mask["masks"] == [] and no_mask["depth_codes"] == [1, 2, 3, 4]
    assert modes(nothing) == ["none", "none"] and nothing["masks"] == [] and nothing["depth_codes"] is None
    assert not [problem for found in (no_depth, no_mask, nothing) for problem in check_record(found)]
    assert modes(coded) == ["seg+depth", "seg"]


@pytest.fixture
def data(tmp_path):
    """Shards of 30 records, and LLaVA's layout with 7 good rows and a bad one."""
    write_shards((record(n, "joint") for n in range(30)), tmp_path / "joint", rows_per_group=4, rows_per_shard=11)
    folder = tmp_path / "chat"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A ramp."}]
    rows = [{"id": str(n), "image": "a.png" if n else "none.png", "conversations": talk} for n in range(8)]
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    text = yaml.safe_dump(
        {
            "seed": 5,
            "root": str(tmp_path),
            "sources": [
                {"name": "joint", "reader": "shards", "path": "joint", "take": 21},
                {"name": "chat", "reader": "llava", "path": "chat", "repeats": 3, "options": {"licence": "mine"}},
            ],
        }
    )
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path


def test_shards_and_published_files_are_mixed(data):
    recipe = read_recipe(data / "recipe.yaml")
    records = list(mix(recipe))
    assert [problem for one in records for problem in check_record(one)] == []
    counts = Counter(one["id"] for one in records)
    assert len(records) == 21 + 21 and max(counts.values()) == 3
    assert {name for name in counts if name.startswith("joint")} == {f"joint/{n}" for n in range(21)}
    assert Counter(one["source"] for one in records) == {"joint": 21, "llava-1.5-665k": 21}
    assert {one["licence"] for one in records} == {"CC0", "mine"}
    assert [one["id"] for one in mix(recipe)] == [one["id"] for one in records]
    shared = [one["id"] for rank in range(2) for one in mix(recipe, rank=rank, world=2)]
    assert sorted(shared) == sorted(one["id"] for one in records)
    assert "chat" in describe(recipe) and "50.0%" in describe(recipe)


def test_one_source_may_be_many_folders(data):
    write_shards((record(n, "more") for n in range(5)), data / "joint-2")
    recipe = parse_recipe({"root": str(data), "sources": [{"reader": "shards", "path": "joint*"}]})
    found = Counter(one["id"].split("/")[0] for one in mix(recipe))
    alone = parse_recipe({"root": str(data), "sources": [{"reader": "shards", "path": "joint"}]})
    assert found == {"joint": len(list(mix(alone))), "more": 5}
    absent = parse_recipe({"root": str(data), "sources": [{"reader": "shards", "path": "part-*"}]})
    with pytest.raises(DataError, match=r"part-\*, field `shards`: no such path"):
        list(mix(absent))


def test_what_a_reader_drops_is_told(data):
    tallies = {}
    with open_recipe(read_recipe(data / "recipe.yaml"), tallies=tallies) as opened:
        assert len(opened.epoch()) == 42
    assert tallies["chat"].dropped == {"picture missing": 1} and tallies["chat"].kept == 7


def test_an_epoch_crosses_to_another_process(data):
    with open_recipe(read_recipe(data / "recipe.yaml")) as opened:
        epoch = opened.epoch()
        first = epoch[0]
        sent = bytes(ForkingPickler.dumps(epoch))  # as the DataLoader sends it
        assert ForkingPickler.loads(sent)[0] == first
        assert len(sent) < 20_000  # the rows that are open stay behind


def test_nothing_stays_behind(data, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    with open_recipe(read_recipe(data / "recipe.yaml"), cache=cache):
        assert list(cache.rglob("*.parquet"))
    assert list(cache.iterdir()) == []


def test_a_damaged_shard_is_named(data):
    with open_recipe(read_recipe(data / "recipe.yaml")) as opened:
        shard = next((data / "joint" / "data").glob("train-00000*"))
        shard.write_bytes(shard.read_bytes()[:100])
        with pytest.raises(DataError, match="train-00000.*fetch or write it again"):
            list(opened.epoch())


def test_a_missing_path_is_named_with_its_source(data):
    recipe = read_recipe(data / "recipe.yaml", root=data / "nowhere")
    with pytest.raises(DataError, match="nowhere/joint, field `joint`: no such path"):
        list(mix(recipe))
