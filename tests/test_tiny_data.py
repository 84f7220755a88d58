"""The parts that perceptio-tiny learns from: each is made whole, by seed and number alone, by several processes."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from perceptio.data.recipe import mix, parse_recipe
from perceptio.data.record import GIVEN
from perceptio.data.shards import read_shards
from perceptio.hub.tiny_data import DEPTH, KINDS, main, make_part, make_parts, missing_parts
from perceptio.hub.tiny_data import GIVEN as GIVEN_KINDS

FEW = {kind: (count // 50, options) for kind, (count, options) in KINDS.items()}  # 8, 3 and 4 scenes
NAMES = {*KINDS, "things", *GIVEN_KINDS}


@pytest.fixture(scope="module")
def depth(request):
    return str(request.config.rootpath / DEPTH)


@pytest.fixture(scope="module")
def parts(tmp_path_factory, depth):
    folder = tmp_path_factory.mktemp("tiny") / "parts"
    make_parts(folder, 2, workers=2, depth=depth, kinds=FEW)
    return folder


def test_each_part_holds_every_kind_and_none_is_another(parts):
    assert missing_parts(parts, 3) == [2] and {path.name for path in parts.iterdir()} == {"000", "001"}
    recipe = {"root": str(parts.parent), "sources": [
        {"reader": "shards", "path": f"parts/*/{kind}", "name": kind} for kind in sorted(NAMES - {"things"})
    ]}  # fmt: skip
    ids = [record["id"] for record in mix(parse_recipe(recipe))]
    assert len(set(ids)) == len(ids) > 2 * (8 + 3 + 4)
    for part in ("000", "001"):
        assert {path.name for path in (parts / part).iterdir()} == NAMES


def test_records_have_codes_and_what_is_given_is_no_own(parts):
    own = {kind: list(read_shards(parts / "000" / kind)) for kind in NAMES}
    codebooks = {record["depth_codebook"] for rows in own.values() for record in rows}
    assert len(codebooks) == 1 and None not in codebooks
    with_points = [record for record in own["scenes"] if record["id"].endswith("-points")]
    assert own["things"] == [record for record in own["scenes"] if record not in with_points]
    assert len(own["things"]) == 8 and with_points
    for kind, (source, _) in GIVEN_KINDS.items():
        codes = {record["id"]: record["depth_codes"] for record in own[source]}
        assert own[kind] and all(GIVEN in record["extra"] for record in own[kind])
        for record in own[kind]:
            before = re.sub(r"-given(-2)?$", "", record["id"])
            assert before in codes and record["depth_codes"] != codes[before]


def test_a_part_is_the_same_whoever_makes_it(parts, tmp_path, depth):
    make_part(tmp_path, 1, depth, FEW)
    for kind in NAMES:
        assert list(read_shards(tmp_path / "001" / kind)) == list(read_shards(parts / "001" / kind))


def test_what_is_there_is_not_made_again_and_a_part_that_fails_is_not_there(parts, tmp_path, depth):
    before = {path: path.stat().st_mtime_ns for path in parts.rglob("*.parquet")}
    make_parts(parts, 2, depth=depth, kinds=FEW)
    assert missing_parts(parts, 3, first=1) == [2, 3]
    make_parts(parts, 1, depth=depth, kinds=FEW, first=1)
    assert {path: path.stat().st_mtime_ns for path in parts.rglob("*.parquet")} == before
    with pytest.raises(TypeError):
        make_part(tmp_path, 0, depth, {**FEW, "more": None})
    assert missing_parts(tmp_path, 1) == [0] and (tmp_path / ".000.incomplete" / "looks").is_dir()
    make_part(tmp_path, 0, depth, FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["000"]


def test_no_process_stays_when_it_is_stopped(tmp_path, depth):
    words = [sys.executable, "-m", "perceptio.hub.tiny_data", str(tmp_path), "--parts", "2", "--depth", depth]
    started = subprocess.Popen([*words, "--workers", "2"], start_new_session=True, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while len(list(tmp_path.glob(".*.incomplete"))) < 2:
        assert started.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    assert started.wait(60) == -signal.SIGTERM and missing_parts(tmp_path, 2) == [0, 1]
    with pytest.raises(ProcessLookupError):  # of the whole group
        while time.monotonic() < end:
            os.killpg(started.pid, 0)
            time.sleep(0.1)


def test_wrong_words_are_one_line(tmp_path, capsys):
    for words, expected in (
        (["--parts", "0"], "`parts` is 0, expected at least 1"),
        (["--first", "-1"], "`first` is -1, expected 0 or more"),
        (["--workers", "0"], "`workers` is 0, expected at least 1"),
        (["--parts", "1", "--workers", "1", "--depth", str(tmp_path / "none")], "none has no config.json"),
    ):
        assert main([str(tmp_path / "parts"), *words]) == 2
        told = capsys.readouterr().err
        assert expected in told and not told.startswith("Traceback")
