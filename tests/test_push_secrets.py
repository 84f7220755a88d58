"""What is taken for a secret, where it is looked for, and that a finding does not tell it."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from perceptio.hub import secrets_scan
from perceptio.hub.secrets_scan import scan_secrets

SECRETS = {
    "a token of the Hub": "hf_" + "aB3" * 12,
    "a key of Amazon's": "AKIA" + "ABCDEFGH12345678",
    "a token of GitHub's": "ghp_" + "a1B2" * 9,
    "a token of GitLab's": "glpat-" + "a1B2c3D4e5F6g7H8i9J0",
    "a key of Google's": "AIza" + "Sy_-a" * 7,
    "a token of Slack's": "xoxb-" + "1234567890-abc",
    "a secret key": "sk-" + "proj-a1B2c3D4" * 4,
    "a private key": "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
    "a password in an address": "https://me:" + "hunter22@example.org/x",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_each_kind_is_found_with_its_line_and_not_told(tmp_path, kind):
    (tmp_path / "notes.md").write_text(f"first\n\nkey = '{SECRETS[kind]}'\n")
    assert scan_secrets(tmp_path) == [f"notes.md, line 3: holds {kind}; take it out"]


def test_what_only_looks_alike_is_let_through(tmp_path):
    (tmp_path / "code.py").write_text(
        "hf_quantizer = hf_device_map_of_everything_that_there_is = None\nmask-rcnn task-specific sk-learn\n"
        "https://huggingface.co/me/it and me@example.org\n"
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps({"vocab": {f"{os.path.expanduser('~')}/": 1}}))
    assert scan_secrets(tmp_path) == []


def test_values_of_this_process_are_known(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_API_KEY", "correct horse battery")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    (tmp_path / "run.yaml").write_text("a: abc\nb: correct horse battery\n")
    assert scan_secrets(tmp_path) == ["run.yaml, line 2: holds the value of MY_SERVICE_API_KEY; take it out"]


def test_names_of_folders_are_looked_for_in_texts(tmp_path):
    machine = tmp_path / "secret-project"
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "config.json").write_text(f'{{\n"data": "{machine}/train"}}')
    (tmp_path / "it" / "code.py").write_text(f"{machine}/train")
    assert scan_secrets(tmp_path / "it") == []
    found = scan_secrets(tmp_path / "it", [machine])
    assert found == ["config.json, line 2: holds the name of a folder of this machine; take it out"]


def test_files_that_are_called_like_secrets(tmp_path):
    for name in ("server.pem", "id_rsa", ".env"):
        (tmp_path / name).write_text("nothing")
    assert [found.split(":")[0] for found in scan_secrets(tmp_path)] == [".env", "id_rsa", "server.pem"]


def test_a_secret_across_two_blocks_and_in_the_header_of_weights(tmp_path, monkeypatch):
    """Files are read in pieces, and of weights the header alone."""
    token = SECRETS["a token of the Hub"]
    monkeypatch.setattr(secrets_scan, "BLOCK", 4096)
    (tmp_path / "log.txt").write_text("\n" * 4080 + token + "\n" * 9000)
    save_file({"a": torch.zeros(9)}, tmp_path / "model.safetensors", metadata={"by": token})
    assert scan_secrets(tmp_path) == [
        "log.txt, line 4081: holds a token of the Hub; take it out",
        "model.safetensors, line 1: holds a token of the Hub; take it out",
    ]
    numbers = torch.frombuffer(bytearray(token.encode() * 4), dtype=torch.uint8)
    save_file({"a": numbers}, tmp_path / "model.safetensors")
    assert len(scan_secrets(tmp_path)) == 1
