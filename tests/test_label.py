import json
import pickle
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from shard_samples import HEIGHT, WIDTH, picture_bytes, ramp, sample, tiny_vqvae

from perceptio.data.depths import DepthError, decode_depth, encode_depth, normalise
from perceptio.data.label import (
    LONGEST_SIDE,
    PROBLEM,
    Labeller,
    encode_codes,
    fill_holes,
    finish_depth,
    label_batch,
    load_vqvae,
)
from perceptio.data.record import COLUMNS, assistant, user
from perceptio.data.validate import check_record
from perceptio.modeling_perceptio import PerceptioForConditionalGeneration
from perceptio.vqvae.teacher import DepthTeacher, teacher_from


@pytest.fixture(scope="module")
def vqvae():
    return tiny_vqvae()


def columns(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in COLUMNS}


def rows_of(batch: dict[str, list]) -> list[dict]:
    return [{name: batch[name][index] for name in COLUMNS} for index in range(len(batch["id"]))]


def bare(number: int, **changes) -> dict:
    return sample(number, codes=False, mapped=False, **changes)


def brightness(pictures: list[Image.Image]) -> list[np.ndarray]:
    """A teacher: bright is near."""
    return [np.asarray(picture.convert("L"), np.float32) * 3 + 7 for picture in pictures]


def test_a_row_without_depth_gets_the_teachers_and_its_codes(vqvae):
    done = label_batch(columns([bare(0), bare(1)]), brightness, vqvae)
    assert done[PROBLEM] == [None, None]
    for number, row in enumerate(rows_of(done)):
        stored = decode_depth(row["depth"]["bytes"])
        picture = Image.open(BytesIO(picture_bytes(number)))
        assert np.abs(stored - normalise(brightness([picture])[0])).max() < 1e-4
        assert row["depth_codes"] == vqvae.encode(torch.from_numpy(stored)[None]).flatten().tolist()
        assert row["depth_codebook"] == vqvae.codebook_hash()
        assert check_record(row, num_codes=8, span_length=9, codebook=vqvae.codebook_hash()) == []


def test_a_row_with_depth_keeps_it(vqvae):
    def never(pictures):
        raise AssertionError("the teacher was asked")

    before = sample(0)
    after = rows_of(label_batch(columns([before]), never, vqvae))[0]
    assert after["depth"] == before["depth"]
    assert after["depth_codes"] == encode_codes(ramp(), vqvae) and after["depth_codebook"] == vqvae.codebook_hash()


def test_codes_of_this_codebook_need_no_map_and_those_of_another_are_replaced(vqvae):
    own = sample(0, mapped=False, depth_codebook=vqvae.codebook_hash())
    other = sample(1, mapped=False)
    done = rows_of(label_batch(columns([own, other]), brightness, vqvae))
    assert done[0]["depth_codes"] == own["depth_codes"] and done[0]["depth"] is None
    assert done[1]["depth"] is not None and done[1]["depth_codebook"] == vqvae.codebook_hash()


