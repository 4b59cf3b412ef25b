"""Files as nanoGPT, llm.c, Automodel and datatrove write them, made here with struct and numpy from their formats, read in place.

Expected documents are the lists that the files were made from; the Automodel index is the one measured on its own writer.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from steep.core.errors import DataError
from steep.store.reader import TokenStore, is_store, open_store

EOT = 50256
DOCUMENTS = [[464, 3290, 318], [1212], [33, 44, 55, 66, 77], [9, 10]]


def flat(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in document]


def appended(documents: list[list[int]], eot: int = EOT) -> list[list[int]]:
    return [[*document, eot] for document in documents]


def prepended(documents: list[list[int]], eot: int = EOT) -> list[list[int]]:
    return [[eot, *document] for document in documents]


def write_nanogpt(path: Path, tokens: list[int]) -> Path:
    """data/openwebtext/prepare.py: a memmap of uint16."""
    path.write_bytes(b"".join(struct.pack("<H", token) for token in tokens))
    return path


def write_headed(path: Path, tokens: list[int], magic: int, version: int, itemsize: int, *, says: int = 0) -> Path:
    """llm.c's data_common.py write_datafile, and Automodel's processor, which also says the bytes per token."""
    header = [magic, version, len(tokens), says] + [0] * 252
    content = struct.pack("<256i", *header) + np.array(tokens, dtype=f"<u{itemsize}").tobytes()
    path.write_bytes(content)
    return path


def write_llm_c(path: Path, tokens: list[int], itemsize: int = 2) -> Path:
    return write_headed(path, tokens, *((20240520, 1) if itemsize == 2 else (20240801, 7)), itemsize)


def write_automodel(path: Path, tokens: list[int], itemsize: int = 2) -> Path:
    return write_headed(path, tokens, 278895051, 1, itemsize, says=itemsize)


def write_bos_index(path: Path, values: list[int]) -> None:
    path.with_suffix(".bos.idx").write_bytes(np.array(values, dtype="<i4").tobytes())


def heard(path: Path, **options) -> tuple[TokenStore, list[str]]:
    """The store, and what is said while it is opened."""
    said: list[str] = []
    return open_store(path, **options, say=said.append), said


def contents(store: TokenStore) -> list[list[int]]:
    return [store.document(number).tolist() for number in range(store.num_documents)]


def test_nanogpt_documents_end_with_the_end_of_text(tmp_path: Path) -> None:
    path = write_nanogpt(tmp_path / "train.bin", flat(appended(DOCUMENTS)))
    store, said = heard(path, eos_id=EOT, bos_id=EOT)
    assert contents(store) == appended(DOCUMENTS)
    assert (store.eos_id, store.bos_id) == (EOT, None)
    assert store.max_token_id == EOT
    assert store.text_bytes is None
    assert any("16-bit" in message for message in said)
    assert any(f"each ends with token {EOT}" in message for message in said)
    assert not any("16-bit" in message for message in heard(path, format="nanogpt", eos_id=EOT)[1])
    out = np.empty(3, dtype=np.int32)
    store.read(2, 1, 3, out)
    assert out.tolist() == [44, 55, 66]
    with pytest.raises(IndexError):
        store.read(2, 4, 3, out)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_llm_c_documents_begin_with_the_end_of_text(tmp_path: Path, itemsize: int) -> None:
    eot = EOT if itemsize == 2 else 128_000
    path = write_llm_c(tmp_path / "fineweb_train_000001.bin", flat(prepended(DOCUMENTS, eot)), itemsize)
    store = open_store(path, eos_id=eot)
    assert contents(store) == prepended(DOCUMENTS, eot)
    assert (store.eos_id, store.bos_id) == (None, eot)
    assert store.shards[0].tokens.dtype == np.dtype(f"<u{itemsize}")
    assert contents(open_store(path)) == contents(store)  # the tokenizer of both kinds is known by habit
    assert any("is not known" in message for message in heard(path)[1])


@pytest.mark.parametrize("write", [write_nanogpt, write_llm_c, write_automodel])
@pytest.mark.parametrize(("bos", "eos"), [(None, 2), (1, 2), (2, 2)])
def test_the_first_and_last_tokens_say_on_which_side_the_boundary_stands(
    tmp_path: Path, write, bos: int | None, eos: int
) -> None:
    documents = [[11, 12], [13], [14, 15, 16]]
    ends = appended(documents, eos)
    begins = prepended(documents, eos if bos is None else bos)
    for name, expected in (("ends", ends), ("begins", begins)):
        store = open_store(write(tmp_path / f"{name}.bin", flat(expected)), eos_id=eos, bos_id=bos)
        assert contents(store) == expected, name
    if bos == 1:
        both = [[bos, *document, eos] for document in documents]
        assert contents(open_store(write(tmp_path / "both.bin", flat(both)), eos_id=eos, bos_id=bos)) == both


def test_shards_that_cut_documents_follow_the_first_shard(tmp_path: Path) -> None:
    """fineweb.py fills shards to the last token, so all but the first begin inside a document."""
    tokens = flat(prepended([[7] * 50, [8] * 3, [9] * 60], EOT))
    for number, begin in enumerate(range(0, len(tokens), 40)):
        write_llm_c(tmp_path / f"fineweb_train_{number:06d}.bin", tokens[begin : begin + 40])
    store, said = heard(tmp_path, eos_id=EOT)
    assert flat(contents(store)) == tokens
    assert contents(store)[1:3] == [[7] * 11, [EOT, 8, 8, 8]]
    assert [len(document) for document in contents(store)] == [40, 11, 4, 25, 36]
    assert len(said) == 1
    alone = open_store(tmp_path / "fineweb_train_000001.bin", eos_id=EOT)
    assert contents(alone)[0] == [7] * 11  # llm.c's convention decides when the first token does not


def test_a_file_without_the_boundary_token_is_one_document_and_says_so(tmp_path: Path) -> None:
    store, said = heard(write_nanogpt(tmp_path / "shakespeare.bin", [5, 6, 7, 8]), eos_id=2, bos_id=1)
    assert contents(store) == [[5, 6, 7, 8]]
    assert any("no end-of-text token (1 or 2), so it is one document" in message for message in said)
    assert (store.eos_id, store.bos_id) == (None, None)


def test_what_stands_outside_the_boundaries_is_kept(tmp_path: Path) -> None:
    tail = open_store(write_nanogpt(tmp_path / "a.bin", [5, 6, 2, 7, 2, 8, 9]), eos_id=2)
    assert contents(tail) == [[5, 6, 2], [7, 2], [8, 9]]
    head = open_store(write_automodel(tmp_path / "b.bin", [5, 6, 1, 7, 1, 1]), bos_id=1)
    assert contents(head) == [[5, 6], [1, 7], [1], [1]]


MEASURED_INDEX = [1024, 1032, 1038]
"""What Automodel's writer stores for [9,1,2,3] [9,4,5] [9,6] as u16: byte positions."""


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([0, 4, 7], None),
        (MEASURED_INDEX, "byte positions, as Automodel's writer stores them"),
        ([0, 4, 8], "scanned"),
        ([0, 4, 70], "scanned"),
        ([-4, 4, 7], "scanned"),
        ([0, 7, 4], "scanned"),
        ([1024, 1033, 1038], "scanned"),
        ([], "scanned"),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_automodels_index_is_believed_only_where_it_points_at_bos(
    tmp_path: Path, values: list[int], says: str | None, known: bool
) -> None:
    documents = [[9, 1, 2, 3], [9, 4, 5], [9, 6]]
    path = write_automodel(tmp_path / "a.bin", flat(documents))
    write_bos_index(path, values)
    store, said = heard(path, bos_id=9 if known else None)
    assert contents(store) == documents
    found = [message for message in said if "a.bos.idx" in message]
    assert bool(found) == (says is not None)
    assert says is None or says in found[0]


