"""The maps that a depth tokenizer is trained on: where they come from, and that nothing of them is lost on the way."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from shard_samples import folder_of

from perceptio.data.depths import DepthError, decode_depth, encode_depth
from perceptio.data.shards import read_shards
from perceptio.vqvae.maps import HELD_OUT, NOTE, MapSet, main, pack, shrink, split_of, unpack, write_maps
from perceptio.world.maps import scene_map, world_maps
from perceptio.world.records import scene_records


def ramp(number: int, height: int = 30, width: int = 40) -> np.ndarray:
    values = np.linspace(0, 1, height * width, dtype=np.float32).reshape(height, width)
    return np.roll(values, number, axis=1)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    for number in range(60):
        path = folder / "deep" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_depth(ramp(number)))
    return folder


def test_sixteen_bits_survive_packing():
    values = (torch.arange(65535).double() / 65534).float().view(1, 255, 257)
    assert torch.equal(unpack(pack(values)), values)


def test_the_map_of_a_scene_is_the_one_in_its_record():
    for index in (0, 3):
        stored = decode_depth(scene_records(index)[0]["depth"]["bytes"])
        assert np.abs(scene_map(index, side=224) - stored).max() < 1.6e-5


def test_maps_of_the_world_do_not_depend_on_workers_or_the_first_index():
    whole = list(world_maps(40, side=40, workers=2))
    assert all(np.array_equal(a, b) for a, b in zip(whole[30:], world_maps(10, side=40, first=30), strict=True))
    other = next(world_maps(1, split="test", side=40))
    assert not np.array_equal(whole[0], other)
    with pytest.raises(ValueError, match="`split` is 'tset', expected one of train"):
        next(world_maps(1, split="tset"))


def test_maps_of_a_folder_of_pictures(pictures, tmp_path):
    facts = write_maps(tmp_path / "maps", pictures, split="all", side=12)
    maps = MapSet(tmp_path / "maps")
    assert len(maps) == 60 and facts["source"] == "pictures" and maps.side == 12
    expected = torch.stack([shrink(ramp(number), 12) for number in (59, 0, 7)])
    assert (maps[[59, 0, 7]] - expected).abs().max() < 2e-5


def test_a_folder_is_split_by_name_and_stays_so_when_it_grows(pictures, tmp_path):
    sizes = {}
    for split in ("train", "validation"):
        write_maps(tmp_path / split, pictures, split=split, side=12)
        sizes[split] = len(MapSet(tmp_path / split))
    assert sum(sizes.values()) == 60 and 1 <= sizes["validation"] <= 60 * 4 / HELD_OUT
    names = [f"{number}.png" for number in range(4000)]
    share = np.mean([split_of(name) == "validation" for name in names])
    assert abs(share - 1 / HELD_OUT) < 0.02


def test_maps_of_shards(tmp_path):
    folder = folder_of(tmp_path / "shards", 6)
    write_maps(tmp_path / "maps", folder, split="train", side=12)
    rows = [row for row in read_shards(folder) if row["depth"] is not None]
    maps = MapSet(tmp_path / "maps")
    assert len(maps) == len(rows) > 0
    assert (maps[[0]][0] - shrink(decode_depth(rows[0]["depth"]["bytes"]), 12)).abs().max() < 2e-5


def test_holes_are_filled_and_maps_of_holes_are_left_out_and_counted(tmp_path):
    folder = tmp_path / "holed"
    folder.mkdir()
    few, many = ramp(0), ramp(1)
    few[:2, :5], many[:20] = np.nan, np.nan
    for name, values in {"few": few, "many": many}.items():
        (folder / f"{name}.png").write_bytes(encode_depth(values))
    facts = write_maps(tmp_path / "maps", folder, split="all", side=12)
    assert len(MapSet(tmp_path / "maps")) == 1
    assert list(facts["skipped"].values()) == [1] and "67% of the map has no value" in next(iter(facts["skipped"]))


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(pictures, tmp_path, monkeypatch):
    """Parts of 2,000 are for real sets; of 5 here, so that there are several."""
    code = (
        "import sys, time; from perceptio.vqvae import maps; maps.PART = 5; old = maps._write_part\n"
        "maps._write_part = lambda *a: (old(*a), time.sleep(0.4))\n"
        f"maps.write_maps(sys.argv[1], {str(pictures)!r}, split='all', side=12)"
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    monkeypatch.setattr("perceptio.vqvae.maps.PART", 5)
    write_maps(whole, pictures, split="all", side=12)
    process = subprocess.Popen([sys.executable, "-c", code, str(broken)])
    while len(list(broken.glob("maps-*.safetensors")) if broken.exists() else []) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / NOTE).exists()
    with pytest.raises(FileNotFoundError, match="has no maps.json"):
        MapSet(broken)
    before = {path.name: path.stat().st_mtime_ns for path in broken.glob("maps-*.safetensors")}
    write_maps(broken, pictures, split="all", side=12)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == {
        path.name: path.read_bytes() for path in broken.iterdir()
    }
    assert all((broken / name).stat().st_mtime_ns == stamp for name, stamp in before.items())


def test_other_maps_in_the_folder_are_refused(pictures, tmp_path):
    write_maps(tmp_path / "maps", pictures, split="all", side=12)
    stamp = os.stat(tmp_path / "maps" / "maps-00000.safetensors").st_mtime_ns
    write_maps(tmp_path / "maps", pictures, split="all", side=12)
    assert os.stat(tmp_path / "maps" / "maps-00000.safetensors").st_mtime_ns == stamp
    with pytest.raises(DepthError, match=r"holds other maps \(side 12\), expected 24"):
        write_maps(tmp_path / "maps", pictures, split="all", side=24)


@pytest.mark.parametrize("damage", ["cut", "missing", "other shape"])
def test_a_damaged_part_is_named(pictures, tmp_path, damage):
    write_maps(tmp_path / "maps", pictures, split="all", side=12)
    part, note = tmp_path / "maps" / "maps-00000.safetensors", tmp_path / "maps" / NOTE
    if damage == "cut":
        part.write_bytes(part.read_bytes()[:-100])
    elif damage == "missing":
        part.unlink()
    else:
        facts = json.loads(note.read_text())
        facts["parts"][0][1] = 61
        note.write_text(json.dumps(facts))
    with pytest.raises(DepthError, match="maps-00000.safetensors .*write the maps again"):
        MapSet(tmp_path / "maps")


def test_wrong_input_is_one_line_with_exit_code_two(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, message in {
        (str(tmp_path / "a"), "--source", "world"): "`count` is None, but the world has no end",
        (str(tmp_path / "b"), "--source", str(tmp_path / "empty")): "neither manifest.json nor PNG files",
        (str(tmp_path / "c"), "--count", "3", "--split", "tset"): "`split` is 'tset'",
    }.items():
        assert main(list(arguments)) == 2
        assert message in capsys.readouterr().err
