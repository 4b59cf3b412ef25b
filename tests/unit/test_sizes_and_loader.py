"""Batch arithmetic and the loader: which sequences, which labels, which boundaries."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steep.batch import IGNORE_INDEX
from steep.core.errors import ConfigError
from steep.loader import Loader, make_batch
from steep.order.batches import Sizes, StepCounts, batches_of_documents, count_step, run_sizes
from steep.order.data_order import NativeOrder, OrderedSequence, OrderedSource
from steep.order.packing import TokenRange
from steep.training.config import TrainConfig


class ListStore:
    """Documents in memory, through the interface that the loader reads stores by."""

    def __init__(self, documents: list[list[int]]):
        self.documents = documents
        self.document_lengths = np.asarray([len(document) for document in documents], dtype=np.int64)

    def read(self, document: int, start: int, count: int, out: np.ndarray) -> None:
        out[:] = self.documents[document][start : start + count]


def test_labels_positions_and_boundaries_by_hand() -> None:
    store = ListStore([[10, 11, 12, 0], [20, 21, 22, 23, 24, 0]])
    rows = [
        OrderedSequence(0, [TokenRange(0, 0, 4), TokenRange(1, 0, 2)]),
        OrderedSequence(0, [TokenRange(1, 2, 4)]),
    ]
    batch = make_batch(rows, [store], 6, pad_id=99)
    x = IGNORE_INDEX
    assert batch.input_ids.tolist() == [[10, 11, 12, 0, 20, 21], [22, 23, 24, 0, 99, 99]]
    assert batch.labels.tolist() == [[11, 12, 0, x, 21, 22], [23, 24, 0, x, x, x]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 10, 12]
    assert (batch.max_seqlen, int((batch.labels != IGNORE_INDEX).sum())) == (4, 8)


def test_without_document_mask_documents_run_together() -> None:
    store = ListStore([[10, 0], [20, 21]])
    batch = make_batch(
        [OrderedSequence(0, [TokenRange(0, 0, 2), TokenRange(1, 0, 2)])], [store], 4, document_mask=False
    )
    assert batch.labels.tolist() == [[0, 20, 21, IGNORE_INDEX]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]]
    assert batch.cu_seqlens.tolist() == [0, 4]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_ranks_and_micro_batches_share_every_sequence_once(world_size: int, micro_batch_size: int) -> None:
    sizes = Sizes(8, 24, micro_batch_size, total_sequences=24 * 3 + 5, world_size=world_size)
    assert sizes.steps == 4
    for step in range(sizes.steps):
        shares = [s for rank in range(world_size) for part in sizes.micro_batches(step, rank) for s in part]
        assert sorted(shares) == list(sizes.sequences_of_step(step))
        assert len({len(sizes.micro_batches(step, rank)) for rank in range(world_size)}) == 1
    assert len(sizes.sequences_of_step(3)) == 5


def test_run_length_by_epochs_steps_and_tokens() -> None:
    assert run_sizes(TrainConfig(global_batch_size=8, epochs=1.5), 16, 101).total_sequences == 152
    assert run_sizes(TrainConfig(global_batch_size=8, epochs=1.1), 16, 10).total_sequences == 11
    assert run_sizes(TrainConfig(global_batch_size=8, steps="1k"), 16, 101).total_sequences == 8000
    assert run_sizes(TrainConfig(global_batch_size=8, tokens=1000), 16, 101).steps == 8
    assert run_sizes(TrainConfig(global_batch_size=8), 16, 101).steps == 13


def test_a_batch_that_the_ranks_cannot_share_is_refused_with_what_fits() -> None:
    with pytest.raises(ConfigError, match="not a multiple of 12.*These fit: 24 or 36"):
        run_sizes(TrainConfig(global_batch_size=32, micro_batch_size=4), 16, 100, world_size=3)


def small_run() -> tuple[NativeOrder, list[ListStore], Sizes]:
    generator = np.random.default_rng(0)
    documents = [generator.integers(1, 90, size=n).tolist() for n in generator.integers(1, 40, size=30)]
    store = ListStore(documents)
    order = NativeOrder([OrderedSource("s", np.arange(30), store.document_lengths, "f")], 16, seed=5)
    return order, [store], Sizes(16, 4, 2, total_sequences=order.sequences_per_epoch * 2 + 1)


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_the_counts_of_a_step_are_those_of_the_batches_of_all_ranks(packing: str, document_mask: bool) -> None:
    generator = np.random.default_rng(2)
    stores = [ListStore([[1] * n for n in generator.integers(1, 40, size=50)]) for _ in "ab"]
    sources = [OrderedSource(n, None, s.document_lengths, n, w) for n, s, w in zip("ab", stores, (3, 1), strict=True)]
    order = NativeOrder(sources, 16, seed=5, packing=packing)
    sizes = Sizes(16, 12, 3, total_sequences=130, world_size=2)
    loaders = [Loader(order, stores, sizes, rank=rank, document_mask=document_mask) for rank in (0, 1)]
    steps = [[loader.step_batches(step) for loader in loaders] for step in range(sizes.steps)]
    for first, second in steps:
        assert first.counts == second.counts
        assert len(first.batches) == len(second.batches)
        batches = [batch for pair in zip(first.batches, second.batches, strict=True) for batch in pair]
        rows = [
            (int(source), row) for batch in batches for source, row in zip(batch.source_ids, batch.labels, strict=False)
        ]
        assert first.counts.sources == [source for source, _ in rows]
        assert first.counts.label_tokens == [int((labels != IGNORE_INDEX).sum()) for _, labels in rows]
        held = sum(int((batch.input_ids != 0).sum()) for batch in batches)  # every token of the stores is 1, padding 0
        assert first.counts.num_tokens == held
        assert first.counts.padding_tokens == len(rows) * 16 - held
    assert sum(len(first.counts.tokens) for first, _ in steps) == 130
    assert any(first.counts.padding_tokens for first, _ in steps)


def test_the_counts_of_a_step_by_hand() -> None:
    lengths = np.array([5, 7, 9])
    order = NativeOrder([OrderedSource("s", None, lengths, "f")], 8, seed=0, packing="concat")
    counts = count_step([order.sequence(index) for index in range(3)], 8, [lengths])
    assert (counts.sources, sum(counts.tokens), counts.padding_tokens) == ([0, 0, 0], 21, 3)
    assert counts.num_label_tokens == 21 - 3  # the last token of each document has no label
    assert count_step([], 8, [lengths]) == StepCounts(8, [], [], [])


def test_a_rank_without_sequences_in_the_last_step_gets_a_batch_without_labels() -> None:
    """Two ranks, one sequence left: both run one micro-batch, or the collectives of one would wait for the other."""
    store = ListStore([[1, 2, 3, 4]] * 3)
    order = NativeOrder([OrderedSource("s", None, store.document_lengths, "f")], 4, seed=0)
    sizes = Sizes(4, 4, 1, total_sequences=5, world_size=2)
    last = [Loader(order, [store], sizes, rank=rank).step_batches(1) for rank in (0, 1)]
    assert [len(step.batches) for step in last] == [1, 1]
    assert len(last[0].batches[0].source_ids) == 1
    assert len(last[1].batches[0].source_ids) == 0
    assert last[1].batches[0].labels.tolist() == [[IGNORE_INDEX] * 4]
    assert last[0].counts == last[1].counts


def test_loader_resumes_at_any_step_with_the_same_batches() -> None:
    order, stores, sizes = small_run()
    straight = list(Loader(order, stores, sizes))
    assert len(straight) == sizes.steps
    for start in (1, sizes.steps // 2, sizes.steps - 1):
        resumed = list(Loader(order, stores, sizes, start_step=start))
        for ours, theirs in zip(resumed, straight[start:], strict=True):
            for a, b in zip(ours.batches, theirs.batches, strict=True):
                assert torch.equal(a.input_ids, b.input_ids)
                assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_the_stream_is_the_same_for_any_ranks_micro_batches_and_resume(packing: str) -> None:
    generator = np.random.default_rng(1)
    sources = [
        ListStore([generator.integers(1, 90, size=n).tolist() for n in generator.integers(1, 40, size=60)])
        for _ in "ab"
    ]
    ordered = [OrderedSource(n, None, s.document_lengths, n, w) for n, s, w in zip("ab", sources, (3, 1), strict=True)]
    order = NativeOrder(ordered, 16, seed=5, packing=packing)

    def stream(world_size: int, micro_batch_size: int, start_step: int = 0, steps: int = 8) -> list[list[list[int]]]:
        """The sequences of each step in the order in which the ranks' slices stand in it."""
        sizes = Sizes(16, 24, micro_batch_size, total_sequences=24 * steps, world_size=world_size)
        loaders = [Loader(order, sources, sizes, start_step=start_step, rank=rank) for rank in range(world_size)]
        steps_of_ranks = [list(loader) for loader in loaders]
        return [
            [row for m in range(len(parts[0].batches)) for part in parts for row in part.batches[m].input_ids.tolist()]
            for parts in zip(*steps_of_ranks, strict=True)
        ]

    expected = stream(1, 24)
    for world_size in (1, 2, 3, 4, 8):
        for micro_batch_size in (size for size in (1, 2, 3, 4, 6, 8, 12) if 24 % (size * world_size) == 0):
            assert stream(world_size, micro_batch_size) == expected
            assert stream(world_size, micro_batch_size, start_step=5) == expected[5:]


