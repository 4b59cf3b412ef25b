"""Tokens written as other tools' files: bytes as those tools write them, documents as our own reader finds them."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steep.core.errors import ConfigError, DataError
from steep.store.export_tokens import write_format
from steep.store.formats.megatron import write_index
from steep.store.reader import TokenStore, open_store

EOT = 50256
DOCUMENTS = [[464, 3290, 318, EOT], [1212, EOT], [33, 44, 55, 66, 77, EOT], [9, 10, EOT]]


def make_store(folder: Path, documents: list[list[int]], dtype: str = "<i4", name: str = "source") -> TokenStore:
    """A Megatron pair without a manifest."""
    folder.mkdir(exist_ok=True)
    np.array([token for document in documents for token in document], dtype).tofile(folder / f"{name}.bin")
    with open(folder / f"{name}.idx", "wb") as file:
        write_index(file, np.array([len(document) for document in documents]), np.dtype(dtype))
    return open_store(folder / f"{name}.bin")


def contents(store: TokenStore) -> list[list[int]]:
    return [store.document(number).tolist() for number in range(store.num_documents)]


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return make_store(tmp_path / "source", DOCUMENTS)


def test_nanogpt_bytes(store: TokenStore, tmp_path: Path) -> None:
    (path,) = write_format(store, tmp_path / "out", "nanogpt", eos_id=EOT)
    assert path == tmp_path / "out" / "train.bin"
    tokens = [token for document in DOCUMENTS for token in document]
    assert path.read_bytes() == struct.pack(f"<{len(tokens)}H", *tokens)


@pytest.mark.parametrize(
    ("vocabulary", "magic", "version", "code"), [(0, 20240520, 1, "H"), (70_000, 20240801, 7, "I")]
)
def test_llm_c_bytes(tmp_path: Path, vocabulary: int, magic: int, version: int, code: str) -> None:
    documents = [*DOCUMENTS, [vocabulary, EOT]]
    (path,) = write_format(make_store(tmp_path / "a", documents), tmp_path / "out", "llm_c", eos_id=EOT, bos_id=EOT)
    tokens = [token for document in documents for token in [EOT, *document[:-1]]]
    header = struct.pack("<256i", magic, version, len(tokens), *[0] * 253)
    assert path.read_bytes() == header + struct.pack(f"<{len(tokens)}{code}", *tokens)


@pytest.mark.parametrize(("vocabulary", "itemsize"), [(0, 2), (70_000, 4)])
def test_automodel_bytes_and_an_index_that_points_at_bos(tmp_path: Path, vocabulary: int, itemsize: int) -> None:
    documents = [*DOCUMENTS, [vocabulary, EOT]]
    out = tmp_path / "out"
    (path,) = write_format(make_store(tmp_path / "a", documents), out, "automodel", eos_id=EOT, bos_id=1)
    tokens = [token for document in documents for token in [1, *document]]  # EOS is another token, so it stays
    header = struct.pack("<256i", 278895051, 1, len(tokens), itemsize, *[0] * 252)
    assert path.read_bytes() == header + np.array(tokens, f"<u{itemsize}").tobytes()
    positions = np.fromfile(out / "train.bos.idx", "<i4")
    assert all(tokens[position] == 1 for position in positions)
    assert len(positions) == len(documents)
    assert sorted(file.name for file in out.iterdir()) == ["train.bin", "train.bos.idx"]
    said: list[str] = []
    read = open_store(out, bos_id=1, say=said.append)
    assert contents(read) == [[1, *document] for document in documents]
    assert not any("scanned" in message for message in said)


def test_megatron_without_a_manifest(store: TokenStore, tmp_path: Path) -> None:
    paths = write_format(store, tmp_path / "out", "megatron", shard_tokens=6)
    assert [path.name for path in paths] == [f"train_{number:06d}.bin" for number in range(3)]
    assert contents(open_store(tmp_path / "out")) == DOCUMENTS


@pytest.mark.parametrize("format", ["nanogpt", "llm_c", "automodel", "megatron"])
def test_shards_hold_whole_documents_and_no_more_than_asked(store: TokenStore, tmp_path: Path, format: str) -> None:
    paths = write_format(store, tmp_path / "out", format, shard_tokens=6, eos_id=EOT, name="fineweb_train")
    shards = [open_store(path, format=format, eos_id=EOT, bos_id=EOT) for path in paths]
    assert [shard.num_documents for shard in shards] == [2, 1, 1]
    assert [shard.num_tokens for shard in shards] == [6, 6, 3]
    assert paths[2].name == "fineweb_train_000002.bin"
    tiny = write_format(store, tmp_path / "tiny", format, shard_tokens=1, eos_id=EOT)
    assert len(tiny) == len(DOCUMENTS)  # a longer document has a shard of its own


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(3, 40), max_size=6), min_size=1, max_size=12),
    form=st.sampled_from(["nanogpt", "llm_c", "automodel", "megatron"]),
    ends=st.booleans(),
    begins=st.booleans(),
    same=st.booleans(),
    shard_tokens=st.integers(1, 30),
)
def test_any_documents_come_back(
    tmp_path_factory: pytest.TempPathFactory, documents, form, ends, begins, same, shard_tokens
) -> None:
    """With EOS or BOS, both or none in the source, and one token for both or two: the text's ids and the documents stay."""
    folder = tmp_path_factory.mktemp("round")
    bos, eos = (2, 2) if same else (1, 2)
    source = [[bos] * begins + document + [eos] * ends for document in documents]
    paths = write_format(
        make_store(folder / "a", source), folder / "out", form, shard_tokens=shard_tokens, eos_id=eos, bos_id=bos
    )
    read = open_store(paths, format=form, eos_id=None if form in ("llm_c", "automodel") else eos,
                      bos_id=bos if form in ("llm_c", "automodel") else None)  # fmt: skip
    found = contents(read)
    if form == "megatron":
        assert found == source
        return
    assert [[token for token in document if token > 2] for document in found] == documents
    if form == "nanogpt":
        assert all(document[-1] == eos for document in found)
    else:
        assert all(document[0] == bos for document in found)
        assert same or all((document[-1] == eos) == ends for document in found if len(document) > 1)


