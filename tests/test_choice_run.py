"""The command over benchmarks of choice, with a model."""

import json

import pytest
from test_choice_blink_seed import blink_row, write_blink
from test_choice_hardblink import write_hardblink
from test_choice_mme import write_folder

from perceptio.cli import main


def run(name: str, data, model, out, *more: str) -> dict:
    room = ["--max-new-tokens", "14", "--batch-size", "4", "--device", "cpu"]
    assert main(["eval", name, "--model", str(model), "--data", str(data), "--out", str(out), *room, *more]) == 0
    return json.loads((out / "results.json").read_text("utf-8"))


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text("utf-8").splitlines()]


def test_the_whole_way_and_once_more_without_asking(tiny_folder, tmp_path, capsys):
    write_hardblink(tmp_path / "data")
    results = run("hardblink", tmp_path / "data", tiny_folder(), tmp_path / "out")
    printed = capsys.readouterr()
    assert results["items"] == 9 and all(name in printed.out for name in ("3 points", "5 points", "mean"))
    found = lines(tmp_path / "out")
    assert all(len(line["depth_codes"]) == 9 and len(line["masks"]) == 1 and not line["problems"] for line in found)
    assert (tmp_path / "out" / "page.html").stat().st_size > 10_000
    again = run("hardblink", tmp_path / "data", tiny_folder(), tmp_path / "out")
    assert again == results, "the measured seconds too, which another answer would change"


def test_several_pictures_are_seen_without_perception(tiny_folder, tmp_path):
    rows = [blink_row("Jigsaw", 1, "(A)", pictures=3), blink_row("Relative_Depth", 1, "(A)")]
    write_blink(tmp_path / "data", rows)
    run("blink", tmp_path / "data", tiny_folder(), tmp_path / "out")
    assert {line["id"]: (line["perception"], line["depth_codes"] is None) for line in lines(tmp_path / "out")} == {
        "val_Jigsaw_1": ("none", True),
        "val_Relative_Depth_1": ("seg+depth", False),
    }
    run("blink", tmp_path / "data", tiny_folder(), tmp_path / "depth", "--perception", "depth")
    assert {line["perception"] for line in lines(tmp_path / "depth")} == {"none", "depth"}


def test_a_damaged_picture_is_wrong_and_invalid(tiny_folder, tmp_path):
    write_folder(tmp_path / "data")
    path = tmp_path / "data" / "existence" / "0002.jpg"
    path.write_bytes(path.read_bytes()[:200])
    results = run("mme", tmp_path / "data", tiny_folder(), tmp_path / "out", "--perception", "none")
    assert sum(count for reason, count in results["invalid"].items() if "damaged picture" in reason) == 2
    assert results["items"] == 12


def test_wrong_data_ends_with_one_line_and_code_2(tiny_folder, tmp_path, capsys):
    write_hardblink(tmp_path / "data")
    (tmp_path / "data/images/blink3pointscenter/7.png").unlink()
    arguments = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--model", str(tiny_folder())]
    with pytest.raises(SystemExit) as caught:
        raise SystemExit(main(["eval", "hardblink", *arguments, "--device", "cpu"]))
    assert caught.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "row 1, field `image`: '7.png': No such file" in said and "hardblink" not in said.split(":")[0]
