import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from perceptio.hub.weights import Recipe, SafetensorsFolder, Shaped, check_plan, parse_size, shape_of, write_shards


@pytest.mark.parametrize(
    ("text", "expected"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("300", 300), (7, 7)]
)
def test_sizes_are_read(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["big", "-1GB", "0", "5XB", 0])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="max_shard_size"):
        parse_size(text)


def test_shards_hold_every_tensor_within_the_limit_and_the_index_says_where(tmp_path):
    tensors = {f"layer.{i}": torch.full((10,), float(i)) for i in range(7)}
    sizes, asked = dict.fromkeys(tensors, 40), []
    names = write_shards(tmp_path, sizes, tensors.__getitem__, max_shard_size=100, progress=asked.append)
    assert names == [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 280 and asked == list(tensors)
    for key, name in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / name)[key], tensors[key])
    assert dict(SafetensorsFolder(tmp_path)).keys() == tensors.keys()


def test_one_shard_needs_no_index(tmp_path):
    assert write_shards(tmp_path, {"a": 4}, lambda key: torch.ones(1)) == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path):
    names = write_shards(tmp_path, {"a": 400, "b": 4}, lambda key: torch.ones(100 if key == "a" else 1), 100)
    assert [list(load_file(tmp_path / name)) for name in names] == [["a"], ["b"]]


def test_parts_of_one_fused_tensor_can_be_written_together(tmp_path):
    """safetensors refuses tensors that share memory, and a part alone would keep the whole in memory."""
    fused = torch.arange(6.0)
    write_shards(tmp_path, {"0": 8, "1": 8, "2": 8}, lambda key: fused.chunk(3)[int(key)])
    assert load_file(tmp_path / "model.safetensors")["2"].tolist() == [4.0, 5.0]


def test_folder_is_read_lazily_and_tells_shapes(tmp_path):
    save_file({"a": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    assert shape_of(folder, "a") == (2, 3) == shape_of({"a": torch.ones(2, 3)}, "a")
    assert torch.equal(folder["a"], torch.ones(2, 3)) and len(folder) == 1


def test_pickled_weights_are_not_read(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"\.bin"):
        SafetensorsFolder(tmp_path)


def test_shaped_tensors_take_no_memory():
    found = Shaped({"a": (10**6, 10**6)})["a"]
    assert found.is_meta and found.shape == (10**6, 10**6)


def test_every_key_must_be_accounted_for():
    plan = {"x": Recipe(("a", "b"), lambda a, b: a + b), "y": Recipe(("c",))}
    check_plan("toy", plan, ["a", "b", "c", "old"], ["x", "y"], ignored=["old"])
    assert plan["x"]({"a": 1, "b": 2}) == 3 and plan["y"]({"c": 5}) == 5
    with pytest.raises(ValueError, match="missing from the source: b"):
        check_plan("toy", plan, ["a", "c"], ["x", "y"], [])
    with pytest.raises(ValueError, match="left over in the source: c"):
        check_plan("toy", plan, ["a", "b", "c"], ["x"], [])
    with pytest.raises(ValueError, match="made by nothing: z"):
        check_plan("toy", plan, ["a", "b", "c"], ["x", "y", "z"], [])
    many = [f"k{i:02}" for i in range(20)]
    with pytest.raises(ValueError, match="20 left over.*k07 and 12 more"):
        check_plan("toy", {}, many, [], [])
