"""What the README shows is what happens: its code runs, its output is printed, its figures come from their file."""

import json
import re
from pathlib import Path

import pytest
from warm import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """An empty folder with what the README's paths name."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("assets", "checkpoints", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "build").mkdir()
    return folder


def test_the_examples_run_in_order_and_print_what_the_readme_says(workplace):
    """Python and commands in the order in which a reader meets them."""
    steps = re.findall(r"```(python|bash)\n(.*?)```", README, flags=re.DOTALL)
    assert [kind for kind, _ in steps].count("python") == 5
    outputs, commands = [], 0
    for kind, text in steps:
        if kind == "python":
            done = run(["-c", text], workplace)
            assert done.returncode == 0, done.stderr
            outputs.append(done.stdout)
            continue
        for command in (line for line in text.splitlines() if line.startswith(("perceptio ", "python -m perceptio."))):
            words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)]
            words = ["-m", *words] if words[0] == "perceptio" else words[1:]
            done = run(words, workplace)
            assert done.returncode == 0, (command, done.stderr)
            commands += 1
    assert outputs[0] == blocks("text")[0] and commands == 14
    for name, least in (
        ("result.png", 10_000),
        ("mine.html", 20_000),
        ("sheet.png", 10_000),
        ("depth-evaluation/evaluation.png", 10_000),
    ):
        assert (workplace / "build" / name).stat().st_size > least


def test_the_figures_come_from_their_file():
    results = json.loads((ROOT / "bench" / "results" / "backbone.json").read_text(encoding="utf-8"))
    shown = [
        float(number) for number in re.findall(r"^\| .* \| (\d\.\d{3}) \| \d\.\d\d \|$", README, flags=re.MULTILINE)
    ]
    measured = [results["mode_none"]["ratio"], results["peak_memory"]["ratio"], results["grammar"]["ratio"]]
    assert shown == [round(value, 3) for value in measured]
    assert f"{results['parameters'] / 1e6:.0f} M parameters" in README


def test_the_figures_of_the_data_come_from_their_files():
    world, check, stream, label = (
        json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("world", "check", "stream", "label")
    )
    measured = [
        ("bench_world.py", f"{world['scenes_per_second_2']:.1f}"),
        ("bench_check.py", f"{check['records_per_minute']:.0f}"),
        ("bench_stream.py", f"{stream['peak_ratio']:.3f}"),
        ("bench_label.py", f"{label['local']['ratio']:.2f}"),
        ("bench_label.py", f"{label['ray']['ratio']:.2f}"),
    ]
    assert re.findall(r"^\| .* \| `(bench_\w+\.py)` \| ([\d.]+) \| [\w.]+ \|$", README, flags=re.MULTILINE) == measured
    assert world["scenes_per_second_2"] >= 60 and check["records_per_minute"] >= 1000
    assert label["local"]["ratio"] >= 1.7 and label["ray"]["ratio"] >= 1.7


def test_the_figures_of_fine_tuning_come_from_their_files():
    section = README.split("## Fine-tune")[1].split("\n## ")[0]
    step, survival = (
        json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("sft", "survival")
    )
    ratios = step["masks and depth"]["ratios"]["perceptio / trl"]
    kills, spoilt = survival["kills"], survival["one_bad_sample_in_64"]
    rows = [row.split(" | ") for row in re.findall(r"^\| (\w.*) \|$", section, flags=re.MULTILINE)]
    assert [row[-2:] for row in rows] == [
        [f"{ratios['time']:.2f}", "1.15"],
        [f"{ratios['memory']:.2f}", "1.10"],
        [str(kills["ours"]["identical"]), str(kills["ours"]["kills"])],
        [str(spoilt["ours"]["not_finite"]), "0"],
    ]
    assert (
        f"(stock: {kills['stock']['identical']})" in section and f"(stock: {spoilt['stock']['not_finite']})" in section
    )
    assert ratios["time"] <= 1.15 and ratios["memory"] <= 1.10 and kills["ours"]["identical"] == 20


def test_the_figures_of_the_depth_tokenizer_come_from_their_files():
    """They may fall short of their bar; then the README says so by showing both."""
    section = README.split("## The depth tokenizer")[1].split("\n## ")[0]
    found, bench, tried = (
        json.loads((ROOT / name).read_text(encoding="utf-8"))
        for name in (
            "checkpoints/depth-tiny/evaluation.json", "bench/results/depth.json", "bench/results/depth_tried.json"
        )
    )  # fmt: skip

    def percent(name: str, row: dict = found) -> str:
        return f"{100 * row[name]:.1f}%"

    assert re.findall(r"^\| .* \| (.*) \| [\d.%, none]+ \|$", section.split("Against")[0], flags=re.MULTILINE) == [
        f"{percent('abs_rel')}, {percent('delta1')}",
        f"{percent('usage')}, {found['perplexity']:.1f}",
        percent("stable"),
        f"{percent('edge_recall')}, {percent('edge_precision')}",
        percent("legibility"),
    ]
    assert f"On {found['maps']:,} scenes" in section and f"{bench['maps']:,} maps of 320" in section
    names = (
        "same_maps_mse", "same_maps_abs_rel", "same_maps_seconds", "same_time_mse", "same_time_abs_rel", "encode",
        "decode",
    )  # fmt: skip
    shown = re.findall(r"^\| .* \| (\d+\.\d\d) \| [\d.none]+ \|$", section, flags=re.MULTILINE)
    assert shown == [f"{bench['ratios'][name]:.2f}" for name in names]
    for name, row in tried["rows"].items():
        columns = [percent("abs_rel", row), percent("delta1", row), f"{row['perplexity']:.0f}", percent("stable", row)]
        assert f"| {name} | {' | '.join(columns)} |" in section


TINY_FIGURES = {
    "closest of 3 points": "points3: closest point",
    "closest of 4 points": "points4: closest point",
    "closest of 5 points": "points5: closest point",
    "closest point, where it is not the lowest": "lure: closest point",
    "masks of what is referred to, cIoU": "refer: cIoU",
    "answers to the other questions": "test: answers",
    "depth, δ1 after the best scale and shift": "test: delta1, aligned",
    "absent things left without a mask": "absent: absent, and left without a mask",
    "whole depth spans": "test: whole depth spans",
}
CODES_SHOWN = {"its own": "own", "random ones": "random", "one and the same": "constant",
               "those of another picture": "other", "those of the true depth": "oracle"}  # fmt: skip


def test_the_figures_of_perceptio_tiny_come_from_their_files():
    """They may fall short of their bar; then the README says so by showing both."""
    section = README.split("## perceptio-tiny")[1].split("\n## ")[0]
    evaluation, ablations = (
        json.loads((ROOT / name).read_text(encoding="utf-8"))
        for name in ("checkpoints/perceptio-tiny/evaluation.json", "bench/results/ablations.json")
    )
    found = {figure["name"]: figure for figure in evaluation["figures"]}
    rows = [row.split(" | ") for row in re.findall(r"^\| (.*) \|$", section, flags=re.MULTILINE)]
    shown = {row[0]: row[1:] for row in rows if len(row) > 1}
    for label, name in TINY_FIGURES.items():
        figure = found[name]
        interval = f"{figure['low']:.1f} to {figure['high']:.1f}%"
        assert shown[label][:2] == [f"{figure['value']:.1f}%", interval], label
    weights = json.loads((ROOT / "checkpoints/perceptio-tiny/manifest.json").read_text("utf-8"))["files"]
    measured = ablations["codes"]["weights"]
    assert measured == {name: entry for name, entry in weights.items() if name.endswith(".safetensors")}
    for label, codes in CODES_SHOWN.items():
        splits = ablations["codes"]["with"][codes].values()
        mean = sum(split["closest point"]["value"] for split in splits) / len(splits)
        assert shown[label] == [f"{mean:.1f}%"], label


def test_every_file_of_the_tree_is_there():
    tree = README.split("## The files")[1].split("The root of")[0]
    for name in re.findall(r"[\w/]+\.py|\b\w+/", tree):
        assert (ROOT / name).exists(), name