def test_automodels_index_of_four_byte_ids_and_of_the_older_header(tmp_path: Path) -> None:
    documents = [[9, 100_000], [9, 4, 5], [9]]
    path = write_automodel(tmp_path / "a.bin", flat(documents), itemsize=4)
    write_bos_index(path, [1024, 1024 + 8, 1024 + 20])
    assert contents(open_store(path, bos_id=9)) == documents
    old = write_llm_c(tmp_path / "b.bin", [9, 1, 9, 2, 3])
    write_bos_index(old, [0, 2])
    for name in ("auto", "automodel", "llm_c"):
        assert contents(open_store(old, bos_id=9, format=name)) == [[9, 1], [9, 2, 3]]
    assert open_store(tmp_path / "b.bos.idx", bos_id=9).num_documents == 2


@pytest.mark.parametrize(("itemsize", "name"), [(2, "gpt2"), (4, "llama3")])
def test_datatroves_index_holds_the_ends_of_documents(tmp_path: Path, itemsize: int, name: str) -> None:
    path = tmp_path / f"00000_{name}.ds"
    path.write_bytes(np.array(flat(DOCUMENTS), dtype=f"<u{itemsize}").tobytes())
    ends = np.cumsum([len(document) for document in DOCUMENTS])
    (tmp_path / f"{path.name}.index").write_bytes(ends.astype("<u8").tobytes())
    (tmp_path / f"{path.name}.metadata").write_text(f"{name}|{itemsize}\n{ends[-1]}\n")
    for given in (path, tmp_path / f"{path.name}.index", tmp_path):
        assert contents(open_store(given)) == DOCUMENTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"\.ds: has .* bytes, but"):
        open_store(path)


