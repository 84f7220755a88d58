"""Folders of pictures with depth maps, as Depth Anything writes them."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from perceptio.data.depths import decode_depth
from perceptio.data.record import DataError
from perceptio.data.sources.ade import read_ade
from perceptio.data.tally import Tally
from perceptio.data.validate import check_records

SIZE = (40, 60)  # height, width


def save(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(SIZE[::-1], 50).convert("RGB").save(path, "JPEG")


def png(values) -> bytes:
    file = BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def depth_ramp(top, kind) -> np.ndarray:
    return np.tile(np.linspace(0, top, SIZE[1]).astype(kind), (SIZE[0], 1))


@pytest.fixture
def depth_root(tmp_path):
    for name in ("a", "sub/b", "c", "d", "e", "f", "g"):
        save(tmp_path / "images" / f"{name}.jpg")
    maps = tmp_path / "depth"
    (maps / "sub").mkdir(parents=True)
    grey = depth_ramp(255, np.uint8)
    (maps / "a_depth.png").write_bytes(png(np.repeat(grey[..., None], 3, axis=2)))
    (maps / "sub/b.png").write_bytes(png(depth_ramp(65535, np.uint16)))
    (maps / "c.png").write_bytes(png(np.stack([grey, 255 - grey, grey], axis=2)))
    (maps / "d.png").write_bytes(png(grey)[:60])
    (maps / "e.png").write_bytes(png(np.ascontiguousarray(grey.T)))
    (maps / "f.png").write_bytes(png(depth_ramp(255, np.uint8)[:20, :30]))
    return tmp_path


def test_pictures_with_depth_maps_ask_for_the_map(depth_root):
    tally = Tally()
    records = list(read_ade(depth_root, tally=tally))
    tally.check(7)
    assert tally.dropped == {"depth map not usable": 2, "depth not usable": 1, "no depth map": 1}
    assert [record["id"] for record in records] == [
        "ade20k-depth/a.jpg",
        "ade20k-depth/f.jpg",
        "ade20k-depth/sub/b.jpg",
    ]
    assert [problem for _, problems in check_records(records) for problem in problems] == []
    for record in records:
        assert record["messages"][1]["perception"] == "depth" and record["masks"] == []
        depth = decode_depth(record["depth"]["bytes"])
        assert depth[0, 0] == 0 and depth[0, -1] == 1 and (np.diff(depth[0]) >= 0).all()


def test_zero_is_the_farthest_point_or_no_value(depth_root):
    first = {zero: next(read_ade(depth_root, tally=Tally(), zero=zero)) for zero in ("farthest", "none")}
    assert not np.isnan(decode_depth(first["farthest"]["depth"]["bytes"])).any()
    assert np.isnan(decode_depth(first["none"]["depth"]["bytes"])[:, 0]).all()
    with pytest.raises(ValueError, match="`zero` is 'near'"):
        next(read_ade(depth_root, tally=Tally(), zero="near"))


def test_a_missing_folder_of_pictures_is_named(tmp_path):
    with pytest.raises(DataError, match="no folder.*`images`"):
        list(read_ade(tmp_path, tally=Tally(), images="pictures"))
