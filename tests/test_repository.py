"""Rules that hold for every source file."""

import ast
import re
from pathlib import Path

import pytest

from perceptio.files_perceptio import CODE_FILES

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not {".venv", "build", ".cache"} & set(path.relative_to(ROOT).parts) and "tests" not in path.parts
)
FORBIDDEN = {
    r"\bpickle\.loads?\(": "unpickling runs code",
    r"np\.load\(": "may unpickle",
    r"(?<![.\w])(eval|exec)\(": "runs text",
    r"yaml\.load\(": "runs code",
    r"shell=True": "runs text",
    r"requests\.get\(": "fetches unasked",
    r"trust_remote_code=True": "is the user's decision",
    r"\b(TODO|FIXME|XXX)\b": "is unfinished",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_runs_foreign_code(path):
    text = path.read_text(encoding="utf-8")
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("#", ">>>")))
    code = re.sub(r'"""(?:.|\n)*?"""', "", code)
    for pattern, reason in FORBIDDEN.items():
        found = re.search(pattern, code)
        assert not found, f"{path.name}: {found[0]} {reason}"
    if path.name != "convert_sam2.py":
        assert "torch.load(" not in code
    else:
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^)]*\)", code))


@pytest.mark.parametrize("name", CODE_FILES)
def test_flat_files_import_only_flat_siblings_and_the_core_packages(name):
    """The Hub's loader follows `from .x import y` between siblings, and demands every other package of the user."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    allowed = {"torch", "transformers", "PIL", "numpy", "huggingface_hub", "safetensors", "packaging", "pycocotools"}
    import sys

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and f"{node.module}.py" in CODE_FILES, f"from {'.' * node.level}{node.module}"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for package in (found.split(".")[0] for found in names):
                assert package in allowed or package in sys.stdlib_module_names, package


def test_relative_imports_stand_outside_try():
    """The Hub's loader scans the text and ignores try, so such an import would be required all the same."""
    for name in CODE_FILES:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Try):
                assert not any(isinstance(child, ast.ImportFrom) and child.level for child in ast.walk(node)), name


def test_the_package_lists_every_folder_of_code():
    listed = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    folders = {path.parent.relative_to(ROOT).as_posix() for path in SOURCES if path.name == "__init__.py"} - {"."}
    for folder in folders:
        assert f"perceptio.{folder.replace('/', '.')}" in listed, folder
