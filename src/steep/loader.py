"""Sequences of a run into batches. In: token stores, their order, sizes. Out: the micro-batches of each step, in order.

One thread reads ahead from memory maps; there are no worker processes, so nothing to fork, pickle or hang. Its only state is
the step it stands at.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from steep.batch import IGNORE_INDEX, Batch, StepBatches
from steep.order.batches import Sizes, count_step, open_pieces
from steep.order.data_order import DataOrder, OrderedSequence
from steep.order.packing import TokenRange


class TokenReader(Protocol):
    """What the loader needs of a token store."""

    document_lengths: Any
    """Tokens of a document by its number; an array, but for streams."""

    def read(self, document: int, start: int, count: int, out: NDArray[Any]) -> None:
        """Tokens [start, start+count) of `document` into `out`."""


def make_batch(
    sequences: Sequence[OrderedSequence],
    stores: Sequence[TokenReader],
    sequence_length: int,
    *,
    document_mask: bool = True,
    pad_id: int = 0,
) -> Batch:
    """Read sequences into one batch.

    A label is the next token of the same document, also where the sequence ends before the document does; the last token
    of a document has no label. Without `document_mask` it is the first token of the document that follows in the sequence,
    unless a held-out part of the document comes between.
    Positions that a short sequence leaves free hold `pad_id`, no label, and are a segment of their own.
    """
    shape = (len(sequences), sequence_length)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    lengths: list[int] = []
    for row, sequence in enumerate(sequences):
        store = stores[sequence.source]
        filled = 0
        for document, start, count in sequence.ranges:
            store.read(document, start, count, input_ids[row, filled : filled + count])
            filled += count
        labels[row, : filled - 1] = input_ids[row, 1:filled]
        labels[row, filled - 1 :] = IGNORE_INDEX
        if document_mask:
            _end_documents(sequence.ranges, store, labels[row])
            lengths += [count for _, _, count in sequence.ranges]
            lengths += [sequence_length - filled] if filled < sequence_length else []
        else:
            _end_pieces(sequence.ranges, open_pieces(store), labels[row])
            following = sequence.following or _following(sequence.ranges[-1], store)
            if following is not None:
                store.read(following.document, following.start, 1, labels[row, filled - 1 : filled])
            lengths.append(sequence_length)
    ends = np.cumsum(lengths)
    cu_seqlens = np.concatenate([[0], ends]).astype(np.int32)
    position_ids = np.arange(input_ids.size) - np.repeat(ends - lengths, lengths)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids.reshape(shape)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=max(lengths, default=0),
        source_ids=torch.tensor([sequence.source for sequence in sequences], dtype=torch.int32),
        row_tokens=torch.tensor([sum(count for _, _, count in sequence.ranges) for sequence in sequences]),
    )


def _end_documents(ranges: list[TokenRange], store: TokenReader, labels: NDArray[np.int64]) -> None:
    """At the end of every range: the next token of its document if that goes on elsewhere, else no label."""
    position = 0
    for token_range in ranges:
        position += token_range.count
        following = _following(token_range, store)
        if following is None:
            labels[position - 1] = IGNORE_INDEX
        else:
            store.read(following.document, following.start, 1, labels[position - 1 : position])


def _end_pieces(ranges: list[TokenRange], open_documents: Collection[int], labels: NDArray[np.int64]) -> None:
    """No label at the end of a piece of a document, whose next token is not the one that follows in the sequence."""
    if open_documents:
        ends = np.cumsum([token_range.count for token_range in ranges])[:-1]
        open_ends = [token_range.document in open_documents for token_range in ranges[:-1]]
        labels[ends[open_ends] - 1] = IGNORE_INDEX


def _following(token_range: TokenRange, store: TokenReader) -> TokenRange | None:
    """The token of the same document after this range, if there is one."""
    document, start, count = token_range
    return TokenRange(document, start + count, 1) if start + count < store.document_lengths[document] else None


def empty_batch(sequence_length: int) -> Batch:
    """One row without a sequence: no label, so no loss and no gradient. A rank without sequences keeps step with it."""
    rows = (1, sequence_length)
    return Batch(
        input_ids=torch.zeros(rows, dtype=torch.int64),
        labels=torch.full(rows, IGNORE_INDEX),
        position_ids=torch.arange(sequence_length).view(rows),
        cu_seqlens=torch.tensor([0, sequence_length], dtype=torch.int32),
        max_seqlen=sequence_length,
        source_ids=torch.empty(0, dtype=torch.int32),
        row_tokens=torch.zeros(1, dtype=torch.int64),
    )


class Loader:
    """The micro-batches of every step of a run, read ahead by one thread.

    Iterating gives, for each step from `start_step` to the end, this rank's micro-batches and the counts of the whole step.
    """

    def __init__(
        self,
        order: DataOrder,
        stores: Sequence[TokenReader],
        sizes: Sizes,
        *,
        start_step: int = 0,
        rank: int = 0,
        document_mask: bool = True,
        pin_memory: bool = False,
        read_ahead_steps: int = 2,
    ):
        self._order, self._stores, self._sizes = order, stores, sizes
        self._start_step, self._rank = start_step, rank
        self._document_mask, self._pin_memory = document_mask, pin_memory
        self._read_ahead_steps = read_ahead_steps

    def step_batches(self, step: int) -> StepBatches:
        """`step`, read now."""
        sequences = {index: self._order.sequence(index) for index in self._sizes.sequences_of_step(step)}
        micro_batches = self._sizes.micro_batches(step, self._rank)
        batches = [self._batch([sequences[index] for index in indices]) for indices in micro_batches]
        lengths = [store.document_lengths for store in self._stores]
        counts = count_step(
            list(sequences.values()), self._order.sequence_length, lengths, self._document_mask,
            [open_pieces(store) for store in self._stores],
        )  # fmt: skip
        return StepBatches(batches, counts)

    def _batch(self, sequences: list[OrderedSequence]) -> Batch:
        if not sequences:
            return empty_batch(self._order.sequence_length)
        batch = make_batch(sequences, self._stores, self._order.sequence_length, document_mask=self._document_mask)
        return batch.pin_memory() if self._pin_memory else batch

    def __iter__(self) -> Iterator[StepBatches]:
        steps = range(self._start_step, self._sizes.steps)
        return _read_ahead((partial(self.step_batches, step) for step in steps), self._read_ahead_steps)


def _read_ahead(jobs: Iterator[Callable[[], StepBatches]], depth: int) -> Iterator[StepBatches]:
    """Run jobs in one thread, at most `depth` results ahead; an exception of a job is raised where it is awaited."""
    results: queue.Queue[StepBatches | BaseException | None] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: StepBatches | BaseException | None) -> None:
        while not stop.is_set():
            try:
                results.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for job in jobs:
                if stop.is_set():
                    return
                put(job())
            put(None)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits for it
            put(error)

    thread = threading.Thread(target=work, name="steep-loader", daemon=True)
    thread.start()
    try:
        while (item := results.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
