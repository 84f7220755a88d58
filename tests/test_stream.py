import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from shard_samples import CODEBOOK, folder_of, sample, samples
from torch.utils.data import DataLoader

from perceptio.data.record import DataError
from perceptio.data.shards import write_shards
from perceptio.data.stream import StreamTally, stream
from perceptio.processing_perceptio import load_picture

ROWS = 103
ALL = [f"row-{number:04d}" for number in range(ROWS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("stream"), ROWS, rows_per_shard=40)


def ids(rows) -> list[str]:
    return [row["id"] for row in rows]


def loader(dataset, workers: int = 2) -> DataLoader:
    return DataLoader(dataset, batch_size=None, num_workers=workers)


def test_without_a_buffer_the_order_is_that_of_the_shards_and_rows_are_whole(folder):
    rows = list(stream(folder, shuffle_buffer=0))
    assert ids(rows) == ALL
    expected = sample(17)
    assert {**rows[17], "mask_preview": None} == expected


def test_the_order_depends_on_seed_and_epoch_alone(folder):
    first = ids(stream(folder, shuffle_buffer=20, seed=1))
    assert sorted(first) == ALL != first
    assert ids(stream(folder, shuffle_buffer=20, seed=1)) == first
    assert ids(stream(folder, shuffle_buffer=20, seed=2)) != first
    later = stream(folder, shuffle_buffer=20, seed=1)
    later.set_epoch(3)
    assert ids(later) == ids(stream(folder, shuffle_buffer=20, seed=1, epoch=3)) != first
    assert ids(later) == ids(later)


def test_shuffling_reaches_beyond_the_buffer(folder):
    """A buffer alone would leave the last shard at the end of every epoch."""
    where = [ids(stream(folder, shuffle_buffer=14, epoch=epoch)).index(ALL[-1]) for epoch in range(20)]
    assert min(where) < ROWS // 3 and len(set(where)) > 10


@pytest.mark.parametrize("buffer", [0, 10])
def test_two_ranks_of_two_workers_cover_every_record_once(folder, buffer):
    parts = [ids(loader(stream(folder, shuffle_buffer=buffer, epoch=2, rank=rank, world_size=2))) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == ALL
    assert abs(len(parts[0]) - len(parts[1])) <= 1


@pytest.mark.parametrize("world_size", [3, 7, ROWS])
def test_parts_differ_by_one_record_at_most(folder, world_size):
    parts = [ids(stream(folder, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert Counter(sum(parts, [])) == Counter(ALL)
    assert {len(part) for part in parts} <= {ROWS // world_size, ROWS // world_size + 1}


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_libraries_own_ways_of_splitting_lose_nothing(folder, world_size):
    """What accelerate and `datasets` do to a data set that comes whole."""
    from datasets.distributed import split_dataset_by_node

    whole = stream(folder, shuffle_buffer=10)
    by_node = [ids(split_dataset_by_node(whole, rank, world_size)) for rank in range(world_size)]
    sharded = [ids(whole.shard(world_size, rank)) for rank in range(world_size)]
    assert sorted(sum(by_node, [])) == sorted(sum(sharded, [])) == ALL


@pytest.mark.parametrize("buffer", [0, 10, 20, 500])
def test_resuming_in_the_middle_goes_on_exactly(folder, buffer):
    """`datasets`' own shuffle buffer loses what it holds when it resumes."""
    options = {"shuffle_buffer": buffer, "seed": 5, "epoch": 1, "rank": 1, "world_size": 2}
    full = ids(stream(folder, **options))
    for taken in (0, 1, 6, 7, 13, 14, 20, 21, 50, len(full)):
        before = stream(folder, **options)
        rows = iter(before)
        head = [next(rows)["id"] for _ in range(taken)]
        after = stream(folder, **options)
        after.load_state_dict(before.state_dict())
        assert head + ids(after) == full, taken


def test_resuming_reads_only_the_block_it_stopped_in(folder, tmp_path):
    """With the files of what has been given removed, the rest still comes."""
    shutil.copytree(folder, tmp_path / "set")
    before = stream(tmp_path / "set", shuffle_buffer=0)
    rows = iter(before)
    head = [next(rows)["id"] for _ in range(45)]
    after = stream(tmp_path / "set", shuffle_buffer=0)
    after.load_state_dict(before.state_dict())
    (tmp_path / "set/data/train-00000-of-00003.parquet").unlink()
    assert head + ids(after) == ALL


@pytest.mark.parametrize("change", [{"seed": 6}, {"shuffle_buffer": 11}, {"world_size": 3}, {"epoch": 2}])
def test_a_place_in_another_stream_is_refused(folder, change):
    """Resuming with it would repeat some records and leave others out."""
    options = {"shuffle_buffer": 10, "seed": 5, "epoch": 1, "world_size": 2}
    before = stream(folder, **options)
    next(iter(before))
    state = before.state_dict()
    after = stream(folder, **{**options, **change})
    after.load_state_dict({**state, "epoch": after.epoch})
    with pytest.raises(DataError, match="belongs to another stream"):
        next(iter(after))


def test_several_folders_are_one_stream(folder, tmp_path):
    write_shards((sample(number, id=f"other-{number}") for number in range(10)), tmp_path)
    found = ids(stream([folder, tmp_path], shuffle_buffer=30, rank=0, world_size=1))
    assert sorted(found) == sorted(ALL + [f"other-{number}" for number in range(10)])
    assert any(name.startswith("other") for name in found[:80]) and found[-10:] != ids(stream(tmp_path))


def test_codebooks_are_compared(folder, tmp_path):
    write_shards(samples(3, depth_codebook="feedfeedfeedfeed"), tmp_path)
    with pytest.raises(DataError, match=f"feedfeedfeedfeed, expected {CODEBOOK}"):
        stream([folder, tmp_path])
    with pytest.raises(DataError, match=f"{CODEBOOK}, expected feedfeedfeedfeed"):
        stream(folder, codebook="feedfeedfeedfeed")


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_records_for_the_processes_is_an_error(tmp_path, count):
    write_shards(samples(count), tmp_path)
    with pytest.raises(DataError, match=f"{count} records.*3 processes.*fewer processes"):
        stream(tmp_path, world_size=3)
    if count:
        assert len(ids(stream(tmp_path))) == count
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # more workers than cores
            assert len(ids(loader(stream(tmp_path), workers=3))) == count


@pytest.mark.parametrize(
    "options, text",
    [({"on_error": "ignore"}, "'ignore'.*stop, skip"), ({"rank": 2, "world_size": 2}, "expected 0 to 1")],
)
def test_wrong_options(folder, options, text):
    with pytest.raises(ValueError, match=text):
        stream(folder, **options)


def test_a_folder_without_shards_or_split_is_named(folder, tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path} holds no data/train"):
        stream(tmp_path)
    with pytest.raises(DataError, match="no split 'test'.*train"):
        stream(folder, split="test")


def test_without_a_manifest_the_files_count(folder, tmp_path):
    shutil.copytree(folder / "data", tmp_path / "data")
    assert ids(stream(tmp_path, shuffle_buffer=0)) == ALL


def break_group(path: Path) -> None:
    """Flip one bit in a picture of the second row group."""
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(1).column(1)
        start, size = column.data_page_offset, column.total_compressed_size
    data = bytearray(path.read_bytes())
    data[start + size // 2] ^= 1
    path.write_bytes(data)


def test_a_row_group_that_cannot_be_read_stops_or_is_counted(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "set")
    break_group(tmp_path / "set/data/train-00001-of-00003.parquet")
    with pytest.raises(DataError, match="train-00001-of-00003.parquet.*row group 1 cannot be read"):
        ids(stream(tmp_path / "set"))
    tally = StreamTally()
    found = ids(stream(tmp_path / "set", shuffle_buffer=20, on_error="skip", tally=tally))
    assert sorted(found) == [name for name in ALL if name not in ALL[47:54]]
    assert tally.total().to_dict()["dropped"] == {"unreadable row group": 7} and tally.total().read == ROWS
    assert "train-00001-of-00003.parquet" in caplog.text


def test_skipping_keeps_the_order_of_the_others(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    break_group(tmp_path / "set/data/train-00001-of-00003.parquet")
    whole = ids(stream(folder, shuffle_buffer=20))
    lost = set(ALL[47:54])
    assert ids(stream(tmp_path / "set", shuffle_buffer=20, on_error="skip")) == [n for n in whole if n not in lost]


def with_damaged(path: Path) -> Path:
    rows = list(samples(20))
    for number in (3, 11):
        data = rows[number]["image"]["bytes"]
        rows[number]["image"]["bytes"] = data[: len(data) // 2]
    write_shards(rows, path, rows_per_group=5)
    return path


def open_picture(row: dict) -> dict:
    return {"id": row["id"], "size": load_picture(row["image"]["bytes"]).size}


def test_a_damaged_picture_stops_or_is_counted_across_workers(tmp_path):
    folder = with_damaged(tmp_path)
    with pytest.raises(DataError, match="'row-00(03|11)'.*cannot be used"):
        list(stream(folder, transform=open_picture))
    tally = StreamTally()
    rows = list(loader(stream(folder, transform=open_picture, on_error="skip", tally=tally)))
    assert len(rows) == 18 and all(tuple(row["size"]) == (64, 48) for row in rows)
    assert tally.total().to_dict()["dropped"] == {"refused record": 2} and tally.total().kept == 18


def test_a_mistake_in_the_code_of_a_transform_is_never_skipped(folder):
    def wrong(row):
        return row["colour"]

    with pytest.raises(KeyError, match="colour"):
        list(stream(folder, transform=wrong, on_error="skip"))


class Flaky(LocalFileSystem):
    """Raises on the `failures` first openings of each file, as a network does."""

    protocol = "flaky"
    failures = 0
    opened: Counter = Counter()

    def _open(self, path, *arguments, **options):
        self.opened[path] += 1
        if self.opened[path] <= self.failures:
            raise OSError(f"connection to {path} lost")
        return super()._open(path, *arguments, **options)


@pytest.fixture
def flaky():
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.opened = Counter()
    yield Flaky
    Flaky.failures = 0


def test_a_source_that_throws_once_is_asked_again(folder, flaky):
    flaky.failures = 1
    assert ids(stream(f"flaky://{folder}", shuffle_buffer=0)) == ALL
    assert max(flaky.opened.values()) > 1


def test_a_source_that_keeps_throwing_is_named(folder, flaky):
    flaky.failures = 1000
    with pytest.raises((DataError, OSError), match="connection to .* lost"):
        stream(f"flaky://{folder}")


def test_a_file_that_ends_early_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    path = tmp_path / "set/data/train-00002-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match="train-00002-of-00003.parquet.*footer cannot be read"):
        stream(tmp_path / "set")
    shutil.copy(folder / "data/train-00000-of-00003.parquet", path)
    with pytest.raises(DataError, match="40 rows instead of the manifest's 23"):
        stream(tmp_path / "set")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data():
    """Fresh processes that stream 1 and 8 times as many records; about 20 s."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
    from bench_stream import measure

    small, large = measure(200), measure(1600)
    assert large["peak_bytes"] < 1.1 * small["peak_bytes"]
