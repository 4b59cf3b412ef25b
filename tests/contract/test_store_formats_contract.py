"""What every format of token files promises: it finds its own files and no others', reads them, and reads back what it writes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from steep.core.errors import DataError
from steep.store.detect import token_file
from steep.store.export_tokens import write_format
from steep.store.formats import Evidence, StoreFormat, WritableFormat, formats, writable_formats
from steep.store.reader import TokenStore, is_store, open_store

EOT = 50256
DOCUMENTS = [[464, 3290, EOT], [1212, EOT], [33, 44, 55, 66, EOT]]


def flat(documents: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(documents))


def write_datatrove(path: Path) -> Path:
    path.with_suffix(".ds").write_bytes(np.array(flat(DOCUMENTS), "<u2").tobytes())
    ends = np.cumsum([len(document) for document in DOCUMENTS])
    path.with_suffix(".ds.index").write_bytes(ends.astype("<u8").tobytes())
    return path.with_suffix(".ds")


READ_ONLY: dict[str, Callable[[Path], Path]] = {"datatrove": write_datatrove}
"""How the files of a format come to be that steep does not write. A new one of these adds a line here."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return open_store(write_datatrove(tmp_path_factory.mktemp("source") / "a.bin"), eos_id=EOT)


@pytest.fixture(scope="module")
def files(source: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A token file of every format, each in its own folder."""
    folder = tmp_path_factory.mktemp("formats")
    found = {name: write_format(source, folder / name, name, eos_id=EOT)[0] for name in writable_formats()}
    for name, write in READ_ONLY.items():
        (folder / name).mkdir()
        found[name] = write(folder / name / "train.bin")
    return found


def contents(store: TokenStore) -> list[list[int]]:
    return [store.document(number).tolist() for number in range(store.num_documents)]


def test_every_format_is_tried_here(files: dict[str, Path]) -> None:
    assert sorted(files) == sorted(formats())


@pytest.mark.parametrize("name", formats())
def test_it_has_what_the_protocol_promises(name: str) -> None:
    protocol = WritableFormat if name in writable_formats() else StoreFormat
    found = formats()[name]
    for attribute in ("ENDINGS", "NAMES_SPLITS", *(("BOUNDARY_FIRST",) if protocol is WritableFormat else ())):
        assert hasattr(found, attribute)
    for member in ("sniff", "accepts", "open", *(("token_dtype", "write") if protocol is WritableFormat else ())):
        promised = list(inspect.signature(getattr(protocol, member)).parameters)[1:]  # without self
        assert list(inspect.signature(getattr(found, member)).parameters) == promised


@pytest.mark.parametrize("name", formats())
def test_the_files_have_the_endings_that_the_format_names(name: str, files: dict[str, Path]) -> None:
    endings = formats()[name].ENDINGS
    assert files[name].name.endswith(endings[0])
    assert all(path.name.endswith(endings) for path in files[name].parent.iterdir())


@pytest.mark.parametrize("name", formats())
def test_it_takes_its_own_files_and_no_others(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    found = formats()[name]
    sniffed = found.sniff(files[name])
    assert sniffed is not None
    assert found.accepts(name)
    for path in files[name].parent.iterdir():
        assert token_file(path) == (files[name], name)
    for other, path in files.items():
        taken = found.sniff(path)
        own = formats()[other].sniff(path)
        assert own is not None
        assert other == name or taken is None or (taken.evidence == Evidence.NAME and own.evidence > Evidence.NAME)
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "half.idx").write_bytes(b"")
    for path in (tmp_path / "text.txt", tmp_path / "half.idx", tmp_path, tmp_path / "absent.bin"):
        assert found.sniff(path) is None


@pytest.mark.parametrize("name", formats())
@pytest.mark.parametrize("format", ["auto", "named"])
def test_it_opens_its_own_files(name: str, format: str, files: dict[str, Path]) -> None:
    for path in (files[name], files[name].parent):
        assert is_store(path)
        store = open_store(path, format=name if format == "named" else format, eos_id=EOT)
        assert {shard.format for shard in store.shards} == {name}
        assert store.num_documents == len(DOCUMENTS)
        assert sorted(flat(contents(store))) == sorted(flat(DOCUMENTS))
        assert store.max_token_id == EOT


@pytest.mark.parametrize("name", formats())
def test_a_file_that_was_cut_short_is_named(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    for path in files[name].parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    cut = tmp_path / files[name].name
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(DataError, match=re.escape(cut.name)):
        open_store(cut, eos_id=EOT)


@pytest.mark.parametrize("name", writable_formats())
@pytest.mark.parametrize("largest", [EOT, 65_535])
def test_it_reads_back_what_it_writes(name: str, largest: int, tmp_path: Path) -> None:
    writable = writable_formats()[name]
    dtype = writable.token_dtype(largest + 1)
    assert np.iinfo(dtype).max >= largest
    documents = [[2, 5, largest], [2], [2, 9]] if writable.BOUNDARY_FIRST else [[5, largest, 2], [2], [9, 2]]
    blocks = [
        (np.array([len(document) for document in part]), np.array(flat(part)))
        for part in (documents[:2], documents[2:])
    ]
    writable.write(tmp_path / "a", dtype, iter(blocks))
    store = open_store(tmp_path / "a.bin", format=name, eos_id=2)
    assert contents(store) == documents
    assert store.shards[0].tokens.dtype == dtype
    writable.write(tmp_path / "empty", dtype, ())
    assert open_store(tmp_path / "empty.bin", format=name, eos_id=2).num_documents == 0
