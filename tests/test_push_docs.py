"""The guide to publishing: what its commands send without `--dry-run`, and what it names."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

from perceptio.cli import build_parser, main
from perceptio.hub.card import DATASETS, KEYS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "push.md").read_text(encoding="utf-8")


def test_what_the_guide_shows_arrives(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in re.search(r"```bash\n(.*?)```", PAGE, re.S)[1].splitlines()]
    assert sum("--dry-run" in words for words in commands) == 2
    with HubServer({"hf_Mine0123456789": "me"}) as hub:
        hub.use(monkeypatch, tmp_path / "home", "hf_Mine0123456789")
        for words in commands:
            if words[:2] == ["python", "-m"]:
                monkeypatch.setattr(sys, "argv", words[2:])
                runpy.run_module(words[2], run_name="__main__", alter_sys=False)
                continue
            pushed = [*words[1:], "--no-verify"] if words[1] == "push" else words[1:]
            assert main([word for word in pushed if word != "--dry-run"]) == 0
        assert hub.repositories["models", "me/cups"].private
        data = hub.files("me/cup-scenes", "v1", "datasets")
        assert {"README.md", "manifest.json"} < set(data) and any(name.endswith(".parquet") for name in data)
        assert {"LICENSE", "chat_template.jinja", "generation_config.json", "processor_config.json", "config.json",
                "manifest.json", "README.md", "modeling_perceptio.py"} <= set(hub.files("me/cups"))  # fmt: skip


def test_what_the_guide_names_is_there():
    options = set(re.findall(r"`(--[a-z-]+)", PAGE))
    known = build_parser()._subparsers._group_actions[0].choices["push"]._option_string_actions
    assert options <= set(known) and {"--type", "--private", "--revision", "--results"} <= options
    assert set(KEYS) <= set(re.findall(r"`(\w+)`", PAGE))
    named = PAGE.split("Hub: ")[1].split(", or what")[0].replace(" and ", ", ").lower().split(", ")
    assert sorted(named) == sorted(DATASETS)
    with pytest.raises(SystemExit):
        build_parser().parse_args(["push", "folder"])
