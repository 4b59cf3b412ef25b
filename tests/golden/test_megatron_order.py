"""Megatron's order: golden values that were measured on megatron-core 0.19.2 and on NeMo Automodel 0.7.0."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steep.order.megatron import MegatronData, build_megatron_orders
from steep.order.megatron_blend import blend_all, blend_by_weights
from steep.order.megatron_cache import Identity, description_hash
from steep.order.megatron_index import (
    Epochs,
    IndexSettings,
    build_index,
    count_epochs,
    parse_split,
    split_matrix,
    split_range,
)
from steep.order.megatron_order import MegatronOrder
from steep.store.reader import TokenStore, open_store
from steep.store.writer import open_shard

A = [
    [100, 101, 102, 103, 0],
    [110, 111, 0],
    [120, 121, 122, 123, 124, 125, 0],
    [130, 131, 132, 0],
    [140, 141, 142, 143, 144, 0],
]
B = [[500 + 10 * i + j for j in range(length - 1)] + [0] for i, length in enumerate((9, 2, 4))]


def write(folder: Path, name: str, documents: list[list[int]]) -> str:
    with open_shard(folder, name, np.dtype("uint16")) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.int64), str(document))
    return str(folder / name)


def orders(given: Any, split: str, train: int | None, valid: int | None = None) -> MegatronData[TokenStore]:
    return build_megatron_orders(given, split, 4, 1234, train, valid, partial(open_store, unit="sequences"))


def tokens(order: MegatronOrder, stores: list[TokenStore], index: int) -> list[int]:
    """The tokens of a sequence and the one that follows it, as Megatron cuts them."""
    sequence = order.sequence(index)
    found: list[int] = []
    last = sequence.ranges[-1]
    follows = last.start + last.count
    for part in [*sequence.ranges, *([sequence.following] if sequence.following else [])]:
        found += stores[sequence.source].document(part.document)[part.start : part.start + part.count].tolist()
    if sequence.following is None:
        found += stores[sequence.source].document(last.document)[follows : follows + 1].tolist()
    return found


def short_hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


# ---- one dataset ----


@pytest.mark.parametrize(
    ("num_samples", "epochs", "documents", "shuffled"),
    [
        (None, Epochs(1, False), "4 0 1 2 3", "5 2 3 1 0 4"),
        *((n, Epochs(1, False), "4 0 1 2 3", "5 2 3 1 0 4") for n in range(1, 7)),
        *((n, Epochs(2, True, 6), "4 0 1 2 3 3 2 1 0 4", "0 4 3 2 5 1 7 6 9 8 11 10") for n in (7, 8, 9)),
        *((n, Epochs(2, False, 6), "2 2 4 1 0 3 4 0 1 3", "3 11 2 1 7 5 4 0 8 6 10 9") for n in (10, 11, 12)),
        *(
            (n, Epochs(3, True, 12), "2 2 4 1 0 3 4 0 1 3 0 4 3 2 1", "7 11 2 3 1 9 5 4 0 8 6 10 17 13 16 15 12 14")
            for n in (13, 14)
        ),
    ],
)
def test_indices_of_five_documents(num_samples: int | None, epochs: Epochs, documents: str, shuffled: str) -> None:
    settings = IndexSettings(4, 1234)
    lengths = np.array([len(document) for document in A])
    assert count_epochs(25, num_samples, settings) == epochs
    index = build_index(lengths, range(5), num_samples, settings)
    assert " ".join(map(str, index.document_index)) == documents
    assert " ".join(map(str, index.shuffle_index)) == shuffled
    assert index.document_index.dtype == np.int32
    assert index.shuffle_index.dtype == np.uint32
    if epochs.count == 1:
        assert index.sample_index.tolist() == [[0, 0], [0, 4], [1, 2], [2, 1], [3, 2], [3, 6], [4, 3]]
        assert index.sample_index.dtype == np.int32


def test_the_first_sample_of_five_documents(tmp_path: Path) -> None:
    data = orders(write(tmp_path, "a", A), "1,0,0", None)
    assert data.train.num_sequences == 6
    assert tokens(data.train, data.stores, 0) == [0, 130, 131, 132, 0]


@pytest.mark.parametrize(
    ("num_samples", "epochs", "hashes", "documents", "rows", "shuffled"),
    [
        (None, (1, False), "36598bb8e930ad54 f3053f7b95822387 206a63d99afd21c9", [319, 560, 137, 609], 774, [772, 447]),
        (100, (1, False), "36598bb8e930ad54 f3053f7b95822387 206a63d99afd21c9", [319, 560, 137, 609], 774, [772, 447]),
        (900, (2, True), "3b7fddb69e4181ca c4bc0b1fdd857872 5f299361b4d271f1", [], 1547, [645, 281, 434]),
        (
            2000,
            (3, True),
            "10b9bb2dba821d46 d261a44a6923519b 09ca6da47f889b28",
            [213, 180, 108],
            2321,
            [1105, 387, 890],
        ),
    ],
)
def test_indices_of_nine_hundred_documents(
    num_samples: int | None, epochs: tuple[int, bool], hashes: str, documents: list[int], rows: int, shuffled: list[int]
) -> None:
    lengths = np.array([((i * 37) % 101) + 5 for i in range(1000)], dtype=np.int32)
    settings = IndexSettings(64, 1234)
    found = count_epochs(49494, num_samples, settings)
    assert (found.count, found.separate_last) == epochs
    index = build_index(lengths, range(900), num_samples, settings)
    arrays = (index.document_index, index.sample_index, index.shuffle_index)
    assert " ".join(map(short_hash, arrays)) == hashes
    assert index.sample_index.shape == (rows, 2)
    assert index.document_index[: len(documents)].tolist() == documents
    assert index.shuffle_index[: len(shuffled)].tolist() == shuffled


# ---- blends ----


@pytest.mark.parametrize(
    ("weights", "size", "datasets", "samples"),
    [
        ([0.3, 0.7], 1000, "7c083406633f6d98", "098c2c0ce9b9cd79"),
        ([0.5, 0.25, 0.25], 1000, "96c0156e12bf1df3", "5cda02461dde51d2"),
        ([0.1, 0.2, 0.7], 10_000, "2b6a7b7b306a288c", "e9be3ea5f38bf1a9"),
    ],
)
def test_blends_by_weight(weights: list[float], size: int, datasets: str, samples: str) -> None:
    found = blend_by_weights(weights, size)
    assert (short_hash(found[0]), short_hash(found[1])) == (datasets, samples)
    assert (found[0].dtype, found[1].dtype) == (np.int16, np.int64)
    if len(weights) == 2:
        assert found[0][:12].tolist() == [1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1]
        assert np.bincount(found[0]).tolist() == [300, 700]


@pytest.mark.parametrize(
    ("sizes", "datasets", "samples"),
    [
        ([5, 3, 2], "d0c24b6063da6cde", "1105a244b34e761d"),
        ([100, 1, 37], "281856e2650b5718", "98dbee92d6c50302"),
    ],
)
def test_blends_of_everything(sizes: list[int], datasets: str, samples: str) -> None:
    found = blend_all(sizes)
    assert (short_hash(found[0]), short_hash(found[1])) == (datasets, samples)
    if sizes == [5, 3, 2]:
        assert found[0].tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0]


def test_two_datasets_split_and_blended(tmp_path: Path) -> None:
    given = [0.7, write(tmp_path, "a", A), "0.3", write(tmp_path, "b", B)]
    data = orders(given, "80,20", 20, 4)
    train, valid = data.train, data.valid
    assert valid is not None
    assert [source.num_samples for source in train._megatron_sources] == [15, 7]
    assert [source.num_samples for source in valid._megatron_sources] == [4, 3]
    assert [source.documents for source in train._megatron_sources] == [range(4), range(2)]
    assert [source.documents for source in valid._megatron_sources] == [range(4, 5), range(2, 3)]
    order = "".join(str(train.sequence(i).source) for i in range(train.num_sequences))
    assert order == "01001001000100100100"
    assert [valid.sequence(i).source for i in range(valid.num_sequences)] == [0, 1, 0, 0, 1]
    first = [tokens(train, data.stores, i)[:4] for i in range(4)]
    assert first == [[111, 0, 120, 121], [507, 0, 500, 501], [122, 123, 124, 125], [123, 124, 125, 0]]
    assert [(store.path.name, documents.tolist()) for store, documents in data.held_out] == [("a", [4]), ("b", [2])]


def test_two_datasets_without_weights(tmp_path: Path) -> None:
    data = orders([write(tmp_path, "a", A), write(tmp_path, "b", B)], "1,0,0", None)
    assert [data.train.sequence(i).source for i in range(data.train.num_sequences)] == [0, 1, 0, 0, 1, 0, 0, 1, 0]


# ---- splits and names ----


def test_the_ends_of_splits_are_sums_of_floats() -> None:
    matrix = split_matrix(parse_split("900,50,50"))
    assert matrix == [(0, 0.9), (0.9, 0.9500000000000001), (0.9500000000000001, 1.0)]
    assert isinstance(matrix[0][0], int)  # it is hashed as 0, not as 0.0
    assert split_matrix(parse_split("99,1,0")) == [(0, 0.99), (0.99, 1.0), None]


def test_halves_are_rounded_to_even() -> None:
    assert split_range((0, 0.5), 5) == range(2)
    assert split_range((0, 0.5), 7) == range(4)


def test_the_name_of_a_cached_index() -> None:
    matrix = split_matrix(parse_split("1,0,0"))
    identity = Identity(1234, 4, "1,0,0", matrix, {"class": "Tok"})
    assert description_hash(identity.of_dataset("gold/a", 14, 0)) == "2fb47d7b9597f7bca5f5d9c9f1e97613"


def test_the_name_of_an_index_cached_by_nemo_automodel() -> None:
    identity = Identity(1234, 8, "0.9,0.1,0.0", split_matrix(parse_split("0.9,0.1,0.0")), "dummy-tok")
    described = identity.of_dataset("m/a_text_document", 160, 0)
    assert description_hash(described) == "a964504d6041a47062b20343eca63e47"
