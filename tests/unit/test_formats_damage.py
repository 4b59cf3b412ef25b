"""Damaged token files: whatever the bytes, a store opens or says what is wrong with which file; nothing else comes out."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steep.core.errors import DataError
from steep.store.reader import is_store, open_store

HEADERS = [(20240520, 1, 0), (20240801, 7, 0), (278895051, 1, 2), (278895051, 1, 4), (20240522, 1, 0), (7, 7, 7)]


@contextlib.contextmanager
def only_errors_that_name(*files: str) -> Iterator[None]:
    message = None
    try:
        yield
    except DataError as error:
        message = str(error)
    assert message is None or any(file in message for file in files), message


def read_everything(path: Path) -> None:
    store = open_store(path, eos_id=2, bos_id=1)
    assert store.num_tokens == sum(len(store.document(number)) for number in range(store.num_documents))
    assert store.num_tokens == sum(len(shard.tokens) for shard in store.shards)
    assert len(store.fingerprint) == 32
    store.verify()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.sampled_from(HEADERS),
    count=st.integers(-(2**31), 2**31 - 1) | st.integers(0, 8),
    body=st.binary(max_size=24),
    index=st.none() | st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 12), max_size=5),
    cut=st.integers(0, 30),
)
def test_any_header_body_and_index(tmp_path_factory: pytest.TempPathFactory, header, count, body, index, cut) -> None:
    path = tmp_path_factory.mktemp("damage") / "a.bin"
    magic, version, itemsize = header
    content = struct.pack("<256i", magic, version, count, itemsize, *[0] * 252) + body
    path.write_bytes(content[: len(content) - cut])
    if index is not None:
        path.with_suffix(".bos.idx").write_bytes(np.array(index, dtype="<i4").tobytes())
    assert is_store(path)
    with only_errors_that_name("a.bin"):
        read_everything(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    position=st.integers(0, 97),
    value=st.integers(0, 255),
    cut=st.integers(0, 97),
    is_cut=st.booleans(),
    unit=st.sampled_from(["documents", "sequences"]),
)
def test_any_byte_of_a_megatron_index(
    tmp_path_factory: pytest.TempPathFactory, position, value, cut, is_cut, unit
) -> None:
    folder = tmp_path_factory.mktemp("damage")
    raw = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4) + struct.pack("<3i3q4q", 2, 3, 1, 0, 4, 10, 0, 1, 2, 3)
    damaged = bytearray(raw)
    damaged[position % len(raw)] = value
    (folder / "a.idx").write_bytes(bytes(damaged)[: -cut or None] if is_cut else bytes(damaged))
    (folder / "a.bin").write_bytes(bytes(range(12)))
    with only_errors_that_name("a.idx", "a.bin"):
        store = open_store(folder / "a", unit=unit)
        assert store.num_tokens == 12 // store.shards[0].tokens.itemsize
        for number in range(store.num_documents):
            store.document(number)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=20), index=st.binary(max_size=26) | st.lists(st.integers(0, 9), max_size=4))
def test_any_datatrove_index(tmp_path_factory: pytest.TempPathFactory, body, index) -> None:
    path = tmp_path_factory.mktemp("damage") / "a.ds"
    path.write_bytes(body)
    raw = index if isinstance(index, bytes) else np.array(index, dtype="<u8").tobytes()
    path.with_name("a.ds.index").write_bytes(raw)
    with only_errors_that_name("a.ds"):
        read_everything(path)
