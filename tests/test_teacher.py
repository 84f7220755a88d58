"""Depth teachers: one picture or many, one line where a name is no teacher, and what a batch that fails becomes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from teacher_samples import write_teacher

from perceptio.vqvae.teacher import DepthTeacher, ask, licence_of, teacher_from


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def test_a_batch_of_mixed_sizes_is_as_one_by_one_and_in_order(folder):
    teacher = DepthTeacher(str(folder))
    asked = pictures((40, 30), (30, 40), (40, 30), (17, 17), (30, 40))
    for together, picture in zip(teacher(asked), asked, strict=True):
        alone = teacher([picture])[0]
        assert together.dtype == np.float32 and together.ndim == 2 and np.ptp(alone) > 0
        assert np.abs(together - alone).max() < 1e-5 * np.abs(alone).max()


def test_no_picture_is_no_question(folder):
    assert ask(DepthTeacher(str(folder)), []) == []


def test_a_teacher_that_means_metres_says_so(folder, tmp_path):
    assert DepthTeacher(str(folder)).kind == "inverse"
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth_estimation_type": "metric", "max_depth": 20}))
    metric = DepthTeacher(str(tmp_path))
    assert metric.kind == "metres" and 0 < metric(pictures((40, 30)))[0].min() <= 20


def broken(folder, tmp_path, name: str) -> str:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    if name == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-500])
    elif name == "no weights":
        weights.unlink()
    elif name == "no depth model":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    elif name == "other sizes":
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "fusion_hidden_size": 12}))
    return str(tmp_path / "nowhere") if name == "no folder" else str(tmp_path)


@pytest.mark.parametrize("name", ["no folder", "no weights", "cut weights", "no depth model", "other sizes"])
def test_what_is_no_teacher_is_named(folder, tmp_path, name):
    source = broken(folder, tmp_path, name)
    with pytest.raises(ValueError, match="cannot be loaded .* expected small, base, large, or the folder") as error:
        teacher_from(source)
    assert repr(source) in str(error.value) and "\n" not in str(error.value)


def test_less_exact_numbers_are_for_cuda(folder):
    with pytest.raises(ValueError, match="`dtype` is torch.bfloat16 on cpu, expected a CUDA device"):
        DepthTeacher(str(folder), "cpu", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype, near", [(None, 1e-3), (torch.bfloat16, 0.05)])
def test_on_cuda_a_teacher_sees_the_same(folder, dtype, near):
    asked = pictures((40, 30), (30, 40))
    there = DepthTeacher(str(folder), "cuda", dtype)(asked)
    for found, expected in zip(there, DepthTeacher(str(folder))(asked), strict=True):
        assert found.dtype == np.float32 and np.abs(found - expected).max() < near * np.abs(expected).max()


def test_a_picture_that_never_fits_is_the_only_one_without_a_map():
    def hungry(asked):
        if sum(picture.width * picture.height for picture in asked) > 3000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [np.ones((2, 2))] * len(asked)

    found = ask(hungry, pictures((40, 30), (40, 30), (100, 100), (40, 30), (40, 30)))
    assert [isinstance(item, torch.OutOfMemoryError) for item in found] == [False, False, True, False, False]


def test_only_the_small_one_may_be_used_for_anything():
    licences = {name: licence_of(name) for name in ("small", "base", "large", "none", "mine/own")}
    known = {"small": "Apache-2.0", "base": "CC-BY-NC-4.0", "large": "CC-BY-NC-4.0"}
    assert licences == {**known, "none": None, "mine/own": None}
