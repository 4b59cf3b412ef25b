"""Megatron's order against the plain loops that it is defined by, its cache, its names of datasets, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.batch import IGNORE_INDEX
from steep.core.errors import ConfigError, DataError
from steep.loader import make_batch
from steep.order.megatron import MegatronData, build_megatron_orders
from steep.order.megatron_blend import blend_all, blend_by_weights
from steep.order.megatron_index import IndexSettings, build_index, build_sample_index, normalize, parse_split
from steep.order.megatron_paths import Blend, read_blend
from steep.store.reader import TokenStore, open_store
from steep.store.writer import open_shard

open_sequences = partial(open_store, unit="sequences")


def write(folder: Path, name: str, lengths: list[int], first: int = 1) -> str:
    """Documents of these lengths whose tokens count up from `first` through all of them."""
    with open_shard(folder, name, np.dtype("int32")) as writer:
        for length in lengths:
            writer.add(np.arange(first, first + length), "")
            first += length
    return str(folder / name)


def orders(
    given: Any, train: int | None, valid: int | None = 0, split: str | None = "100,0,0", **options: Any
) -> MegatronData[TokenStore]:
    return build_megatron_orders(given, split, options.pop("length", 8), 7, train, valid, open_sequences, **options)


# ---- against plain loops ----


def walk(lengths: list[int], laid: list[int], count: int, length: int, extra: int) -> list[list[int]]:
    """The cuts, one token at a time."""
    rows, place, offset = [[0, 0]], 0, 0
    for _ in range(count):
        need = length + extra
        while need:
            left = lengths[laid[place]] - offset
            if left >= need:
                offset, need = offset + need - extra, 0
            elif place == len(laid) - 1:
                offset, need = lengths[laid[place]] - extra, 0
            else:
                place, offset, need = place + 1, 0, need - left
        rows.append([place, offset])
    return rows


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.integers(1, 20), st.booleans(), st.booleans())
def test_cuts_are_those_of_a_walk(lengths: list[int], length: int, extra: bool, drop_last: bool) -> None:
    laid = np.random.default_rng(len(lengths)).permutation(len(lengths))
    tokens = sum(lengths) - extra
    count = max(0, tokens // length if drop_last else -(-tokens // length))
    found = build_sample_index(np.array(lengths), laid, count, IndexSettings(length, 0, extra, drop_last))
    assert found.tolist() == walk(lengths, laid.tolist(), count, length, int(extra))


def greedy(weights: list[float], size: int, limits: list[int] | None = None) -> tuple[list[int], list[int]]:
    """The definition: at each place the first dataset that is furthest behind."""
    taken = [0] * len(weights)
    datasets, samples = [], []
    for place in range(size):
        errors = [
            (weight * max(place, 1.0) - count, -i)
            for i, (weight, count) in enumerate(zip(weights, taken, strict=True))
            if limits is None or count < limits[i]
        ]
        chosen = -max(errors)[1]
        datasets.append(chosen)
        samples.append(taken[chosen])
        taken[chosen] += 1
    return datasets, samples


@pytest.mark.parametrize("weights", [[1.0], [0.3, 0.7], [1, 1, 1], [1e-5, 5, 3, 3, 0.1], list(range(1, 30))])
@pytest.mark.parametrize("size", [1, 100, 9_001])
def test_a_blend_run_in_parts_is_that_of_the_loop(weights: list[float], size: int) -> None:
    shares = normalize(weights)
    datasets, samples = blend_by_weights(shares, size)
    expected = greedy(shares, size)
    assert (datasets.tolist(), samples.tolist()) == expected


@pytest.mark.parametrize("sizes", [[3], [1, 1], [5000, 1, 37, 4000], [9000, 2], [700] * 12])
def test_a_blend_of_everything_is_that_of_the_loop(sizes: list[int]) -> None:
    total = sum(sizes)
    datasets, samples = blend_all(sizes)
    assert (datasets.tolist(), samples.tolist()) == greedy([size / total for size in sizes], total, sizes)
    assert np.bincount(datasets).tolist() == sizes


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-4, 1.0), min_size=2, max_size=12), st.integers(4100, 6000))
def test_any_blend_is_that_of_the_loop(weights: list[float], size: int) -> None:
    shares = normalize(weights)
    assert blend_by_weights(shares, size)[0].tolist() == greedy(shares, size)[0]


# ---- the order ----


def test_one_epoch_holds_every_token_and_consecutive_cuts_share_one(tmp_path: Path) -> None:
    data = orders(write(tmp_path, "a", [5, 0, 9, 1, 26]), None)
    order = data.train
    assert (order.num_sequences, order.sequences_per_epoch) == (5, 5)
    batch = make_batch([order.sequence(i) for i in range(5)], data.stores, 8, document_mask=False)
    cuts = {int(row[0]) for row in batch.input_ids}
    assert len(set(batch.input_ids.flatten().tolist())) == 40  # the last token is a label alone
    assert int((batch.labels != IGNORE_INDEX).sum()) == 40
    followed = [int(label) for label in batch.labels[:, -1]]
    assert sum(label in cuts for label in followed) == 4


def test_labels_of_masked_documents_stay_inside_them(tmp_path: Path) -> None:
    data = orders(write(tmp_path, "a", [8] * 6), None)
    sequence = next(s for s in map(data.train.sequence, range(5)) if s.following is not None)
    masked = make_batch([sequence], data.stores, 8, document_mask=True)
    open_ = make_batch([sequence], data.stores, 8, document_mask=False)
    assert int((masked.labels != IGNORE_INDEX).sum()) == 7
    assert int((open_.labels != IGNORE_INDEX).sum()) == 8


def test_the_last_validation_sample_can_be_kept_and_is_padded(tmp_path: Path) -> None:
    path = write(tmp_path, "a", [10] * 10)
    data = orders(path, 1, 5, "50,50,0", drop_last_partial_validation=False)
    assert data.valid is not None
    sequences = [data.valid.sequence(i) for i in range(data.valid.num_sequences)]
    assert sorted(sequence.num_tokens for sequence in sequences) == [2, 8, 8, 8, 8, 8, 8]
    assert orders(path, 1, 5, "50,50,0").valid.num_sequences == 6  # type: ignore[union-attr]


def test_counts_follow_the_weights(tmp_path: Path) -> None:
    given = [3, write(tmp_path, "a", [50] * 9), 1, write(tmp_path, "b", [50] * 9)]
    order = orders(given, 100).train
    assert order.counts(100) == [75, 25]
    assert order.counts(4) == [sum(order.sequence(i).source == k for i in range(4)) for k in range(2)]
    with pytest.raises(IndexError, match="made for a fixed number"):
        order.sequence(order.num_sequences)


def test_datasets_without_weights_give_one_epoch_and_say_so(tmp_path: Path) -> None:
    given = [write(tmp_path, "a", [20, 21]), write(tmp_path, "b", [17]), write(tmp_path, "c", [33])]
    said: list[str] = []
    data = orders(given, 50, say=said.append)
    assert data.train.num_sequences == 5 + 2 + 4
    assert "11 of the 50 sequences" in said[0]
    with pytest.raises(ConfigError, match="give weights, or train on fewer"):
        data.train.check_length(50)
    data.train.check_length(11)
    one_epoch = orders(write(tmp_path, "d", [33]), None).train
    with pytest.raises(ConfigError, match="holds 4 sequences, and the run needs 8. It was made for one epoch"):
        one_epoch.check_length(8)


def test_every_split_can_have_its_own_datasets(tmp_path: Path) -> None:
    given = {"train": write(tmp_path, "a", [50]), "validation": [write(tmp_path, "b", [30, 30])]}
    data = orders(given, 5, 3, split=None)
    assert [store.path.name for store in (*data.stores, *data.valid_stores)] == ["a", "b"]
    assert [documents.tolist() for _, documents in data.held_out] == [[0, 1]]


def test_held_out_documents_are_those_that_training_does_not_have(tmp_path: Path) -> None:
    data = orders(write(tmp_path, "a", [10] * 10), 100, 0, "80,20,0")
    trained = {r.document for i in range(data.train.num_sequences) for r in data.train.sequence(i).ranges}
    assert data.valid is None
    assert trained == set(range(8))
    assert data.held_out[0][1].tolist() == [8, 9]


def test_a_folder_named_like_the_prefix_does_not_hide_the_dataset(tmp_path: Path) -> None:
    prefix = write(tmp_path, "a", [30])
    (tmp_path / "a" / "cache").mkdir(parents=True)  # where Megatron keeps its indices unless told otherwise
    assert orders(prefix, None).train.num_sequences == 3


# ---- the length of the run ----


def order_of(path: str, samples: int) -> tuple[list[Any], str]:
    order = orders(path, samples).train
    return [order.sequence(i) for i in range(samples)], order.fingerprint


@pytest.mark.parametrize(("before", "after"), [(3, 5), (5, 6), (5, 9), (6, 8), (8, 10), (9, 10), (10, 11), (3, 20)])
def test_the_fingerprint_changes_exactly_where_the_past_does(tmp_path: Path, before: int, after: int) -> None:
    path = write(tmp_path, "a", [6] * 8)  # 5 samples of 8 tokens in an epoch
    then, fingerprint_then = order_of(path, before)
    now, fingerprint_now = order_of(path, after)
    assert (then != now[:before]) == (fingerprint_then != fingerprint_now)


# ---- the cache ----


def cached(tmp_path: Path, given: Any, **options: Any) -> MegatronData[TokenStore]:
    return orders(given, 40, cache_directory=tmp_path / "cache", tokenizer_identifiers={"class": "Tok"}, **options)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def sequences_of(data: MegatronData[TokenStore]) -> list[Any]:
    return [data.train.sequence(i) for i in range(data.train.num_sequences)]


def test_a_cache_is_written_once_and_read_again(tmp_path: Path) -> None:
    given = [0.5, write(tmp_path, "a", [20] * 9), 0.5, write(tmp_path, "b", [30] * 5)]
    first = cached(tmp_path, given)
    written = contents(tmp_path / "cache")
    assert len(written) == 2 * 4 + 3
    assert sorted({name.split("-", 1)[1] for name in written}) == [
        "BlendedDataset-train-dataset_index.npy",
        "BlendedDataset-train-dataset_sample_index.npy",
        "BlendedDataset-train-description.txt",
        *(f"GPTDataset-train-{name}" for name in ("description.txt", "document_index.npy")),
        *(f"GPTDataset-train-{name}" for name in ("sample_index.npy", "shuffle_index.npy")),
    ]
    said: list[str] = []
    second = cached(tmp_path, given, say=said.append)
    assert contents(tmp_path / "cache") == written
    assert said == []
    assert sequences_of(second) == sequences_of(first)


@pytest.mark.parametrize("lengths", [[21] * 9, [20] * 8 + [28], [20] * 10, [15, 25] + [20] * 7])
def test_changed_documents_make_the_cache_void(tmp_path: Path, lengths: list[int]) -> None:
    path = write(tmp_path, "a", [20] * 9)
    cached(tmp_path, path)
    for suffix in (".bin", ".idx"):
        os.unlink(path + suffix)
    write(tmp_path, "a", lengths)
    said: list[str] = []
    data = cached(tmp_path, path, say=said.append)
    assert len(said) == 1
    assert "will be rebuilt" in said[0]
    assert sequences_of(data) == sequences_of(orders(path, 40))
    cached(tmp_path, path, say=said.append)
    assert len(said) == 1


def spoil(path: Path, how: str) -> None:
    array = np.load(path)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "shorter":
        np.save(path, array[:-1])
    else:
        array[:] = array[0]
        np.save(path, array)


@pytest.mark.parametrize("how", ["cut", "empty", "shorter", "repeated"])
@pytest.mark.parametrize(
    "name", ["document_index", "sample_index", "shuffle_index", "dataset_index", "dataset_sample_index"]
)
def test_a_damaged_cache_is_found_and_replaced(tmp_path: Path, name: str, how: str) -> None:
    given = [0.3, write(tmp_path, "a", [20] * 9), 0.7, write(tmp_path, "b", [30] * 5)]
    expected = sequences_of(cached(tmp_path, given))
    written = {key: value[1] for key, value in contents(tmp_path / "cache").items()}
    spoil(next((tmp_path / "cache").glob(f"*-{name}.npy")), how)
    said: list[str] = []
    data = cached(tmp_path, given, say=said.append)
    assert len(said) == 1
    assert sequences_of(data) == expected
    assert {key: value[1] for key, value in contents(tmp_path / "cache").items()} == written


def test_the_extra_token_is_not_in_the_name_but_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, "a", [16] * 9)
    cached(tmp_path, path)
    said: list[str] = []
    data = cached(tmp_path, path, add_extra_token=False, say=said.append)
    assert len(said) == 1
    assert sequences_of(data) == sequences_of(orders(path, 40, add_extra_token=False))


def tokenizers_named(folder: Path) -> list[Any]:
    files = [file for file in folder.glob("*-GPTDataset-*.txt") if file.stat().st_size > 10]
    return sorted((json.loads(file.read_text())["tokenizer"] for file in files), key=str)


def test_what_another_program_calls_the_tokenizer_is_taken_over(tmp_path: Path) -> None:
    path, folder = write(tmp_path, "a", [20] * 9), tmp_path / "cache"
    cached(tmp_path, path)
    (folder / "0-GPTDataset-train-description.txt").write_text("no JSON")
    written = contents(folder)
    options: dict[str, Any] = {"cache_directory": folder, "tokenizer_identifiers": "another"}
    orders(path, 40, say=pytest.fail, **options)
    assert contents(folder) == written
    orders(path, 90, **options)  # another size: a new index, under the same name of the tokenizer
    assert tokenizers_named(folder) == [{"class": "Tok"}] * 2
    build_megatron_orders(
        path, "100,0,0", 8, 8, 40, 0, open_sequences, **options
    )  # another seed: no run of that program
    assert tokenizers_named(folder) == ["another", {"class": "Tok"}, {"class": "Tok"}]


# ---- names of datasets ----


def test_the_ways_to_name_datasets(tmp_path: Path) -> None:
    for name in ("x1", "x0", "y0"):
        write(tmp_path, name, [3])
    at = str(tmp_path) + "/"
    assert read_blend(at + "x0.bin") == Blend([at + "x0"])
    assert read_blend(at + "x*") == Blend([at + "x0", at + "x1"])
    assert read_blend(at + "*.idx") == Blend([at + "x0", at + "x1", at + "y0"])
    assert read_blend([at + "x*", " " + at + "y0 "]) == Blend([at + "x0", at + "x1", at + "y0"])
    assert read_blend(["30", "p", 0.7, "q"]) == Blend(["p", "q"], [30.0, 0.7])
    assert read_blend(["p", "q"]) == Blend(["p", "q"])
    file = tmp_path / "blend.json"
    file.write_text(json.dumps({"train": [1, "p", 2, "q"], "dev": "r", "test": None}))
    assert read_blend(str(file)) == [Blend(["p", "q"], [1.0, 2.0]), Blend(["r"]), None]
    file.write_text(json.dumps(["p", "q", "r"]))
    assert read_blend(file) == Blend(["p", "q", "r"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "is empty"),
        ([1, "p", "x", "q"], "'x' is where a weight is needed"),
        ([1, "p", -2, "q"], "must be a number above 0"),
        ([1, "p", "nan", "q"], "must be a number above 0"),
        ([1, "p*", 2, "q"], "matches no"),
        ("nothing/here*", "matches no .bin and .idx files"),
        ({"train": "p", "eval": "q"}, "'eval' is not a split"),
        ({"valid": "p", "dev": "q"}, "given twice"),
        ({"train": {"train": "p"}}, "divided into splits again"),
        ("missing.json", "cannot be read"),
        ([3, 4, 5], "where the prefix"),
        (5, "names no datasets"),
    ],
)
def test_what_names_no_datasets_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_blend(given)


@pytest.mark.parametrize("split", ["", "none", "0,0", "1,2,3,4", "1..2,3"])
def test_what_is_no_split_is_refused(split: str) -> None:
    with pytest.raises(ConfigError, match="is not a split"):
        parse_split(split)


def test_what_cannot_be_laid_out_is_refused(tmp_path: Path) -> None:
    short, long = write(tmp_path, "short", [3]), write(tmp_path, "long", [50] * 4)
    empty = write(tmp_path, "empty", [0, 0])
    with pytest.raises(DataError, match="train split has no tokens"):
        orders(empty, 10)
    with pytest.raises(DataError, match="shorter than one sequence"):
        orders([short, long, long], 10)
    with pytest.raises(ConfigError, match="need to know how many sequences"):
        orders([1, long], None)
    with pytest.raises(ConfigError, match="leaves nothing to train on"):
        orders(long, 10, 0, "0,100")
    with pytest.raises(ConfigError, match="a validation split that is empty"):
        orders(long, 10, 5, "100,0")
    with pytest.raises(ConfigError, match="nothing to split"):
        orders({"train": long}, 10)
    with pytest.raises(ConfigError, match="needs one"):
        orders(long, 10, 0, None)
    with pytest.raises(DataError, match="is not a token store"):
        orders(str(tmp_path / "absent"), 10)


def test_an_index_is_the_same_from_32_and_64_bit_lengths() -> None:
    lengths = np.random.default_rng(0).integers(0, 50, 300)
    wide = build_index(lengths.astype(np.int64), range(250), 200, IndexSettings(16, 3))
    narrow = build_index(lengths.astype(np.int32), range(250), 200, IndexSettings(16, 3))
    for name in ("document_index", "sample_index", "shuffle_index"):
        assert getattr(wide, name).tobytes() == getattr(narrow, name).tobytes()


# ---- the peer itself ----


@pytest.mark.heavy
def test_random_configurations_equal_megatron_core() -> None:
    """STEEP_MEGATRON_PYTHON: a Python with megatron-core 0.19.2, or `build` to install one (about 1 GB)."""
    peer = os.environ.get("STEEP_MEGATRON_PYTHON")
    if not peer:
        pytest.skip("set STEEP_MEGATRON_PYTHON to a Python that has megatron-core 0.19.2, or to 'build'")
    script = Path(__file__).parents[2] / "benchmarks" / "megatron_parity.py"
    command = [sys.executable, str(script), "--configurations", "200", *([] if peer == "build" else ["--peer", peer])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "200 random configurations, **0 with a difference**" in result.stdout