@pytest.mark.parametrize("change", [-1, -2, 1, 2])
@pytest.mark.parametrize("write", [write_llm_c, write_automodel])
def test_a_size_that_disagrees_with_the_header_is_refused(tmp_path: Path, change: int, write) -> None:
    path = write(tmp_path / "a.bin", flat(prepended(DOCUMENTS)))
    raw = path.read_bytes()
    path.write_bytes(raw[:change] if change < 0 else raw + b"\0" * change)
    with pytest.raises(DataError, match=r"a\.bin: has [\d,]+ bytes, but its header says 15 tokens of 2 bytes = 1,054"):
        open_store(path)


def test_files_that_are_something_else_are_refused_by_name(tmp_path: Path) -> None:
    wrong = {
        "evaluation.bin": write_headed(tmp_path / "evaluation.bin", [1, 2], 20240522, 1, 2),
        "version.bin": write_headed(tmp_path / "version.bin", [1, 2], 20240520, 3, 2),
        "bytes.bin": write_headed(tmp_path / "bytes.bin", [1, 2], 278895051, 1, 2, says=3),
    }
    messages = {"evaluation.bin": "evaluation", "version.bin": "version 3", "bytes.bin": "3 bytes per token"}
    (tmp_path / "odd.bin").write_bytes(b"\1\2\3")
    (tmp_path / "a_text_document.bin").write_bytes(b"\1\2\3\4")
    np.arange(40_000, 41_000, dtype="<i4").tofile(tmp_path / "wide.bin")
    (tmp_path / "short.bin").write_bytes(struct.pack("<3i", 20240801, 7, 0))
    messages |= {"odd.bin": "odd number", "a_text_document.bin": "a_text_document.idx is missing", "wide.bin": "32-bit ids",
                 "short.bin": "header says"}  # fmt: skip
    for name, message in messages.items():
        assert is_store(wrong.get(name, tmp_path / name))
        with pytest.raises(DataError, match=message):
            open_store(tmp_path / name)
    for name, start in {"weights.bin": b"PK\3\4", "old.bin": b"\x80\x02\x8a\x0a", "text.bin.gz": b"\x1f\x8b"}.items():
        (tmp_path / name).write_bytes(start + bytes(100))
        assert not is_store(tmp_path / name)
        with pytest.raises(DataError, match="is not a token store"):
            open_store(tmp_path / name)
    assert (
        open_store(tmp_path / "weights.bin", format="nanogpt").document(0)[0] == 0x4B50
    )  # whoever asks for it gets it
    assert open_store(tmp_path / "wide.bin", format="nanogpt", eos_id=0).num_tokens == 2000
    with pytest.raises(DataError, match="format is llm_c, but the file is nanogpt"):
        open_store(tmp_path / "wide.bin", format="llm_c")
    with pytest.raises(DataError, match="format is megatron"):
        open_store(tmp_path / "wide.bin", format="megatron")
    (tmp_path / "half.idx").write_bytes(b"")
    with pytest.raises(DataError, match=r"half\.bin is missing beside it"):
        open_store(tmp_path / "half.idx")


def test_an_unfinished_automodel_file_says_why(tmp_path: Path) -> None:
    path = write_automodel(tmp_path / "a.bin", [9, 1, 2])
    raw = bytearray(path.read_bytes())
    raw[8:12] = bytes(4)
    path.write_bytes(raw)
    with pytest.raises(DataError, match="count is written last"):
        open_store(path)


