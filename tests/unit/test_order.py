"""The order of a run: permutation, packing, mixture."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.core.errors import ConfigError, DataError
from steep.order import source_order
from steep.order.data_order import NativeOrder, OrderedSource, held_out, same_past
from steep.order.mixture import SourceTurns, integer_weights
from steep.order.packing import ConcatPacking, pack_best_fit
from steep.order.permutation import Permutation
from steep.order.source_order import Windows


def order_of(
    lengths_of_sources: list[list[int]], sequence_length: int = 8, seed: int = 1, **options: Any
) -> NativeOrder:
    sources = [
        OrderedSource(f"s{i}", np.arange(len(lengths)), np.asarray(lengths, dtype=np.int64), f"f{i}")
        for i, lengths in enumerate(lengths_of_sources)
    ]
    return NativeOrder(sources, sequence_length, seed, **options)


def weighted(lengths: list[int], *weights: float | None, sequence_length: int = 8, **options: Any) -> NativeOrder:
    """One source per weight, each with documents of these lengths."""
    sources = [
        OrderedSource(f"s{i}", None, np.asarray(lengths, dtype=np.int64), f"f{i}", weight, **options.pop(f"s{i}", {}))
        for i, weight in enumerate(weights)
    ]
    return NativeOrder(sources, sequence_length, 1, **options)


def is_bijection(length: int, seed: int = 7) -> bool:
    seen = np.zeros(length, dtype=np.bool_)
    seen[Permutation(length, seed)(np.arange(length))] = True
    return bool(seen.all())


@pytest.mark.parametrize("first", range(1, 3000, 600))
def test_permutation_is_a_bijection_at_every_small_length(first: int) -> None:
    assert all(is_bijection(length) for length in range(first, first + 600))


@pytest.mark.parametrize("exponent", range(12, 23))
def test_permutation_is_a_bijection_around_powers_of_two(exponent: int) -> None:
    assert all(is_bijection(2**exponent + d) for d in (-1, 0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, 70_001, 5000))
def test_permutation_is_a_bijection_at_every_length_up_to_70_000(first: int) -> None:
    assert all(is_bijection(length) for length in range(first, min(first + 5000, 70_001)))


@pytest.mark.slow
@pytest.mark.parametrize("exponent", range(23, 29))
def test_permutation_is_a_bijection_around_larger_powers_of_two(exponent: int) -> None:
    assert all(is_bijection(2**exponent + d) for d in (-1, 0, 1))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2**62), st.integers(0, 3), st.data())
def test_one_place_and_many_places_are_the_same_permutation(length: int, seed: int, data: st.DataObject) -> None:
    permutation = Permutation(length, seed, "x")
    places = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=20))
    assert permutation(places).tolist() == [permutation.near(place) for place in places]
    with pytest.raises(IndexError):
        permutation.near(length)


@pytest.mark.parametrize("exponent", [*range(23, 34), 40, 61])
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
    with pytest.raises(ValueError, match="0 numbers"):
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
    st.sampled_from(["best_fit", "concat"]),
)
def test_every_epoch_holds_every_token_once(
    lengths: list[list[int]], sequence_length: int, seed: int, packing: str
) -> None:
    if not sum(map(sum, lengths)):
        with pytest.raises(DataError, match="nothing to train on"):
            order_of(lengths, sequence_length, seed, packing=packing)
        return
    order = order_of(lengths, sequence_length, seed, packing=packing)
    for epoch in range(2):
        seen = [np.zeros((len(source), max(source)), dtype=int) for source in lengths]
        start = epoch * order.sequences_per_epoch
        for index in range(start, start + order.sequences_per_epoch):
            sequence = order.sequence(index)
            assert 1 <= sum(r.count for r in sequence.ranges) <= sequence_length
            for r in sequence.ranges:
                seen[sequence.source][r.document, r.start : r.start + r.count] += 1
        for source, counts in zip(lengths, seen, strict=True):
            expected = np.arange(counts.shape[1])[None, :] < np.asarray(source)[:, None]
            assert np.array_equal(counts, expected.astype(int))


def test_sequence_is_a_pure_function_of_its_index() -> None:
    forward, backward = order_of([[30] * 20, [7] * 9]), order_of([[30] * 20, [7] * 9])
    indices = range(3 * forward.sequences_per_epoch)
    expected = [forward.sequence(i) for i in indices]
    assert [backward.sequence(i) for i in reversed(indices)] == expected[::-1]
    assert forward.fingerprint == backward.fingerprint
    assert order_of([[30] * 20, [7] * 9], seed=2).fingerprint != forward.fingerprint


def test_epochs_have_different_orders() -> None:
    order = order_of([[8] * 50])
    first = [order.sequence(i).ranges[0].document for i in range(50)]
    second = [order.sequence(50 + i).ranges[0].document for i in range(50)]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_a_corpus_of_many_windows_holds_every_token_once(packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_order, "GROUP_WINDOWS", 2)  # several groups without ten million documents
    monkeypatch.setattr(source_order, "GROUP_SEQUENCES", 1000)
    lengths = np.random.default_rng(0).integers(0, 60, size=130_000)
    order = NativeOrder([OrderedSource("s", None, lengths, "f")], 256, 3, packing=packing)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    for epoch in range(2):
        seen = np.zeros(offsets[-1], dtype=np.int8)
        first = epoch * order.sequences_per_epoch
        for index in range(first, first + order.sequences_per_epoch):
            for document, start, count in order.sequence(index).ranges:
                seen[offsets[document] + start : offsets[document] + start + count] += 1
        assert (seen == 1).all()
    padding = order.sequences_per_epoch * 256 - int(offsets[-1])
    assert padding < (256 if packing == "concat" else 2 * 7 * 256)


def test_a_window_takes_documents_from_everywhere_and_sums_agree_with_members() -> None:
    lengths = np.random.default_rng(1).integers(0, 1000, size=87_123)
    windows = Windows(len(lengths), 1, "x")
    members = [windows.members(window) for window in range(windows.count)]
    assert windows.count == 4
    assert np.array_equal(np.sort(np.concatenate(members)), np.arange(len(lengths)))
    assert [int(lengths[m].sum()) for m in members] == windows.sums(lengths).tolist()
    assert all(np.histogram(m, bins=10, range=(0, len(lengths)))[0].min() > 2000 for m in members)


def test_best_fit_keeps_documents_whole_where_concat_cuts_them() -> None:
    lengths = np.random.default_rng(2).lognormal(6.3, 1.1, size=30_000).astype(np.int64) + 1

    def cut(packing: str) -> float:
        order = NativeOrder([OrderedSource("s", None, lengths, "f")], 2048, 1, packing=packing)
        pieces = np.zeros(len(lengths), dtype=np.int64)
        for index in range(order.sequences_per_epoch):
            for token_range in order.sequence(index).ranges:
                pieces[token_range.document] += 1
        return float((pieces[lengths <= 2048] > 1).mean())

    assert cut("best_fit") < 0.002
    assert cut("concat") > 0.2


@pytest.mark.parametrize("length", [1, 4, 8, 16])
def test_no_sequence_is_empty_where_everything_fits_exactly(length: int) -> None:
    order = NativeOrder([OrderedSource("s", None, np.full(20_000 * 8 // min(length, 8), length), "f")], 8, 1)
    assert min(order.sequence(index).num_tokens for index in range(order.sequences_per_epoch)) > 0


def test_best_fit_by_hand() -> None:
    documents, lengths = np.array([10, 11, 12, 13, 14]), np.array([5, 9, 3, 4, 3])
    window = pack_best_fit(documents, lengths, 8, 3)
    sequences = [[tuple(r) for r in window.sequence(k)] for k in range(3)]
    assert sequences == [[(11, 0, 8)], [(10, 0, 5), (12, 0, 3)], [(13, 0, 4), (14, 0, 3), (11, 8, 1)]]


def test_align_to_bos_starts_every_sequence_at_a_document_and_counts_what_it_leaves_out() -> None:
    lengths = np.random.default_rng(3).integers(1, 40, size=500)
    said: list[str] = []
    order = NativeOrder([OrderedSource("s", None, lengths, "f")], 16, 1, align_to_bos=True, say=said.append)
    sequences = [order.sequence(index) for index in range(order.sequences_per_epoch)]
    assert all(sequence.ranges[0].start == 0 for sequence in sequences)
    kept = sum(sequence.num_tokens for sequence in sequences)
    [[dropped]] = [list(of_source.values()) for of_source in order.dropped_tokens]
    assert dropped == int(lengths.sum()) - kept == int(np.maximum(lengths - 16, 0).sum())
    assert f"leaves out {dropped:,} of" in said[0]


def test_much_padding_is_said_and_concat_taken_where_it_pads_less() -> None:
    said: list[str] = []
    many = NativeOrder([OrderedSource("tiny", None, np.full(60_000, 2), "f")], 32_768, 1, say=said.append)
    assert many.packings == ["concat"]
    assert "best_fit would pad" in said[0]
    few = NativeOrder([OrderedSource("few", None, np.array([5, 9]), "f")], 10, 1, say=said.append)
    assert few.packings == ["best_fit"]
    assert "30.0% of its 2 sequences is padding" in said[1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any), st.integers(0, 10**12))
def test_every_prefix_of_a_mixture_is_within_three_sequences_of_its_share(weights: list[int], slots: int) -> None:
    schedule = SourceTurns(weights)
    counts = schedule.counts(slots)
    assert sum(counts) == slots
    for count, weight in zip(counts, weights, strict=True):
        assert abs(Fraction(weight * slots, sum(weights)) - count) <= 3
    for source, before in schedule.events(slots, 40):
        assert counts[source] == before
        counts[source] += 1
        slots += 1
        assert schedule.counts(slots) == counts


@pytest.mark.parametrize(
    "weights", [[50] + [1] * 50, [12] + [1] * 12, [1] * 50 + [50], [200] + [1] * 200, [1] * 300, [7, 1] * 60], ids=str
)
def test_many_equal_sources_take_turns(weights: list[int]) -> None:
    total, counts, furthest = sum(weights), [0] * len(weights), Fraction(0)
    for slot, (source, _) in enumerate(SourceTurns(weights).events(0, 2 * total), start=1):
        counts[source] += 1
        shares = zip(counts, weights, strict=True)
        furthest = max(furthest, *(abs(count - Fraction(weight * slot, total)) for count, weight in shares))
    assert furthest <= 3
    assert counts == [2 * weight for weight in weights]  # two whole rounds


def test_weights_are_taken_as_they_are_written() -> None:
    assert integer_weights([0.95, 0.05]) == [19, 1]
    assert integer_weights([0.1, 0.2, "0.7"]) == [1, 2, 7]
    assert integer_weights([3, 0]) == [1, 0]
    with pytest.raises(ValueError, match="none may be negative"):
        integer_weights([0, 0])


def test_without_weights_an_epoch_holds_each_source_in_proportion_to_its_size() -> None:
    order = order_of([[8] * 90, [8] * 10])
    sources = [order.sequence(index).source for index in range(order.sequences_per_epoch)]
    assert order.sequences_per_epoch == 100
    assert all(sources[first : first + 10].count(1) == 1 for first in range(0, 100, 10))


def test_weights_are_shares_of_tokens_whatever_the_sizes() -> None:
    order = weighted([8] * 50, 0.95, 0.05)
    sources = [order.sequence(index).source for index in range(1000)]
    assert sources.count(1) == 50
    assert order.counts(1000) == [950, 50]


def test_an_epoch_waits_for_every_source_but_replay() -> None:
    assert weighted([8] * 50, 0.9, 0.1).sequences_per_epoch > 450
    assert weighted([8] * 50, 0.9, 0.1, s1={"role": "replay"}).sequences_per_epoch == pytest.approx(50 / 0.9, abs=1)


def test_phases_change_what_follows_and_nothing_before() -> None:
    plain = weighted([8] * 50, 1, 0)
    phased = weighted([8] * 50, 1, 0, phases=[(40, {"s1": 3}), (80, {"s0": 0})])
    assert [plain.sequence(i) for i in range(40)] == [phased.sequence(i) for i in range(40)]
    sources = [phased.sequence(i).source for i in range(120)]
    assert sources[40:80].count(1) == 30
    assert set(sources[80:]) == {1}
    seen = [phased.sequence(i).ranges[0].document for i in range(120) if phased.sequence(i).source == 1]
    assert sorted(seen[:50]) == list(range(50))  # one epoch of it, across the phases


@pytest.mark.parametrize("seen", [39, 40])
def test_a_phase_that_is_still_to_come_may_change(seen: int) -> None:
    saved = weighted([8] * 50, 1, 0, phases=[(40, {"s1": 3})]).describe()
    other = weighted([8] * 50, 1, 0, 0, phases=[(40, {"s1": 1, "s2": 9})]).describe()
    assert same_past(saved, other, seen) == []
    assert "weights" in same_past(saved, other, 41)[0]


def test_what_changed_in_the_past_is_named() -> None:
    saved = order_of([[8] * 50, [8] * 20]).describe()
    assert same_past(saved, order_of([[8] * 50, [8] * 20]).describe(), 10) == []
    grown = order_of([[8] * 50, [8] * 21]).describe()
    assert "source 2: documents 20 then, 21 now" in same_past(saved, grown, 10)[0]
    assert same_past(saved, order_of([[8] * 50]).describe(), 10)[0] == "source 2 is gone"
    reordered = {**saved, "sources": saved["sources"][::-1]}
    assert "it is source 2 now" in same_past(saved, reordered, 10)[0]
    assert same_past(saved, order_of([[8] * 50, [8] * 20], 16).describe(), 10)[0] == "sequence_length: 8 then, 16 now"


def test_max_epochs_counts_as_it_is_written() -> None:
    order = weighted([8] * 100, 1, s0={"max_epochs": 0.29})
    assert order.sequences_of_source == [100]
    order.check_length(29)  # 0.29 * 100 is a little less than 29
    with pytest.raises(ConfigError, match="may be repeated 0.29 times"):
        order.check_length(30)


def test_max_epochs_is_refused_before_the_run_with_where_the_source_ends() -> None:
    order = weighted([8] * 50, 1, 1, s1={"max_epochs": 2})
    order.check_length(200)
    with pytest.raises(ConfigError, match=r"'s1' may be repeated 2 times.*2\.02 epochs.*lasts for 1,60\d tokens"):
        order.check_length(202)
    with pytest.raises(ConfigError, match="some sources have a weight and these have none: s1"):
        weighted([8] * 50, 1, None)
    with pytest.raises(ConfigError, match="no source is called 'x'; the sources are s0"):
        weighted([8] * 50, 1, phases=[(1, {"x": 1})])


def test_a_plan_that_begins_later_begins_its_sources_anew() -> None:
    order = weighted([8] * 50, 1, 1, phases=[(10, {"s1": 0})])
    later = order.beginning_at(30)
    assert [later.sequence(i).source for i in range(30, 50)] == [0] * 20
    assert later.fingerprint != order.fingerprint
    assert later.counts(40) == [10, 0]


def test_any_sequence_of_a_trillion_is_at_hand() -> None:
    order = weighted([8] * 5000, 0.7, 0.2, 0.1)
    index = np.random.default_rng(0).integers(0, 10**12, size=300)
    drawn = [order.sequence(int(i)) for i in index]
    assert all(sequence.num_tokens == 8 for sequence in drawn)
    assert drawn == [weighted([8] * 5000, 0.7, 0.2, 0.1).sequence(int(i)) for i in index]


def test_held_out_share_is_stable_under_added_documents() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, size=20_000, dtype=np.uint64)
    chosen = held_out(hashes, 0.1)
    assert 0.09 < chosen.mean() < 0.11
    assert np.array_equal(held_out(hashes[:100], 0.1), chosen[:100])
    assert not (chosen & ~held_out(hashes, 0.2)).any()
