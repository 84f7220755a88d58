"""Rows and files spoilt at random: each loads or gives the one clear problem, and nothing else is ever opened."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from own_samples import good_row, jpeg, png, ramp, write_rows

from perceptio.data.check import check_data
from perceptio.data.own import KEYS

CANARY = b"canary-7f3a"
NAMES = ["../canary.txt", "/etc/hostname", "mask.png", "0.jpg", "depth.png", ".", "sub", "\0", "shown", "stored"]
LEAVES = (
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=30)
    | st.sampled_from(NAMES)
)  # fmt: skip
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.dictionaries(
            st.sampled_from(["size", "counts", "turn", "mask", "role", "content", "offset", "x"]), inner, max_size=5
        )
    ),
    max_leaves=12,
)
ROWS = st.tuples(
    st.integers(0, 5),
    st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), JSON, max_size=4),
    st.sets(st.sampled_from(KEYS), max_size=2),
)
SETTINGS = settings(suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "canary.txt").write_bytes(CANARY)
    (folder / "data" / "sub").mkdir(parents=True)
    for index in range(6):
        good_row(index, folder / "data")
    return folder / "data"


def judge(report, rows: int) -> None:
    assert report.read == rows and report.kept + len({problem.row for problem in report.problems}) == rows
    for problem in report.problems:
        assert problem.found and problem.expected and problem.remedy
        assert CANARY.decode() not in str(problem) and len(str(problem)) < 2000


@settings(SETTINGS, max_examples=700)
@given(ROWS)
def test_spoilt_rows(root, drawn):
    index, changes, removed = drawn
    row = {key: value for key, value in {**good_row(index, root), **changes}.items() if key not in removed}
    judge(check_data(write_rows(root, [row]), workers=1), 1)


@settings(SETTINGS, max_examples=150)
@given(st.lists(st.binary(max_size=60).map(lambda data: data.replace(b"\n", b" ")), min_size=1, max_size=5))
def test_spoilt_lines(root, lines):
    """Every line that is not blank is a row; whitespace alone is none."""
    good = json.dumps(good_row(5, root)).encode()
    write_rows(root, [*lines, good])
    report = check_data(root, workers=1)
    shown = [lines[0].removeprefix(b"\xef\xbb\xbf"), *lines[1:]]
    judge(report, 1 + sum(bool(line.strip()) for line in shown))
    assert report.kept == 1


@settings(SETTINGS, max_examples=250)
@given(st.sampled_from(["image", "mask", "depth"]), st.data())
def test_spoilt_files(field, drawn):
    """Bytes are changed, cut or added in a picture, a mask or a depth map."""
    data = {"image": jpeg(), "mask": png(ramp().astype("uint8") // 128), "depth": png(ramp())}[field]
    place = drawn.draw(st.integers(0, len(data) - 1))
    data = drawn.draw(
        st.sampled_from(
            [data[:place], data[:place] + b"\0" + data[place:], data[:place] + b"\xff" + data[place + 1 :]]
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        row = {**good_row(1, folder), field: "spoilt.png"}
        (folder / "spoilt.png").write_bytes(data)
        judge(check_data(write_rows(folder, [row]), workers=1), 1)