def test_the_token_after_a_sequence_is_a_label_where_documents_see_each_other() -> None:
    store = ListStore([[1, 2, 3], [4, 5, 6]])
    sequence = OrderedSequence(0, [TokenRange(0, 0, 3)], TokenRange(1, 0, 1))
    assert make_batch([sequence], [store], 3, document_mask=False).labels.tolist() == [[2, 3, 4]]
    assert make_batch([sequence], [store], 3).labels.tolist() == [[2, 3, IGNORE_INDEX]]


def test_loader_raises_what_its_thread_met() -> None:
    order, stores, sizes = small_run()
    stores[0].documents[3] = []
    with pytest.raises(ValueError, match="broadcast"):
        list(Loader(order, stores, sizes))


def test_loader_can_be_left_early() -> None:
    import threading

    order, stores, sizes = small_run()
    batches = iter(Loader(order, stores, sizes))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "steep-loader"]


@pytest.mark.parametrize("total", [10, 11, 12, 25])
def test_a_run_made_longer_after_a_short_last_step_skips_nothing(total: int) -> None:
    short = Sizes(8, 4, 4, total_sequences=10)
    seen = [s for step in range(short.steps) for s in short.sequences_of_step(step)]
    longer = Sizes(8, 4, 4, total_sequences=total).resumed(short.steps, len(seen))
    seen += [s for step in range(short.steps, longer.steps) for s in longer.sequences_of_step(step)]
    assert seen == list(range(total))


