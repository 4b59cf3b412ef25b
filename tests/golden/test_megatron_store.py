"""The bytes of Megatron's format: golden values measured on megatron-core, and files that Megatron could have written."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from steep.core.errors import DataError
from steep.store.formats.megatron import read_index, token_dtype, write_index
from steep.store.reader import open_store
from steep.store.writer import open_shard

GOLDEN_DOCUMENTS = [
    [100, 101, 102, 103, 0],
    [110, 111, 0],
    [120, 121, 122, 123, 124, 125, 0],
    [130, 131, 132, 0],
    [140, 141, 142, 143, 144, 0],
]


def write_documents(folder: Path, documents: list[list[int]], dtype: str = "uint16", name: str = "a") -> Path:
    with open_shard(folder, name, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.int64), str(document))
    return folder / name


def test_golden_bytes(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path, GOLDEN_DOCUMENTS)
    index, tokens = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    assert (len(index), hashlib.sha256(index).hexdigest()[:16]) == (142, "8bf057d2c201e2c8")
    assert (len(tokens), hashlib.sha256(tokens).hexdigest()[:16]) == (50, "e33782d42743f5ba")


def test_fifty_documents_have_the_measured_size_and_start(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path, [[1, 2]] * 50)
    index = prefix.with_suffix(".idx").read_bytes()
    assert len(index) == 1042
    assert index[:34].hex() == "4d4d4944494458000001000000000000000832000000000000003300000000000000"


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, "uint16"), (65_500, "int32"), (151_936, "int32")])
def test_dtype_follows_the_formats_rule(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_written_files_read_back_with_numpy_alone(tmp_path: Path, dtype: str) -> None:
    documents = [[7], [1, 2, 3], list(range(500)), [65_000]]
    prefix = write_documents(tmp_path, documents, dtype)
    raw = prefix.with_suffix(".idx").read_bytes()
    lengths = np.frombuffer(raw, "<i4", len(documents), 34)
    pointers = np.frombuffer(raw, "<i8", len(documents), 34 + 4 * len(documents))
    tokens = np.fromfile(prefix.with_suffix(".bin"), dtype)
    itemsize = np.dtype(dtype).itemsize
    read = [list(tokens[p // itemsize : p // itemsize + n]) for p, n in zip(pointers, lengths, strict=True)]
    assert read == documents


def foreign_index(lengths: list[int], boundaries: list[int], code: int, itemsize: int, modes: bool = False) -> bytes:
    pointers = [sum(lengths[:i]) * itemsize for i in range(len(lengths))]
    parts = [b"MMIDIDX\0\0", struct.pack("<QBQQ", 1, code, len(lengths), len(boundaries))]
    parts += [np.array(lengths, "<i4").tobytes(), np.array(pointers, "<i8").tobytes()]
    parts += [np.array(boundaries, "<i8").tobytes(), b"\0" * len(lengths) if modes else b""]
    return b"".join(parts)


def test_multimodal_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.idx").write_bytes(foreign_index([2, 3, 1], [0, 2, 2, 3], 4, 4, modes=True))
    np.arange(10, 16, dtype="<i4").tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a\.idx: is multimodal data"):
        open_store(tmp_path / "a")


def test_with_the_unit_sequences_each_sequence_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.idx").write_bytes(foreign_index([2, 0, 3, 1], [0, 3, 3, 4], 8, 2))
    np.arange(10, 16, dtype="<u2").tofile(tmp_path / "a.bin")
    documents, sequences = open_store(tmp_path / "a"), open_store(tmp_path / "a", unit="sequences")
    assert documents.document_lengths.tolist() == [5, 0, 1]
    assert sequences.document_lengths.tolist() == [2, 0, 3, 1]
    assert sequences.document_lengths.dtype == np.int64
    assert [sequences.document(i).tolist() for i in range(4)] == [[10, 11], [], [12, 13, 14], [15]]
    assert documents.fingerprint == sequences.fingerprint  # the same files


def test_an_index_of_several_blocks_is_checked_to_its_end(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(0, 9, size=600_000)
    boundaries = np.flatnonzero(np.arange(600_001) % 3 == 0)
    pointers = np.concatenate([[0], np.cumsum(lengths)])
    raw = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(lengths), len(boundaries))
    raw += lengths.astype("<i4").tobytes() + (pointers[:-1] * 2).astype("<i8").tobytes()
    (tmp_path / "a.idx").write_bytes(raw + boundaries.astype("<i8").tobytes())
    index = read_index(tmp_path / "a.idx")
    assert index.num_tokens == lengths.sum()
    assert np.array_equal(index.byte_starts, pointers[boundaries[:-1]] * 2)
    assert np.array_equal(index.lengths, np.add.reduceat(lengths, boundaries[:-1]))
    sequences = read_index(tmp_path / "a.idx", "sequences")
    assert np.array_equal(sequences.lengths, lengths)
    for array, last, message in ((pointers[:-1] * 2, -1, "do not follow"), (boundaries, -2, "not in order")):
        changed = array.copy()
        changed[last] = changed[last - 1] - 2
        wrong = raw.replace(array.astype("<i8").tobytes(), changed.astype("<i8").tobytes())
        wrong += (changed if message == "not in order" else boundaries).astype("<i8").tobytes()
        (tmp_path / "b.idx").write_bytes(wrong)
        with pytest.raises(DataError, match=message):
            read_index(tmp_path / "b.idx")


def test_foreign_store_with_several_sequences_per_document_and_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "corpus.v1_text_document.idx").write_bytes(foreign_index([2, 3, 1], [0, 2, 2, 3], 4, 4))
    np.arange(10, 16, dtype="<i4").tofile(tmp_path / "corpus.v1_text_document.bin")
    for name in ("corpus.v1_text_document", "corpus.v1_text_document.bin", "corpus.v1_text_document.idx"):
        store = open_store(tmp_path / name)
        assert list(store.document_lengths) == [5, 0, 1]
        assert [store.document(i).tolist() for i in range(3)] == [[10, 11, 12, 13, 14], [], [15]]
    assert store.max_token_id == 15
    assert store.text_bytes is None
    assert store.tokenizer_fingerprint is None
    assert store.eos_id is None
    assert len(set(store.content_hashes.tolist())) == 3


def test_a_folder_of_pairs_is_one_store_in_sorted_order(tmp_path: Path) -> None:
    write_documents(tmp_path, [[3]], name="b")
    write_documents(tmp_path, [[1], [2]], name="a")
    for sidecar in tmp_path.glob("*.npy"):
        sidecar.unlink()
    store = open_store(tmp_path)
    assert [store.document(i).tolist() for i in range(3)] == [[1], [2], [3]]


def test_fingerprint_of_a_foreign_store_follows_its_content(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path, GOLDEN_DOCUMENTS)
    before = open_store(prefix).fingerprint
    assert open_store(prefix).fingerprint == before
    raw = bytearray(prefix.with_suffix(".bin").read_bytes())
    raw[0] ^= 1
    prefix.with_suffix(".bin").write_bytes(raw)
    assert open_store(prefix).fingerprint != before


@pytest.mark.parametrize("cut", [1, 20, 41, 120])
def test_a_shortened_index_is_refused(tmp_path: Path, cut: int) -> None:
    prefix = write_documents(tmp_path, GOLDEN_DOCUMENTS)
    path = prefix.with_suffix(".idx")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match=r"a\.idx"):
        open_store(prefix)


@pytest.mark.parametrize("change", [-2, 2])
def test_a_bin_of_another_size_is_refused(tmp_path: Path, change: int) -> None:
    prefix = write_documents(tmp_path, GOLDEN_DOCUMENTS)
    path = prefix.with_suffix(".bin")
    raw = path.read_bytes()
    path.write_bytes(raw[:change] if change < 0 else raw + b"\0" * change)
    with pytest.raises(DataError, match=r"a\.bin: has \d+ bytes.*25 tokens"):
        open_store(prefix)


@pytest.mark.parametrize(
    ("boundaries", "code", "message"),
    [
        ([0, 2, 1, 3], 4, "not in order"),
        ([1, 3], 4, "not in order"),
        ([0, 2], 4, "not in order"),
        ([0, 3], 7, "integer dtype"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, boundaries: list[int], code: int, message: str) -> None:
    path = tmp_path / "x.idx"
    path.write_bytes(foreign_index([2, 3, 1], boundaries, code, 4))
    with pytest.raises(DataError, match=message):
        read_index(path)


def test_sequences_out_of_place_are_refused(tmp_path: Path) -> None:
    raw = bytearray(foreign_index([2, 3], [0, 1, 2], 4, 4))
    raw[34 + 8 : 34 + 16] = struct.pack("<q", 400)
    (tmp_path / "x.idx").write_bytes(raw)
    with pytest.raises(DataError, match="do not follow each other"):
        read_index(tmp_path / "x.idx")


def test_a_document_too_long_for_the_format_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "x.idx").open("wb") as file, pytest.raises(DataError, match="longer than the format allows"):
        write_index(file, np.array([2**31]), np.dtype(np.uint16))


def test_an_id_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not fit uint16"):
        write_documents(tmp_path, [[1], [70_000]])
    assert list(tmp_path.iterdir()) == []