@pytest.mark.parametrize(("magic", "version", "itemsize"), [(20240520, 1, 2), (20240801, 7, 4), (278895051, 1, 4)])
def test_more_than_four_gigabytes_and_a_count_that_wrapped_around(
    tmp_path: Path, magic: int, version: int, itemsize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse file of 2^31 + 1000 tokens: its header's signed count is negative."""
    monkeypatch.setenv("STEEP_CACHE", str(tmp_path / "cache"))
    num_tokens, last = 2**31 + 1000, 2**31 + 990
    path = tmp_path / "train.bin"
    with open(path, "wb") as file:
        file.write(struct.pack("<256i", magic, version, num_tokens - 2**32, itemsize, *[0] * 252))
        file.write(np.array([7, 40], dtype=f"<u{itemsize}").tobytes())
        file.seek(1024 + last * itemsize)
        file.write(np.array([7, 41, 42], dtype=f"<u{itemsize}").tobytes())
        file.truncate(1024 + num_tokens * itemsize)
    store = open_store(path, bos_id=7)
    assert store.document_lengths.tolist() == [last, 10]
    assert store.num_tokens == num_tokens
    out = np.empty(3, dtype=np.int64)
    store.read(1, 0, 3, out)
    assert out.tolist() == [7, 41, 42]
    assert store.max_token_id == 42
    write_bos_index(path, [0, last - 2**32])
    indexed, said = heard(path, bos_id=7)
    assert indexed.document_lengths.tolist() == [last, 10]
    assert indexed.fingerprint == store.fingerprint
    assert not any("scanned" in message for message in said)


def test_a_folder_of_shards_is_one_store_in_sorted_order_whatever_stands_beside_them(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        write_nanogpt(tmp_path / f"train_{number}.bin", [10 + number, 2])
    (tmp_path / "prepare.py").write_text("print()")
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04")
    store, said = heard(tmp_path, eos_id=2)
    assert contents(store) == [[10, 2], [11, 2], [12, 2]]
    assert any("train_0.bin and 2 more: has no header" in message for message in said)
    write_nanogpt(tmp_path / "val_0.bin", [99, 2])
    with pytest.raises(DataError, match=r"held-out files \(val_0\.bin\).*\*train\*"):
        open_store(tmp_path, eos_id=2)
    (tmp_path / "notes.txt").write_text("text")
    assert not is_store(tmp_path)


def test_with_the_format_named_no_file_of_a_folder_is_passed_over(tmp_path: Path) -> None:
    """0x0280 and 0x8b1f begin pickles and gzip files, and are ids."""
    for number, first in enumerate((0x0280, 0x8B1F, 5)):
        write_nanogpt(tmp_path / f"{number}.bin", [first, 2])
    (tmp_path / "notes.txt").write_text("not tokens")
    assert contents(open_store(tmp_path, format="nanogpt", eos_id=2)) == [[0x0280, 2], [0x8B1F, 2], [5, 2]]
    write_llm_c(tmp_path / "3.bin", [2, 7])
    with pytest.raises(DataError, match=r"0\.bin: format is llm_c, but the file is nanogpt"):
        open_store(tmp_path, format="llm_c")


def test_files_of_different_formats_join_in_the_order_given(tmp_path: Path) -> None:
    first = write_llm_c(tmp_path / "a.bin", [EOT, 1, EOT, 2], itemsize=4)
    second = write_nanogpt(tmp_path / "b.bin", [3, EOT, 4, EOT])
    store = open_store([second, first], eos_id=EOT)
    assert contents(store) == [[3, EOT], [4, EOT], [EOT, 1], [EOT, 2]]
    assert (store.eos_id, store.bos_id) == (None, None)  # not the same for all


def test_every_change_of_the_files_changes_the_fingerprint(tmp_path: Path) -> None:
    tokens = flat(prepended(DOCUMENTS))
    paths = [write_llm_c(tmp_path / f"{name}.bin", tokens) for name in "abc"]
    write_llm_c(paths[1], [*tokens[:-1], 3])
    write_llm_c(paths[2], [*tokens[:-1], 4])

    def seen(given: list[Path]) -> str:
        return open_store(given, eos_id=EOT).fingerprint

    before = seen(paths)
    os.utime(paths[0], (1, 1))
    assert seen(paths) == before
    others = [seen(paths[:2]), seen(paths[::-1]), seen([paths[0], paths[0], paths[2]])]
    write_llm_c(paths[2], tokens[:-1])
    others.append(seen(paths))
    assert len({before, *others}) == 5
    names = open_store(paths, eos_id=EOT).file_fingerprints
    assert list(names) == [str(path) for path in paths]
    assert len(set(names.values())) == 3


def test_a_change_in_the_middle_that_moves_a_boundary_is_noticed(tmp_path: Path) -> None:
    tokens = np.full(3 << 20, 5, dtype=np.uint16)
    tokens[[0, 1_500_000]] = 2
    moved = tokens.copy()
    moved[[1_500_000, 1_500_001]] = 5, 2
    prints = []
    for content in (tokens, moved):
        content.tofile(tmp_path / "a.bin")
        prints.append(open_store(tmp_path / "a.bin", eos_id=2).fingerprint)
    assert prints[0] != prints[1]


def test_where_documents_begin_is_remembered_outside_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    tokens = np.random.default_rng(0).integers(3, 60_000, size=40_000_000, dtype=np.uint16)
    tokens[::1000] = 2
    tokens.tofile(data / "train.bin")
    data.chmod(0o555)
    try:
        store = open_store(data / "train.bin", eos_id=2, cache_directory=tmp_path / "cache")
        (memory,) = (tmp_path / "cache" / "scanned").iterdir()
        again = open_store(data / "train.bin", eos_id=2, cache_directory=tmp_path / "cache")
        assert store.num_documents == 40_000
        assert np.array_equal(again.document_lengths, store.document_lengths)
        assert again.max_token_id == tokens.max()
        assert open_store(data / "train.bin", eos_id=2, cache_directory=tmp_path / "cache").max_token_id == tokens.max()
        changed = np.load(memory)
        np.save(memory, changed[::2])
        assert open_store(data / "train.bin", eos_id=2, cache_directory=tmp_path / "cache").num_documents == 20_000
        memory.write_bytes(memory.read_bytes()[:200])  # damaged: scanned again
        assert open_store(data / "train.bin", eos_id=2, cache_directory=tmp_path / "cache").num_documents == 40_000
        blocked = tmp_path / "file"
        blocked.write_text("")
        assert open_store(data / "train.bin", eos_id=2, cache_directory=blocked).num_documents == 40_000
        (data / "train.bin").chmod(0o644)
        with open(data / "train.bin", "r+b") as file:  # changed in place: the memory does not hold any more
            file.write(np.array([9], dtype="<u2").tobytes())
        assert open_store(data / "train.bin", eos_id=2, cache_directory=tmp_path / "cache").num_documents == 40_000
        assert len(list((tmp_path / "cache" / "scanned").iterdir())) == 3  # two scans, and the largest id of the first
    finally:
        data.chmod(0o755)


def test_zero_is_a_boundary_like_any_other_in_a_sparse_file(tmp_path: Path) -> None:
    """SmolLM2's end of text is 0: a hole reads as a run of them, as it would if it had been written."""
    with open(tmp_path / "a.bin", "wb") as file:
        file.write(np.array([5, 0, 6], dtype="<u2").tobytes())
        file.truncate(200_000)
    written = np.fromfile(tmp_path / "a.bin", dtype="<u2")
    written.tofile(tmp_path / "b.bin")
    sparse, dense = (open_store(tmp_path / name, format="nanogpt", eos_id=0) for name in ("a.bin", "b.bin"))
    assert np.array_equal(sparse.document_lengths, dense.document_lengths)
    assert sparse.num_documents == np.count_nonzero(written == 0)


def test_empty_files_hold_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"")
    for path in (tmp_path / "a.bin", write_llm_c(tmp_path / "b.bin", []), write_automodel(tmp_path / "c.bin", [])):
        store = open_store(path, eos_id=2)
        assert (store.num_documents, store.num_tokens, store.max_token_id) == (0, 0, -1)


def test_negative_ids_are_found(tmp_path: Path) -> None:
    np.array([4, -5, 6], dtype="<i4").tofile(tmp_path / "a.bin")
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 1, 2) + struct.pack("<iqqq", 3, 0, 0, 1)
    (tmp_path / "a.idx").write_bytes(index)
    with pytest.raises(DataError, match=r"a\.bin: token 1 is -5"):
        open_store(tmp_path / "a").verify()
