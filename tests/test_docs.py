"""The guides run as they stand, page after page, in one folder, as a reader goes through them."""

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import yaml
from warm import run

from perceptio.cli import build_parser, main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [page for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"] for page in entry.values()]
ELSEWHERE = {"push.md"}  # tests/test_push_docs.py runs it
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
LANGUAGES = {"python", "bash", "yaml", "text", ""}  # text is output; "" are commands that are not run:
NOT_RUN = {
    "pip install -e": "changes the machine",
    "perceptio label --images": "fetches a teacher; tests/test_label_command.py runs it",
    "python -m perceptio.data.joint_run": "needs published files; tests/test_joint.py runs it",
    "python -m perceptio.data.job": "needs published files; tests/test_job.py runs it",
    "python -m perceptio.evaluation.choice.hardblink_build": "needs photos; tests/test_choice_hardblink.py runs it",
    "python -m perceptio.vqvae.export build/depth": "needs a long training; the README exports a short one",
    "accelerate launch": "needs several GPUs; tests/test_train_processes.py trains in two processes",
    "perceptio assemble --backbone": "needs published weights; tests/test_assemble.py runs it",
    "perceptio eval": "needs published benchmarks; the tests of each evaluator run it",
    "lmms-eval": "needs lmms-eval",
    "make": "takes hours",
}


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def commands(block: str) -> list[str]:
    """Its lines, without comments, those that go on with a backslash joined."""
    lines = re.sub(r"\\\n\s*", "", block).strip().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def words_of(command: str) -> list[str]:
    """A command line as arguments of this Python."""
    words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)]
    return ["-m", *words] if words[0] == "perceptio" else words[1:]


class Reader:
    """Someone who types what a page says, in a folder with what its paths name."""

    def __init__(self, folder: Path):
        self.folder, self.server, self.address, self.outputs = folder, None, "", {}
        self.surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(self, words: list[str], **changes) -> str:
        if changes:  # of what the libraries read when they are imported
            surroundings = {**self.surroundings, **changes}
            command = [sys.executable, *words]
            done = subprocess.run(command, cwd=self.folder, env=surroundings, capture_output=True, text=True)
        else:
            done = run(words, self.folder, self.surroundings)
        assert done.returncode == 0, (words, done.stderr[-2000:])
        return done.stdout

    def serve(self, words: list[str]) -> None:
        words = [*words[:-1], "0"]  # the port comes last
        self.server = subprocess.Popen(
            [sys.executable, *words], cwd=self.folder, env=self.surroundings, stderr=subprocess.PIPE, text=True
        )
        found = (re.search(r"at http://(\S+)/v1", line) for line in self.server.stderr)
        self.address = next(match[1] for match in found if match)

    def type(self, kind: str, block: str) -> None:
        if kind == "python":
            # huggingface_hub's client sends nothing while it is told to be offline, not even to this machine.
            changes = {"HF_HUB_OFFLINE": "0"} if self.server else {}
            self.outputs[block] = self.run(["-c", block.replace("127.0.0.1:8000", self.address)], **changes)
        elif kind == "yaml":
            (self.folder / re.match(r"# (\S+)\n", block)[1]).write_text(block, encoding="utf-8")
        else:
            for command in commands(block):
                words = words_of(command)
                if command.startswith("perceptio serve"):
                    self.serve(words)
                elif command.startswith("perceptio "):
                    with redirect_stdout(StringIO()) as printed:
                        assert main(words[2:]) == 0, command
                    self.outputs[command] = printed.getvalue()
                else:
                    self.outputs[command] = self.run(words)

    def leave(self) -> None:
        if self.server:
            self.server.terminate()
            self.server.communicate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the pages take for granted, and no more."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("assets", "checkpoints", "recipes", "train_sft.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "build").mkdir()
    (folder / "data" / "llava").mkdir(parents=True)
    rows = [{"id": "1", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]}]
    (folder / "data" / "llava" / "llava_v1_5_mix665k.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


@pytest.fixture
def reader(folder, monkeypatch):
    monkeypatch.chdir(folder)
    reader = Reader(folder)
    yield reader
    reader.leave()


def steps(page: str) -> list[tuple[str, str]]:
    """What a page has to type; blocks of Python that follow each other are one, as at one prompt."""
    joined: list[tuple[str, str]] = []
    for kind, block in FENCE.findall(read(page)):
        if kind == "python" and joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + block)
        elif kind in ("python", "bash", "yaml"):
            joined.append((kind, block))
    return joined


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE and steps(page)])
def test_a_page_runs_from_top_to_bottom(page, reader):
    if page == "serving.md" and not all(map(importlib.util.find_spec, ("fastapi", "uvicorn", "openai"))):
        pytest.skip('needs the extra "serve"')
    for kind, block in steps(page):
        reader.type(kind, block)
    assert reader.outputs
    CHECKS.get(page, lambda _: None)(reader)


