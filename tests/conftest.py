"""What the tests share: no network, and complete folders with small random weights."""

import os
import socket

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import pytest
from hypothesis import settings
from PIL import Image, ImageDraw

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

LOOPBACK = ("127.", "::1", "localhost", "/")


# With several workers the files that take longest go first, so that none of them is left to one worker at the end.
LONGEST = ("test_environment", "test_overfit", "test_readme", "test_job", "test_docs", "test_train_processes")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A connection that leaves this machine fails the test that opened it."""
    connect = socket.socket.connect

    def guarded(self, address):
        host = address[0] if isinstance(address, tuple) else str(address)
        if not str(host).startswith(LOOPBACK):
            pytest.fail(f"a connection to {address} was opened")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """tiny_folder(family) is the path of a complete untrained folder, built once."""
    from perceptio.hub.untrained import build_untrained

    built = {}

    def folder(family: str = "qwen2"):
        if family not in built:
            built[family] = tmp_path_factory.mktemp(f"tiny-{family}") / "model"
            build_untrained(built[family], family)
        return built[family]

    return folder


@pytest.fixture
def picture() -> Image.Image:
    """Two discs on grey, 96 × 64."""
    image = Image.new("RGB", (96, 64), (120, 120, 120))
    draw = ImageDraw.Draw(image)
    draw.ellipse((8, 16, 40, 48), fill=(200, 40, 40))
    draw.ellipse((56, 8, 88, 40), fill=(40, 60, 200))
    return image
