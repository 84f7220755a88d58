"""A pickle is read when it holds plain data, and else refused before it does anything."""

import collections
import os
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from referring_samples import (
    ref,
)

from perceptio.data.record import DataError
from perceptio.data.sources.restricted_pickle import UnsafePickleError, read_plain_pickle


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


HARMFUL = {
    "os.system": pickle.dumps([Malicious()], 2),
    "os.system, protocol 0": pickle.dumps([Malicious()], 0),
    "os.system, protocol 4": pickle.dumps([Malicious()], 4),
    "builtins.eval": b"cbuiltins\neval\n(S'1'\ntR.",
    "an instance": b"(ios\nsystem\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "a harmless class": pickle.dumps(collections.OrderedDict(a=1), 2),
    "a persistent id": b"Pabc\n.",
    "an array": pickle.dumps(np.zeros(3), 2),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_pickle_that_could_run_something_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "refs(unc).p").write_bytes(HARMFUL[name])
    with pytest.raises(UnsafePickleError, match="expected lists, dictionaries, texts and numbers alone"):
        read_plain_pickle(tmp_path / "refs(unc).p")
    assert not (tmp_path / "owned").exists()


BROKEN = {
    "empty": b"",
    "text": b"Not Found",
    "cut": pickle.dumps([ref(1, 1, 1, "a")], 2)[:-9],
    "stack": b"\x80\x02aa.",
    "a number of the table of objects that would fill the memory": b"\x80\x02Kar\xff\xff\xff\x7f.",
    "a text of four gigabytes": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a.",
    "bytes of an exabyte": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"a.",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_pickle_is_named(tmp_path, name):
    (tmp_path / "refs.p").write_bytes(BROKEN[name])
    with pytest.raises(DataError, match="refs.p.*[Ff]etch"):
        read_plain_pickle(tmp_path / "refs.p")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back_whole(tmp_path, protocol):
    shared = ["x", "ü"]
    data = [{"a": 1, "b": [2**40, -1.5, None, True], "c": shared, "d": (shared, "ü" * 300)}, {}, []]
    (tmp_path / "a.p").write_bytes(pickle.dumps(data, protocol))
    assert read_plain_pickle(tmp_path / "a.p") == data


def test_text_of_python_2_is_read_as_utf_8(tmp_path):
    (tmp_path / "a.p").write_bytes(b"\x80\x02]U\x05caf\xc3\xa9a.")
    assert read_plain_pickle(tmp_path / "a.p") == ["café"]


def test_a_file_that_is_too_long_or_missing_is_named(tmp_path):
    (tmp_path / "a.p").write_bytes(pickle.dumps(["x" * 1000]))
    with pytest.raises(DataError, match="more than 100 bytes"):
        read_plain_pickle(tmp_path / "a.p", largest=100)
    with pytest.raises(DataError, match="b.p.*cannot be opened"):
        read_plain_pickle(tmp_path / "b.p")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(PLAIN, st.integers(0, 5), st.randoms())
def test_plain_data_is_read_and_spoilt_bytes_of_it_are_named(tmp_path_factory, data, protocol, draw):
    path = tmp_path_factory.mktemp("pickle") / "a.p"
    whole = pickle.dumps(data, protocol)
    path.write_bytes(whole)
    if not _has_bytes(data) or protocol > 2:  # before protocol 3 bytes are a call of a codec
        assert read_plain_pickle(path) == data
    spoilt_bytes = bytearray(whole)
    for _ in range(draw.randint(1, 4)):
        spoilt_bytes[draw.randrange(len(whole))] = draw.randrange(256)
    path.write_bytes(spoilt_bytes)
    try:
        read_plain_pickle(path)
    except DataError as error:
        assert "a.p" in str(error)


def _has_bytes(data) -> bool:
    inner = [*data, *data.values()] if isinstance(data, dict) else data if isinstance(data, (list, tuple)) else []
    return isinstance(data, bytes) or any(map(_has_bytes, inner))
