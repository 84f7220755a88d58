"""What a run trains on: the recipe's own order over all epochs, records unchanged, lengths known beforehand."""

import pytest
import yaml
from datasets import Dataset, load_dataset
from learning_samples import SPAN, box, collator_of, load_tiny, record, slope, some_of_each, world
from own_samples import good_row, jpeg, write_rows
from shard_samples import folder_of, samples
from torch.utils.data import DataLoader
from warm import CONTEXT

from perceptio.data.recipe import mix, read_recipe
from perceptio.data.record import COLUMNS, FEATURES, DataError, assistant, user
from perceptio.data.shards import write_shards
from perceptio.training.data import RunData, as_recipe, as_records, check_lengths, sequence_length


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_tiny(tiny_folder())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A recipe of two folders of shards, of which one is seen twice in the first epoch and once from then on, and
    answers without depth."""
    root = tmp_path_factory.mktemp("recipe")
    folder_of(root / "many", 11)
    write_shards((record(f"mine-{i}", [box(bottom=9 + i)], depth=slope()) for i in range(3)), root / "mine")
    sources = [
        {"reader": "shards", "path": "many", "name": "many", "split": "train"},
        {"reader": "shards", "path": "mine", "name": "mine", "repeats": 2, "share_by_epoch": [1.0, 0.5],
         "perception": "seg"},
    ]  # fmt: skip
    (root / "data.yaml").write_text(yaml.safe_dump({"seed": 3, "root": str(root), "sources": sources}))
    return root


@pytest.fixture
def opened(folders):
    data = RunData(str(folders / "data.yaml"))
    yield data
    data.close()


def expected(folders, *epochs) -> list[dict]:
    recipe = read_recipe(folders / "data.yaml")
    return [record for epoch in epochs for record in mix(recipe, epoch)]


# The order


@pytest.mark.parametrize("epochs", [1, 2, 3.0])
def test_epochs_follow_each_other_in_the_order_of_the_recipe(opened, folders, epochs):
    records = list(opened.training(epochs))
    assert records == expected(folders, *range(int(epochs)))
    assert len(records) == 17 + 14 * (int(epochs) - 1)  # 11 and 2 × 3, then 11 and 3


def test_epochs_have_orders_of_their_own(opened):
    names = [record["id"] for record in opened.training(3)]
    assert sorted(names[17:31]) == sorted(names[31:]) and names[17:31] != names[31:]


@pytest.mark.parametrize(("epochs", "places"), [(0.5, 8), (1.5, 17 + 7), (2.25, 17 + 14 + 4), (0.03, 1)])
def test_the_last_epoch_may_be_a_part(opened, folders, epochs, places):
    records = list(opened.training(epochs))
    assert len(records) == places and records == expected(folders, 0, 1, 2)[:places]


@pytest.mark.parametrize("count", [1, 17, 18, 40])
def test_samples_may_be_counted_in_place_of_epochs(opened, folders, count):
    assert list(opened.training(epochs=0.1, samples=count)) == expected(folders, 0, 1, 2)[:count]


@pytest.mark.parametrize("options", [{"epochs": 0}, {"epochs": 0.01}, {"samples": 0}])
def test_nothing_to_train_on_is_an_error(opened, options):
    with pytest.raises(DataError, match="nothing to train on: raise `num_train_epochs`"):
        opened.training(**options)


def test_places_are_read_in_any_order(opened):
    dataset = opened.training(3)
    records = list(dataset)
    for place in (44, 0, 17, 31, 16, 44):
        assert dataset[place] == records[place]
    assert dataset[[20, 3]]["id"] == [records[20]["id"], records[3]["id"]]
    assert list(dataset.select([40, 2])) == [records[40], records[2]]


def identity(records: list) -> list:
    return records


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("context", ["fork", CONTEXT], ids=["fork", "forkserver"])
def test_workers_read_the_same_places(opened, context):
    dataset = opened.training(2)
    loader = DataLoader(dataset, 4, num_workers=2, collate_fn=identity, multiprocessing_context=context)
    assert [record for batch in loader for record in batch] == list(dataset)


def test_a_record_has_all_its_columns_and_encoded_pictures(opened):
    for one in opened.training(1):
        assert set(one) == set(COLUMNS) and isinstance(one["image"]["bytes"], bytes)


# What may be named


def as_it_is(rows):
    return {row["id"]: row["messages"] for row in rows}


def test_a_folder_of_rows(tmp_path):
    write_rows(tmp_path, [good_row(i, tmp_path) for i in range(5)])
    data = RunData(str(tmp_path))
    assert sorted(record["id"] for record in data.training(1)) == [f"r{i}" for i in range(5)]
    assert data.names == [tmp_path.name] and data.tallies[tmp_path.name].kept == 5
    data.close()


def test_a_file_of_rows(tmp_path):
    rows = [good_row(i, tmp_path) for i in range(4)]
    write_rows(tmp_path, rows, "other.jsonl")
    write_rows(tmp_path, rows[:3], "mine.jsonl")
    data = RunData(str(tmp_path / "mine.jsonl"))
    assert sorted(record["id"] for record in data.training(1)) == ["r0", "r1", "r2"]
    data.close()


def test_a_folder_of_shards_and_its_splits(tmp_path):
    write_shards(samples(4), tmp_path / "shards")
    write_shards(samples(2, split="validation"), tmp_path / "shards", split="validation")
    for split, count in {"train": 4, "validation": 2}.items():
        data = RunData(str(tmp_path / "shards"), split)
        assert len(data.training(1)) == count and {one["split"] for one in data.training(1)} == {split}
        data.close()
    with pytest.raises(DataError, match="has no split 'test', expected one of: train, validation"):
        RunData(str(tmp_path / "shards"), "test")


@pytest.mark.parametrize("place", [".", "..", "shards/", "./shards"])
def test_a_folder_has_its_own_name_however_it_is_written(tmp_path, monkeypatch, place):
    folder_of(tmp_path / "shards", 2)
    (tmp_path / "shards" / "inside").mkdir()
    monkeypatch.chdir({".": tmp_path / "shards", "..": tmp_path / "shards" / "inside"}.get(place, tmp_path))
    data = RunData(place)
    assert data.names == ["shards"] and len(data.training(1)) == 2
    data.close()


def test_a_recipe_is_read_as_it_is(folders):
    assert as_recipe(str(folders / "data.yaml"), "test") == read_recipe(folders / "data.yaml")


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ("someone/things", "hf://datasets/someone/things"),
        ("https://example.org/a/things", "https://example.org/a/things"),
    ],
)
def test_a_data_set_of_the_hub_and_an_address(spec, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (source,) = as_recipe(spec, "validation").sources
    assert (source.reader, source.path, source.name, source.split) == ("shards", path, "things", "validation")


def test_a_folder_comes_before_a_data_set_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "someone" / "things", 2)
    data = RunData("someone/things")
    assert len(data.training(1)) == 2
    data.close()


@pytest.mark.parametrize("spec", ["/nowhere/at/all", "missing.jsonl", "missing.yaml"])
def test_what_is_not_there_is_named(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=spec.rpartition("/")[2]):
        RunData(spec)


def test_a_folder_without_a_good_row_is_an_error(tmp_path):
    write_rows(tmp_path, [{"id": "a", "question": "Where?"}])
    with pytest.raises(DataError, match="no record"):
        RunData(str(tmp_path))


# Evaluation


def test_each_source_is_evaluated_by_itself_and_in_its_order(opened):
    found = opened.evaluation()
    assert {name: [one["id"] for one in part] for name, part in found.items()} == {
        "many": [f"row-{i:04d}" for i in range(11)],
        "mine": ["mine-0", "mine-1", "mine-2"],
    }
    assert {name: len(part) for name, part in opened.evaluation(samples=5).items()} == {"many": 5, "mine": 3}


def test_evaluation_asks_as_training_does(opened):
    """The recipe's mode of a source holds for both: a model that was not taught depth there is not asked for it."""
    trained = {one["id"]: one for one in opened.training(1)}
    for part in opened.evaluation().values():
        for one in part:
            assert one == trained[one["id"]]
    assert {one["messages"][1]["perception"] for one in opened.evaluation()["mine"]} == {"seg"}