def test_from_one_foreign_format_to_another_and_back(store: TokenStore, tmp_path: Path) -> None:
    write_format(store, tmp_path / "a", "llm_c", eos_id=EOT)
    llm_c = open_store(tmp_path / "a", eos_id=EOT)
    write_format(llm_c, tmp_path / "b", "nanogpt")
    nanogpt = open_store(tmp_path / "b", eos_id=EOT)
    assert contents(nanogpt) == DOCUMENTS
    (again,) = write_format(nanogpt, tmp_path / "c", "llm_c")
    assert again.read_bytes() == (tmp_path / "a" / "train.bin").read_bytes()


def test_what_cannot_be_written_is_refused_and_leaves_nothing(store: TokenStore, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="'gpt': steep writes automodel, llm_c, megatron, nanogpt"):
        write_format(store, out, "gpt")
    with pytest.raises(ConfigError, match="shard_tokens=0"):
        write_format(store, out, "llm_c", shard_tokens=0)
    with pytest.raises(ConfigError, match="2,147,483,647"):
        write_format(store, out, "llm_c", shard_tokens=2**31)
    with pytest.raises(DataError, match="no end-of-text token is known"):
        write_format(store, out, "nanogpt")
    with pytest.raises(DataError, match=r"16-bit ids, and this tokenizer has 70,001.*llm_c or automodel"):
        write_format(make_store(tmp_path / "a", [[70_000]]), out, "nanogpt", eos_id=EOT)
    inside = make_store(tmp_path / "b", [[5, 2], [6, 2, 7, 2]])
    for form in ("nanogpt", "llm_c"):
        with pytest.raises(DataError, match="document 1 contains the token 2"):
            write_format(inside, out, form, eos_id=2)
    assert contents(open_store(write_format(inside, tmp_path / "kept", "megatron"))) == [[5, 2], [6, 2, 7, 2]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "kept", "source"]


def test_a_folder_with_something_else_is_left_alone(store: TokenStore, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_format(store, out, "automodel", eos_id=EOT, shard_tokens=6)
    with pytest.raises(DataError, match="overwrite"):
        write_format(store, out, "automodel", eos_id=EOT)
    write_format(store, out, "llm_c", eos_id=EOT, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["train.bin"]
    (out / "val.bin").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"val\.bin"):
        write_format(store, out, "llm_c", eos_id=EOT, overwrite=True)
    assert (out / "val.bin").read_bytes() == b"mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is not a folder"):
        write_format(store, tmp_path / "file", "llm_c", eos_id=EOT)


def test_a_store_without_documents_gives_an_empty_file(tmp_path: Path) -> None:
    empty = make_store(tmp_path / "a", [])
    for form in ("megatron", "nanogpt", "llm_c", "automodel"):
        (path,) = write_format(empty, tmp_path / form, form, eos_id=EOT)
        assert open_store(path, format=form).num_documents == 0


def test_progress_counts_every_token(store: TokenStore, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_format(store, tmp_path / "out", "llm_c", eos_id=EOT, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (store.num_tokens, store.num_tokens)


def test_many_documents_over_several_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2000, size=6000)
    tokens = rng.integers(3, 60_000, size=int(lengths.sum())).astype("<i4")
    tokens[np.cumsum(lengths) - 1] = 2
    tokens.tofile(tmp_path / "a.bin")
    with open(tmp_path / "a.idx", "wb") as file:
        write_index(file, lengths, np.dtype("<i4"))
    source = open_store(tmp_path / "a.bin")
    for form in ("nanogpt", "llm_c", "automodel"):
        paths = write_format(source, tmp_path / form, form, shard_tokens=1_000_000, eos_id=2)
        read = open_store(paths, format=form, eos_id=2, bos_id=2)
        assert np.array_equal(read.document_lengths, lengths)
        for number in rng.integers(0, 6000, size=50):
            given, found = source.document(int(number)), read.document(int(number))
            assert np.array_equal(found, given if form == "nanogpt" else np.roll(given, 1))


KILLED = """
import os, signal, sys
from pathlib import Path
from steep.store.export_tokens import write_format
from steep.store.reader import open_store

def progress(done, total):
    os.kill(os.getpid(), signal.SIGKILL)

write_format(open_store(sys.argv[1]), Path(sys.argv[2]), "llm_c", eos_id=2, progress=progress)
"""


def test_killed_it_leaves_no_folder_and_the_next_attempt_cleans_up(store: TokenStore, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "source" / "source.bin"), str(out)]
    assert subprocess.run(command, timeout=60, check=False).returncode == -9
    left = [path.name for path in tmp_path.iterdir()]
    assert "out" not in left
    assert any(re.fullmatch(r"\.partial-\d+-out", name) for name in left)
    running = tmp_path / f".partial-{os.getpid()}-other-out"
    running.mkdir()
    write_format(store, out, "llm_c", eos_id=EOT)
    assert sorted(path.name for path in tmp_path.iterdir()) == [running.name, "out", "source"]
