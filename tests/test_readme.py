"""What the README shows is what happens: its code runs, its output is printed, its figures come from their file."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=110)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """An empty folder with the demo's picture, where the README's paths are right."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "assets").symlink_to(ROOT / "assets")
    (folder / "build").mkdir()
    return folder


def test_the_examples_run_in_order_and_print_what_the_readme_says(workplace):
    examples = blocks("python")
    assert len(examples) == 2
    first = run([sys.executable, "-c", examples[0]], workplace)
    assert first.returncode == 0, first.stderr
    assert first.stdout == blocks("text")[0]
    second = run([sys.executable, "-c", examples[1]], workplace)
    assert second.returncode == 0, second.stderr


def test_the_commands_run(workplace, tiny_folder):
    from perceptio.hub.untrained import build_untrained

    build_untrained(workplace / "build" / "untrained")
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("perceptio ")]
    assert len(commands) == 4
    for command in commands:
        words = re.findall(r'"[^"]*"|\S+', command)[1:]
        done = run([sys.executable, "-m", "perceptio", *(word.strip('"') for word in words)], workplace)
        assert done.returncode == 0, (command, done.stderr)
    assert (workplace / "build" / "result.png").stat().st_size > 10_000


def test_the_figures_come_from_their_file():
    results = json.loads((ROOT / "bench" / "results" / "backbone.json").read_text(encoding="utf-8"))
    shown = [
        float(number) for number in re.findall(r"^\| .* \| (\d\.\d{3}) \| \d\.\d\d \|$", README, flags=re.MULTILINE)
    ]
    measured = [results["mode_none"]["ratio"], results["peak_memory"]["ratio"], results["grammar"]["ratio"]]
    assert shown == [round(value, 3) for value in measured]
    assert f"{results['parameters'] / 1e6:.0f} M parameters" in README


def test_every_file_of_the_tree_is_there():
    tree = README.split("## The files")[1].split("The root of")[0]
    for name in re.findall(r"[\w/]+\.py|\b\w+/", tree):
        assert (ROOT / name).exists(), name