def check_index(reader: Reader) -> None:
    assert (reader.folder / "build" / "result.png").stat().st_size > 10_000


def check_data(reader: Reader) -> None:
    assert (reader.folder / "build" / "mine.html").stat().st_size > 20_000
    assert (reader.folder / "build" / "sheet.png").stat().st_size > 10_000
    assert (reader.folder / "shards" / "llava-1.5" / "manifest.json").is_file()
    given = next(output for line, output in reader.outputs.items() if "counterfactual" in line)
    assert re.search(r"^wrote [1-9]\d* records to build/given$", given, re.MULTILINE)


def check_finetune(reader: Reader) -> None:
    assert len(reader.outputs) == 6
    dry = next(output for line, output in reader.outputs.items() if line.endswith("--dry_run"))
    assert "one batch of 4 went through" in dry and "GPU-hours" in dry
    trained = next(output for line, output in reader.outputs.items() if "--save_steps" in line)
    assert "eval_discs_mask_iou" in trained and "wrote build/discs-run/model" in trained
    run = reader.folder / "build" / "discs-run"
    assert {path.name for path in run.iterdir()} >= {"model", "scores.json", "panels"}
    assert len(list((run / "panels").iterdir())) == 8


def check_evaluation(reader: Reader) -> None:
    names = set(re.findall(r"^\| `(\w+\.\w+)` \|", read("evaluation.md"), flags=re.MULTILINE))
    assert len(names) == 5
    for name in ("world", "random"):
        assert names <= {path.name for path in (reader.folder / "build" / "eval" / name).iterdir()}


def check_reproduce(reader: Reader) -> None:
    """The table of costs is what the dry runs say."""
    row = re.compile(r"^\| ([^|]+) \| ([\d.,]+(?: GiB)?) \| ([\d.,]+(?: GiB)?) \|$", re.MULTILINE)
    shown = row.findall(read("reproduce.md"))
    outputs = [output for line, output in reader.outputs.items() if "--dry_run" in line]
    for column, output in enumerate(outputs, start=1):
        parameters, trained = re.search(r"^sum +([\d,]+) +([\d,]+)$", output, re.MULTILINE).groups()
        hours, clock = re.search(r"about ([\d.,]+) GPU-hours, ([\d.,]+) hours", output).groups()
        memory, steps = re.search(r"^sum +([\d.]+)$", output, re.MULTILINE)[1], re.search(r"([\d,]+) steps", output)[1]
        assert [line[column] for line in shown] == [parameters, trained, f"{memory} GiB", steps, hours, clock]
    assert len(outputs) == 2


def check_serving(reader: Reader) -> None:
    assert "".join(reader.outputs.values()).endswith("['depth', 'depth_codes', 'masks', 'problems']\n")


CHECKS = {
    "index.md": check_index,
    "data.md": check_data,
    "finetune.md": check_finetune,
    "evaluation.md": check_evaluation,
    "reproduce.md": check_reproduce,
    "serving.md": check_serving,
}


def test_what_is_not_run_is_listed_with_a_reason_and_parses():
    left, parser = set(NOT_RUN), build_parser()
    for page in set(PAGES) - ELSEWHERE:
        for kind, block in FENCE.findall(read(page)):
            assert kind in LANGUAGES, f"{page}: ```{kind}"
            for command in commands(block) if kind == "" else []:
                reason = next((start for start in NOT_RUN if command.startswith(start)), None)
                assert reason, f"{page}: {command} is neither run (```bash) nor listed"
                left.discard(reason)
                if command.startswith("perceptio "):
                    parser.parse_args(words_of(command)[2:])
        assert not re.search(
            r"^(?: {4}|\t)\S*(perceptio|python|pip|make)\b", FENCE.sub("", read(page)), re.MULTILINE
        ), page
    assert not left, "listed, and on no page"


def slug(heading: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(page))):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = DOCS / (name or page)
        assert path.is_file(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text("utf-8")), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page}: {target}"


def test_every_page_is_in_the_menu():
    assert {path.name for path in DOCS.glob("*.md")} == set(PAGES)


def test_what_the_reference_names_is_there():
    for name in re.findall(r"^::: (\S+)$", read("reference.md"), re.MULTILINE):
        module, _, member = name.rpartition(".")
        if module == "perceptio.serving":
            pytest.importorskip("fastapi", reason='needs the extra "serve"')
            pytest.importorskip("openai", reason='needs the extra "serve"')
        assert getattr(importlib.import_module(module), member).__doc__, name


def test_the_site_builds(tmp_path):
    pytest.importorskip("zensical", reason='needs the extra "docs"')
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "build" / "site" / "reference.html").read_text("utf-8")
    assert (
        'id="perceptio.pipeline_perceptio.PerceptioPipeline"' in reference
        and "<code>predicted_depth</code>" in reference
    )
