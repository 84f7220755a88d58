import json
import os
import zipfile

import pytest

from perceptio.hub.manifest import MANIFEST_NAME, list_files, scan_pickles, verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    header = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abcd")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "note.md").write_text("hello")
    write_manifest(tmp_path)
    return tmp_path


def test_a_fresh_folder_verifies_and_hidden_files_do_not_count(folder):
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_text("x")
    assert verify_manifest(folder) == []
    assert list_files(folder) == ["config.json", "model.safetensors", "more/note.md"]


def test_writing_twice_gives_the_same_bytes(folder):
    before = (folder / MANIFEST_NAME).read_bytes()
    write_manifest(folder)
    assert (folder / MANIFEST_NAME).read_bytes() == before
    assert sorted(os.listdir(folder)) == ["config.json", MANIFEST_NAME, "model.safetensors", "more"]


def test_one_flipped_bit_is_found(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (problem,) = verify_manifest(folder)
    assert problem.startswith("model.safetensors: has the right size but other content")


def test_missing_extra_and_cut_files_are_named(folder):
    (folder / "config.json").unlink()
    (folder / "new.txt").write_text("new")
    (folder / "more" / "note.md").write_text("hel")
    assert verify_manifest(folder) == [
        "new.txt: is not listed in manifest.json",
        "config.json: is listed in manifest.json but missing",
        "more/note.md: has 3 bytes, expected 5",
    ]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"files": 3}', '{"files": {"a": {}}}', '{"files": {"a": 1}}'],
)
def test_a_broken_manifest_is_one_sentence(folder, content):
    (folder / MANIFEST_NAME).write_text(content)
    (problem,) = verify_manifest(folder)
    assert problem.startswith("manifest.json: cannot be read")


def test_no_manifest_is_a_problem_not_a_pass(folder):
    (folder / MANIFEST_NAME).unlink()
    assert verify_manifest(folder) == ["manifest.json: missing, so the folder cannot be verified"]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..\\secret", "more/../../secret"])
def test_names_outside_the_folder_are_refused(folder, name):
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["files"][name] = {"size": 1, "sha256": "0"}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    (problem,) = verify_manifest(folder)
    assert "outside the folder" in problem


def test_a_missing_folder_is_the_callers_mistake(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        verify_manifest(tmp_path / "nothing")


def test_pickles_are_found_by_name_and_by_content(folder):
    assert scan_pickles(folder) == []
    (folder / "adapter_model.bin").write_bytes(b"harmless")
    (folder / "vocab.txt").write_bytes(b"\x80\x04\x95rest")
    with zipfile.ZipFile(folder / "model-2.safetensors", "w") as archive:
        archive.writestr("data.pkl", b"\x80\x02")
    (folder / "model-3.safetensors").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (folder / "model-4.safetensors").write_bytes(b"")
    assert [problem.split(":")[0] for problem in scan_pickles(folder)] == [
        "adapter_model.bin",
        "model-2.safetensors",
        "model-3.safetensors",
        "model-4.safetensors",
        "vocab.txt",
    ]


def test_progress_counts_every_byte(folder):
    blocks = []
    verify_manifest(folder, blocks.append)
    assert sum(blocks) == sum((folder / name).stat().st_size for name in list_files(folder))