# Data sets that a person loads


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_of_a_loaded_data_set_stay_as_they_are(tmp_path, streaming):
    """Decoded pictures would be written again, and no longer be those that the data was checked with."""
    records = [one for one in some_of_each() if one["depth_codes"] is None]
    write_shards(records, tmp_path / "shards")
    files = str(tmp_path / "shards" / "data" / "*.parquet")
    loaded = load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"), streaming=streaming
    )
    loaded = loaded if streaming else loaded.cast(FEATURES)
    for one, original in zip(as_records(loaded), records, strict=True):
        assert one["messages"] == original["messages"] and one["masks"] == original["masks"]
        for column in ("image", "depth"):
            found, due = one[column], original[column]
            assert found == due or found["bytes"] == due["bytes"]


def test_a_data_set_with_decoding_columns_makes_the_same_batch(tiny):
    records = [record("a", [box()], depth=slope()), record("b", codes=[1] * SPAN)]
    loaded = as_records(Dataset.from_list(records, features=FEATURES))
    collate = collator_of(*tiny)
    found, due = collate([loaded[0], loaded[1]]), collate(records)
    assert found["input_ids"].equal(due["input_ids"]) and found["pixel_values"].equal(due["pixel_values"])
    assert found["targets"]["depth_labels"].equal(due["targets"]["depth_labels"])


