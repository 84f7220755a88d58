"""The guides run as they stand, from the top."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(words: list[str], cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=200)


@pytest.mark.timeout(600)
def test_the_guide_to_fine_tuning(tmp_path):
    text = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
    for name in ("assets", "recipes", "train_sft.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "build").mkdir()
    done, outputs = [], {}
    for kind, block in re.findall(r"```(python|bash|yaml)\n(.*?)```", text, flags=re.DOTALL):
        if kind == "python":
            result = run(["-c", block], tmp_path)
            assert result.returncode == 0, result.stderr[-2000:]
        elif kind == "yaml":
            (tmp_path / re.match(r"# (\S+)\n", block)[1]).write_text(block, encoding="utf-8")
        else:
            for line in block.strip().splitlines():
                words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
                words = ["-m", *words] if words[0] == "perceptio" else words[1:]
                result = run(words, tmp_path)
                assert result.returncode == 0, (line, result.stderr[-2000:])
                outputs[line] = result.stdout
                done.append(line)
    assert len(done) == 6
    dry = next(output for line, output in outputs.items() if line.endswith("--dry_run"))
    assert "one batch of 4 went through" in dry and "GPU-hours" in dry
    trained = next(output for line, output in outputs.items() if "--save_steps" in line)
    assert "eval_discs_mask_iou" in trained and "wrote build/discs-run/model" in trained
    assert {path.name for path in (tmp_path / "build" / "discs-run").iterdir()} >= {"model", "scores.json", "panels"}
    assert len(list((tmp_path / "build" / "discs-run" / "panels").iterdir())) == 8