def test_rows_that_fail_come_back_with_a_reason_in_their_place(vqvae):
    nan = np.full((HEIGHT, WIDTH), np.nan, np.float32)
    half = np.where(np.arange(WIDTH) < WIDTH // 2, np.nan, ramp())
    rows = [
        bare(0),
        bare(1, image=picture_bytes(1)[:200]),
        bare(2, depth=encode_depth(nan)),
        bare(3, depth=b"no PNG"),
        bare(4, depth=encode_depth(half)),
        bare(5, image=None, masks=[], messages=[user("2 + 2?"), assistant("4.")]),
        bare(6),
    ]
    rows[1]["id"] = "damaged"
    before = json.dumps([row["id"] for row in rows])
    done = label_batch(columns(rows), brightness, vqvae)
    reasons = [problem and problem.partition(":")[0] for problem in done[PROBLEM]]
    unusable = "unusable depth"
    assert reasons == [None, "damaged picture", unusable, unusable, unusable, None, None]
    assert json.dumps(done["id"]) == before
    assert done["depth_codes"][5] is None and done["depth_codes"][6] is not None


def test_without_a_teacher_depth_is_needed_only_where_an_answer_asks_for_it(vqvae):
    quiet = bare(1, messages=[user("Where?"), assistant("There.", "seg")])
    done = label_batch(columns([bare(0), quiet, sample(2)]), None, vqvae)
    assert done[PROBLEM][0].startswith("no depth: ") and done[PROBLEM][1:] == [None, None]
    assert done["depth"][1] is None and done["depth_codes"][1] is None


def picky(pictures):
    """A teacher that fails on a whole batch when one picture is too small for it, and gives NaN for another size."""
    if any(picture.width < 20 for picture in pictures):
        raise RuntimeError("kernel larger than the picture")
    return [np.full((4, 4), np.nan if picture.width == 40 else 0.5) + np.arange(4) for picture in pictures]


def test_a_teacher_that_fails_on_one_picture_labels_the_others(vqvae):
    rows = [bare(0, masks=[], image=picture_bytes(0, size)) for size in ((64, 48), (10, 8), (40, 30), (64, 48))]
    done = label_batch(columns(rows), picky, vqvae)
    assert [problem is None for problem in done[PROBLEM]] == [True, False, False, True]
    assert done[PROBLEM][1].startswith("teacher failed: kernel larger") and "100.0% of the map" in done[PROBLEM][2]


def test_a_teacher_that_loses_a_picture_is_a_mistake_and_no_bad_record(vqvae):
    with pytest.raises(TypeError, match="1 maps for 2 pictures"):
        label_batch(columns([bare(0), bare(1)]), lambda pictures: brightness(pictures)[:1], vqvae)


def test_depth_lies_as_the_picture_is_shown(vqvae):
    """A camera's picture is stored on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = BytesIO()
    Image.open(BytesIO(picture_bytes(0))).save(file, "JPEG", exif=exif)
    done = label_batch(columns([bare(0, image=file.getvalue(), masks=[])]), brightness, vqvae)
    assert decode_depth(done["depth"][0]["bytes"]).shape == (WIDTH, HEIGHT)


def test_a_map_takes_the_shape_of_the_picture_or_a_smaller_one():
    values = np.tile(np.linspace(3, 9, 56), (28, 1))
    assert finish_depth(values, (64, 48)).shape == (48, 64)
    assert finish_depth(values, (4000, 3000)).shape == (LONGEST_SIDE * 3 // 4, LONGEST_SIDE)
    assert finish_depth(values, (5000, 1)).shape == (1, LONGEST_SIDE)
    near_right, near_left = finish_depth(values, (64, 48)), finish_depth(values, (64, 48), "metres")
    assert near_right[0, 0] == 0 and near_right[0, -1] == 1 and near_left[0, 0] == 1 and near_left[0, -1] == 0
    with pytest.raises(DepthError, match="shape"):
        finish_depth(values[None], (64, 48))


def test_holes_are_filled_from_their_surroundings():
    depth = ramp(61, 37)
    holed = depth.copy()
    holed[10:16, 20:28] = np.nan
    holed[-1, -1] = np.nan
    filled = fill_holes(holed)
    known = ~np.isnan(holed)
    assert (filled[known] == depth[known]).all() and np.abs(filled - depth).max() < 0.15
    assert fill_holes(depth) is depth
    holed[:, :10] = np.nan
    with pytest.raises(DepthError, match="19% of the map has no value, expected at most 10%"):
        fill_holes(holed)


def test_small_holes_stay_in_the_stored_map(vqvae):
    holed = ramp().copy()
    holed[3, 3] = np.nan
    before = bare(0, depth=encode_depth(holed))
    done = label_batch(columns([before]), None, vqvae)
    assert done[PROBLEM] == [None] and done["depth"][0] == before["depth"] and len(done["depth_codes"][0]) == 9


def test_the_depth_tokenizer_loads_from_its_own_folder_and_from_a_whole_perceptio(tmp_path, tiny_folder, vqvae):
    vqvae.save_pretrained(tmp_path)
    assert load_vqvae(tmp_path).codebook_hash() == vqvae.codebook_hash()
    whole = PerceptioForConditionalGeneration.from_pretrained(tiny_folder())
    part = load_vqvae(tiny_folder())
    depth = torch.from_numpy(ramp(24, 24))[None]
    assert not part.training and torch.equal(part.encode(depth), whole.depth_model.encode(depth))
    assert torch.equal(part(depth), whole.depth_model(depth))


def test_a_folder_with_no_depth_tokenizer_is_named(tmp_path, vqvae):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_vqvae(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert', expected a depth tokenizer"):
        load_vqvae(tmp_path)
    vqvae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "codebook_hash": "feedfeedfeedfeed"}))
    with pytest.raises(ValueError, match=f"{vqvae.codebook_hash()}.*feedfeedfeedfeed"):
        load_vqvae(tmp_path)


@pytest.fixture(scope="module")
def depth_anything(tmp_path_factory):
    """Depth Anything's architecture with a few random weights."""
    from transformers import (
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
        DPTImageProcessorPil,
    )

    folder = tmp_path_factory.mktemp("teacher")
    stages = [f"stage{number}" for number in range(1, 5)]
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14, out_features=stages,
        reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, patch_size=14, neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8, head_hidden_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    size = {"height": 56, "width": 56}
    DPTImageProcessorPil(size=size, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(folder)
    return folder


def test_a_depth_model_of_transformers_is_a_teacher(depth_anything, vqvae):
    teacher = teacher_from(str(depth_anything))
    assert teacher.kind == "inverse"
    rows = [bare(n, masks=[], image=picture_bytes(n, size)) for n, size in enumerate([(64, 48), (48, 64), (64, 48)])]
    done = label_batch(columns(rows), teacher, vqvae)
    assert done[PROBLEM] == [None] * 3
    assert [decode_depth(item["bytes"]).shape for item in done["depth"]] == [(48, 64), (64, 48), (48, 64)]
    pictures = [Image.open(BytesIO(row["image"]["bytes"])) for row in rows]
    for together, alone in zip(teacher(pictures), [teacher([picture])[0] for picture in pictures], strict=True):
        assert np.abs(together - alone).max() < 1e-4 * max(1, np.abs(alone).max())


def test_a_metric_model_is_turned_round(depth_anything, tmp_path):
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    model = AutoModelForDepthEstimation.from_pretrained(depth_anything)
    model.config.depth_estimation_type = "metric"
    model.save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(depth_anything).save_pretrained(tmp_path)
    assert DepthTeacher(str(tmp_path)).kind == "metres" and teacher_from("none") is None


def test_a_labeller_crosses_processes_without_its_models(tmp_path, vqvae, depth_anything):
    vqvae.save_pretrained(tmp_path)
    labeller = Labeller(str(tmp_path), str(depth_anything))
    first = labeller(columns([bare(0)]))
    data = pickle.dumps(labeller)
    assert len(data) < 1000
    assert pickle.loads(data)(columns([bare(0)])) == first
    assert labeller.describe()["codebook"] == vqvae.codebook_hash()


def test_a_labeller_looks_at_what_it_has_finished(tmp_path, vqvae):
    vqvae.save_pretrained(tmp_path)
    no_mask = sample(1, masks=[])
    rows = columns([sample(0), no_mask, sample(2, image=picture_bytes(2)[:200])])
    done = Labeller(str(tmp_path))(rows)
    assert [p and p.partition(":")[0] for p in done[PROBLEM]] == [None, "invalid messages", "invalid image"]
    assert Labeller(str(tmp_path), check=False)(rows)[PROBLEM] == [None] * 3
