"""Some of the records of a data set, by their ids, as a data set of their own."""

import pytest
from shard_samples import sample

from perceptio.data.pick import main
from perceptio.data.shards import read_shards, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("picked") / "shards"
    write_shards((sample(number, id=f"scene-{number}{'-points' * (number % 3 == 0)}") for number in range(8)), folder)
    return folder


def test_what_matches_is_taken_as_it_is_and_in_its_order(shards, tmp_path, capsys):
    assert main([str(shards), str(tmp_path / "things"), "--without", "[-]points$"]) == 0
    told = capsys.readouterr().out
    assert "wrote 5 records" in told and "5 of 8 kept; dropped: 3 its id does not match" in told
    assert main([str(shards), str(tmp_path / "late"), "--ids=-[4-7]", "--without=-points"]) == 0
    rows = {row["id"]: row for row in read_shards(shards)}
    for name, ids in (("things", ["1", "2", "4", "5", "7"]), ("late", ["4", "5", "7"])):
        assert list(read_shards(tmp_path / name)) == [rows[f"scene-{number}"] for number in ids]


def test_a_wrong_expression_an_absent_folder_and_one_that_is_there_are_one_line(shards, tmp_path, capsys):
    cases = (
        ([shards, tmp_path / "out", "--ids", "(scene"], "`ids` is '(scene', expected a regular expression: "),
        ([shards, tmp_path / "out", "--without", "*"], "`without` is '*', expected a regular expression: "),
        ([tmp_path / "absent", tmp_path / "out"], "absent has no manifest.json"),
        ([shards, shards], "already has 8 rows of the split 'train'"),
    )
    for words, expected in cases:
        assert main([str(word) for word in words]) == 2
        told = capsys.readouterr().err
        assert expected in told and told.startswith("perceptio: ") and told.count("\n") == 1
    assert len(list(read_shards(shards))) == 8