def test_resuming_on_the_grid_changes_nothing() -> None:
    sizes = Sizes(8, 4, 2, total_sequences=22)
    assert sizes.resumed(3, 12) is sizes
    assert sizes.resumed(0, 0) is sizes


def test_a_batch_of_documents_becomes_as_many_tokens_packed() -> None:
    """Sixteen stories of 200 tokens are 3,200 tokens: two sequences of 1,600, where sixteen of 2,048 would be 160 stories."""
    lengths = [150, 250] * 50
    assert batches_of_documents(2, 8, lengths, 2048) == (1600, 2, 1, 3200.0)
    assert batches_of_documents(16, 1, lengths, 2048) == (1600, 2, 2, 3200.0)
    assert batches_of_documents(2, 2, lengths, 2048) == (800, 1, 1, 800.0)  # less than a row
    assert batches_of_documents(1, 1, [100, 900], 2048) == (904, 1, 1, 500.0)  # the longest stays whole
    assert batches_of_documents(2, 8, [9000, 2048], 2048) == (2048, 16, 2, 16 * 2048.0)  # truncated there: a full row
    assert batches_of_documents(4, 1, [1], 20) == (8, 1, 1, 4.0)
    assert batches_of_documents(4, 1, [3], 5) == (5, 2, 2, 12.0)  # never more than the model's positions


@pytest.mark.parametrize("passes", [1, 3, 8])
@pytest.mark.parametrize("per_pass", [1, 2, 5])
def test_steps_of_packed_documents_hold_what_was_asked_for(per_pass: int, passes: int) -> None:
    for mean in (10, 300, 700, 2000):
        found = batches_of_documents(per_pass, passes, [mean], 2048)
        assert found.global_batch_size % found.micro_batch_size == 0
        assert found.sequence_length <= 2048
        held = found.global_batch_size * found.sequence_length
        assert held == pytest.approx(per_pass * passes * mean, rel=0.25, abs=8)