@pytest.mark.parametrize("other", [None, [{"id": "a"}]])
def test_what_is_no_data_set_is_left_alone(other):
    assert as_records(other) is other


# Lengths


LONG = "A long answer, of many words and of <|im_end|> and [SEG]. " * 20
WORDS = [user("Hi [SEG]"), assistant(LONG), user("So?"), assistant("So.")]
LENGTHS = {
    "by hand": some_of_each,
    "world": lambda: list(world()),
    "words": lambda: [record("w", picture=False, messages=WORDS)],
    "wide": lambda: [record("x", image=jpeg(400, 60)), record("y", image=jpeg(60, 400, orientation=6))],
}  # fmt: skip


@pytest.mark.parametrize("max_tiles", [None, 1, 4])
@pytest.mark.parametrize("kind", LENGTHS)
def test_lengths_are_those_of_the_batch(tiny, kind, max_tiles):
    collate = collator_of(*tiny, max_tiles=max_tiles)
    options = {} if max_tiles is None else {"max_patches": max_tiles}
    for one in LENGTHS[kind]():
        assert sequence_length(one, tiny[1], **options) == collate([one])["input_ids"].shape[1]


def test_the_longest_record_is_named_before_the_first_step(tiny):
    records = some_of_each()
    lengths = [sequence_length(one, tiny[1]) for one in records]
    longest = max(lengths)
    name = records[lengths.index(longest)]["id"]
    check_lengths(records, tiny[1], longest, None)
    with pytest.raises(
        DataError, match=rf"record '{name}' is {longest} tokens long, but `max_length` is {longest - 1}"
    ):
        check_lengths(records, tiny[1], longest - 1, None)
    with pytest.raises(DataError, match=f"raise `max_length` to {longest}, or lower `max_tiles`"):
        check_lengths(records, tiny[1], 5, None)


def test_as_many_records_are_measured_as_were_asked_for(tiny):
    records = [record("short", picture=False), record("long", [box()], depth=slope())]
    check_lengths(records, tiny[1], sequence_length(records[0], tiny[1]), None, most=1)


def test_fewer_tiles_make_a_record_fit(tiny):
    one = record("x", image=jpeg(400, 60))
    short = sequence_length(one, tiny[1], max_patches=1)
    check_lengths([one], tiny[1], short, 1)
    with pytest.raises(DataError):
        check_lengths([one], tiny[1], short, None)


def test_what_cannot_be_measured_is_left_to_the_training(tiny):
    """There it is skipped where that is asked for, or named."""
    bad = record("bad", image=b"nothing")
    codes = record("codes", codes=[0] * (SPAN + 1))
    check_lengths([bad, codes], tiny[1], 5, None)


def test_measuring_decodes_no_picture(tiny):
    """The header is enough: a picture that is cut behind it has its length."""
    whole = record("a", [box()])
    cut = record("a", [box()], image=whole["image"]["bytes"][:-200])
    assert sequence_length(cut, tiny[1]) == sequence_length(whole, tiny[1])
