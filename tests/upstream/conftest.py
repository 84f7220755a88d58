"""Makes transformers' own common tests importable as the package `transformers_tests`.

The wheel lacks them.  The model and processor tests come from the source distribution of the installed version
(`python tests/fetch_upstream.py`), the generation tests only from a checkout: TRANSFORMERS_TESTS=/path/to/its/tests.
It should be of the version that is installed: a test that fails for InternVL too is of another one.
None of that code is part of this repository.
"""

import atexit
import importlib.util
import os
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path

from PIL import Image, ImageDraw

CACHE = Path(__file__).parents[2] / ".cache" / "transformers-tests" / version("transformers") / "tests"
CHECKOUT = os.environ.get("TRANSFORMERS_TESTS")
MARKERS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "generate",
           "torch_compile_test", "torch_export_test")  # fmt: skip
# What the tests import from files that no source distribution holds.
MIXINS = {"generation.test_utils": "GenerationTesterMixin", "exporters.test_export": "ExportTesterMixin"}


def _module(name: str, **content) -> None:
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(content)


def _package(name: str, folders: list[Path | str]) -> None:
    _module(name, __path__=[str(folder) for folder in folders])


def _absent(mixin: str) -> type:
    """A mixin of one test, which says what is missing."""
    reason = f"{mixin} is in no source distribution: TRANSFORMERS_TESTS=/path/to/a/checkout/tests brings it"
    return type(mixin, (), {f"test_{mixin}": lambda self: self.skipTest(reason)})


def _local_picture(url: str, **_) -> str:
    """The tests name pictures by URL; offline, one drawn here stands in for all."""
    path = Path(tempfile.gettempdir()) / f"perceptio-tests-{os.getpid()}.png"
    if not url.endswith((".png", ".jpg")):
        return url
    if not path.exists():
        picture = Image.new("RGB", (64, 48), (90, 120, 150))
        ImageDraw.Draw(picture).ellipse((10, 10, 40, 40), fill=(220, 60, 60))
        picture.save(path)
        atexit.register(path.unlink)
    return str(path)


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: one of transformers' own")
    # The version that is installed first; a checkout adds what its source distribution lacks.
    folders = [folder for folder in (CACHE, CHECKOUT) if folder and Path(folder).is_dir()]
    if not folders:
        return
    _package("transformers_tests", folders)
    for module, mixin in MIXINS.items():
        folder, _, _ = module.partition(".")
        _package(f"transformers_tests.{folder}", [Path(root) / folder for root in folders])
        if importlib.util.find_spec(f"transformers_tests.{module}") is None:
            _module(f"transformers_tests.{module}", **{mixin: _absent(mixin)})
    # Of these two the one holds values for configurations without parts, the other pictures to be downloaded.
    _package("transformers_tests.utils", [])
    _module("transformers_tests.utils.test_configuration_utils", config_common_kwargs={})
    _module("fetch_hub_objects_for_ci", url_to_local_path=_local_picture)
