"""The order of a run: permutation, packing, plan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.core.errors import DataError
from steep.order.packing import ConcatPacking
from steep.order.permutation import Permutation
from steep.order.plan import DataPlan, SourcePlan, held_out


def plan_of(lengths_of_sources: list[list[int]], sequence_length: int = 8, seed: int = 1) -> DataPlan:
    sources = [
        SourcePlan(f"s{i}", np.arange(len(lengths)), np.asarray(lengths, dtype=np.int64), f"f{i}")
        for i, lengths in enumerate(lengths_of_sources)
    ]
    return DataPlan(sources, sequence_length, seed)


@pytest.mark.parametrize("length", [*range(1, 130), 255, 256, 257, 4095, 4096, 4097, 65535, 65536, 65537, 70000])
def test_permutation_is_a_bijection(length: int) -> None:
    assert np.array_equal(np.sort(Permutation(length, 7)(np.arange(length))), np.arange(length))


@pytest.mark.parametrize("exponent", [20, 33, 40, 61])
def test_permutation_of_many_things_stays_inside_and_does_not_collide(exponent: int) -> None:
    for length in (2**exponent - 1, 2**exponent, 2**exponent + 1):
        places = np.unique(np.arange(5000, dtype=np.int64) * ((length - 1) // 4999))
        things = Permutation(length, 3)(places)
        assert things.min() >= 0
        assert things.max() < length
        assert len(np.unique(things)) == len(places)


def test_permutation_depends_on_its_key_and_mixes() -> None:
    order = Permutation(1000, 1, "documents", 0, 0)(np.arange(1000))
    other = Permutation(1000, 1, "documents", 0, 1)(np.arange(1000))
    assert (order == other).mean() < 0.02
    # A random order of 1,000 has no trend: the rank correlation's standard deviation is 1/sqrt(999) = 0.032.
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.16


def test_permutation_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="0 things"):
        Permutation(0, 1)
    with pytest.raises(IndexError):
        Permutation(3, 1)(3)


def test_concat_packing_by_hand() -> None:
    packing = ConcatPacking(np.array([4, 2, 9]), np.array([5, 0, 6]), 4)
    ranges = [[(r.document, r.start, r.count) for r in packing.sequence(k)] for k in range(packing.num_sequences)]
    assert ranges == [[(4, 0, 4)], [(4, 4, 1), (9, 0, 3)], [(9, 3, 3)]]
    with pytest.raises(IndexError):
        packing.sequence(3)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=30), min_size=1, max_size=3),
    st.integers(2, 20),
    st.integers(0, 5),
)
def test_every_epoch_holds_every_token_once(lengths: list[list[int]], sequence_length: int, seed: int) -> None:
    if not sum(map(sum, lengths)):
        with pytest.raises(DataError, match="nothing to train on"):
            plan_of(lengths, sequence_length, seed)
        return
    plan = plan_of(lengths, sequence_length, seed)
    for epoch in range(2):
        seen = [np.zeros((len(source), max(source)), dtype=int) for source in lengths]
        start = epoch * plan.sequences_per_epoch
        for index in range(start, start + plan.sequences_per_epoch):
            sequence = plan.sequence(index)
            assert 1 <= sum(r.count for r in sequence.ranges) <= sequence_length
            for r in sequence.ranges:
                seen[sequence.source][r.document, r.start : r.start + r.count] += 1
        for source, counts in zip(lengths, seen, strict=True):
            expected = np.arange(counts.shape[1])[None, :] < np.asarray(source)[:, None]
            assert np.array_equal(counts, expected.astype(int))


def test_sequence_is_a_pure_function_of_its_index() -> None:
    forward, backward = plan_of([[30] * 20, [7] * 9]), plan_of([[30] * 20, [7] * 9])
    indices = range(3 * forward.sequences_per_epoch)
    expected = [forward.sequence(i) for i in indices]
    assert [backward.sequence(i) for i in reversed(indices)] == expected[::-1]
    assert forward.fingerprint == backward.fingerprint
    assert plan_of([[30] * 20, [7] * 9], seed=2).fingerprint != forward.fingerprint


def test_epochs_have_different_orders() -> None:
    plan = plan_of([[8] * 50])
    first = [plan.sequence(i).ranges[0].document for i in range(50)]
    second = [plan.sequence(50 + i).ranges[0].document for i in range(50)]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def test_held_out_share_is_stable_under_added_documents() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, size=20_000, dtype=np.uint64)
    chosen = held_out(hashes, 0.1)
    assert 0.09 < chosen.mean() < 0.11
    assert np.array_equal(held_out(hashes[:100], 0.1), chosen[:100])
    assert not (chosen & ~held_out(hashes, 0.2)).any()
