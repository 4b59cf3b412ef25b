"""The sequences of one source, without end: number n belongs to epoch n // num_sequences.

In: the source's document lengths, a sequence length and a key. Out: the token ranges of sequence n, from pure functions of
(key, n) and tables with one entry per window of documents: starting costs one pass over the lengths, and any n is found directly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from steep.order.packing import ConcatPacking, PackedWindow, TokenRange, num_best_fit_sequences, pack_best_fit
from steep.order.permutation import Permutation

Key = tuple[int | str, ...]

WINDOW_DOCUMENTS = 20_000
_BLOCK_DOCUMENTS = 1 << 22
GROUP_WINDOWS = 4
"""Windows over which best-fit sequences are shuffled: 80,000 documents, drawn from the whole source. More would not be more
random, and a run would pack all of them before its first hundred sequences. Part of the order: never change it."""
GROUP_SEQUENCES = 1 << 15
"""Consecutive sequences that concat shuffles; its documents are in random order already. Part of the order: never change it."""
MOST_LAID_WINDOWS = 256
"""Windows that concat keeps in memory: enough for `GROUP_SEQUENCES` sequences of documents of twenty tokens or more."""


class Windows:
    """A division of documents 0..num_documents-1 into `count` windows of about 20,000, fixed by `key`, with no order stored.

    Documents are laid in rows of C, the number of windows; window w takes from row r its document (w + turn_r) mod C, where the
    key draws a turn for each row. So a window spans the corpus, its members are found in microseconds, and the tokens of all
    windows come from one pass over the lengths (0.3 s for 20 million documents). Weakness: two documents of one row are never in
    one window.
    """

    def __init__(self, num_documents: int, *key: int | str):
        self.num_documents = num_documents
        self.count = max(1, round(num_documents / WINDOW_DOCUMENTS))
        rows = -(-num_documents // self.count)
        seed = hashlib.sha256("/".join(map(str, key)).encode()).digest()
        # PCG64 and `random_raw` are stable between numpy versions (NEP 19); methods that draw from them need not be
        raw = np.random.PCG64(int.from_bytes(seed[:16], "little")).random_raw(rows)
        self._turns = (np.asarray(raw, dtype=np.uint64) % np.uint64(self.count)).astype(np.int64)

    def members(self, window: int) -> NDArray[np.int64]:
        """The documents of one window, in rising order."""
        documents = np.arange(len(self._turns), dtype=np.int64) * self.count + (window + self._turns) % self.count
        return documents[documents < self.num_documents]

    def sums(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """(count,) sums of `values`, one per document, over each window. Exact below 2**53."""
        total = np.zeros(self.count, dtype=np.int64)
        rows_per_block = max(1, _BLOCK_DOCUMENTS // self.count)
        columns = np.arange(self.count, dtype=np.int64)
        for row in range(0, len(self._turns), rows_per_block):
            turns = self._turns[row : row + rows_per_block, None]
            block = values[row * self.count : (row + len(turns)) * self.count]
            window = ((columns - turns) % self.count).reshape(-1)[: len(block)]
            total += np.bincount(window, weights=block, minlength=self.count).astype(np.int64)
        return total


class SourceOrder(Protocol):
    """How a source becomes sequences."""

    num_sequences: int
    """Of one epoch."""

    def ranges(self, number: int) -> list[TokenRange]:
        """The ranges of sequence `number`, from 0 on without end."""


class BestFitOrder(SourceOrder):
    """Packed sequences that are the same in every epoch, in a new order in each. See `packing.pack_best_fit`.

    documents: (D,) int64 numbers of the documents, or None for all. lengths: (D,) int64 tokens of each, possibly cut short.
    Weakness: a sequence holds the same documents in each epoch; sequences are shuffled within groups of 4 windows.
    """

    def __init__(self, documents: NDArray[np.int64] | None, lengths: NDArray[np.int64], sequence_length: int, key: Key):
        self._documents, self._lengths, self._sequence_length, self._key = documents, lengths, sequence_length, key
        self._windows = Windows(len(lengths), *key, "best_fit")
        self._sequences = num_best_fit_sequences(self._windows.sums(lengths), sequence_length)
        self.num_sequences = int(self._sequences.sum())
        self._packed = lru_cache(maxsize=2 * GROUP_WINDOWS)(self._pack)
        self._epoch = lru_cache(maxsize=2)(self._order_of_epoch)

    def _pack(self, window: int) -> PackedWindow:
        members = self._windows.members(window)
        documents = members if self._documents is None else self._documents[members]
        sequences = int(self._sequences[window])
        return pack_best_fit(documents, self._lengths[members], self._sequence_length, sequences)

    def _order_of_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Callable[[int], Permutation]]:
        """Windows in the order of this epoch, the sequences before each, and the permutation of each group."""
        windows = Permutation(self._windows.count, *self._key, "windows", epoch)(np.arange(self._windows.count))
        before = np.concatenate([[0], np.cumsum(self._sequences[windows])])
        ends = [*range(0, self._windows.count, GROUP_WINDOWS), self._windows.count]

        @lru_cache(maxsize=2)
        def shuffle(group: int) -> Permutation:
            size = int(before[ends[group + 1]] - before[ends[group]])
            return Permutation(size, *self._key, "sequences", epoch, group)

        return windows, before, shuffle

    def ranges(self, number: int) -> list[TokenRange]:
        epoch, position = divmod(number, self.num_sequences)
        windows, before, shuffle = self._epoch(epoch)
        group = (int(before.searchsorted(position, side="right")) - 1) // GROUP_WINDOWS
        first = int(before[group * GROUP_WINDOWS])
        chosen = first + shuffle(group).near(position - first)
        index = int(before.searchsorted(chosen, side="right")) - 1
        return self._packed(int(windows[index])).sequence(chosen - int(before[index]))


class ConcatOrder(SourceOrder):
    """Documents in a new order each epoch, laid end to end and cut; the sequences shuffled within runs of 32,768.

    Arguments as `BestFitOrder`. `lengths` may be shorter than the documents are (`align_to_bos` is not for this packing).
    """

    def __init__(self, documents: NDArray[np.int64] | None, lengths: NDArray[np.int64], sequence_length: int, key: Key):
        self._documents, self._lengths, self._sequence_length, self._key = documents, lengths, sequence_length, key
        self.num_tokens = int(lengths.sum())
        self.num_sequences = -(-self.num_tokens // sequence_length)  # ceil: the last one may be short
        self._epoch = lru_cache(maxsize=2)(self._order_of_epoch)
        self._laid = lru_cache(maxsize=MOST_LAID_WINDOWS)(self._lay)
        self._shuffle = lru_cache(maxsize=4)(self._order_of_group)

    def _order_of_epoch(self, epoch: int) -> tuple[Windows, NDArray[np.int64], NDArray[np.int64]]:
        """The windows of this epoch, their order and the tokens before each."""
        windows = Windows(len(self._lengths), *self._key, "concat", epoch)
        order = Permutation(windows.count, *self._key, "windows", epoch)(np.arange(windows.count))
        return windows, order, np.concatenate([[0], np.cumsum(windows.sums(self._lengths)[order])])

    def _lay(self, epoch: int, window: int) -> ConcatPacking:
        members = self._epoch(epoch)[0].members(window)
        members = members[Permutation(len(members), *self._key, "documents", epoch, window)(np.arange(len(members)))]
        documents = members if self._documents is None else self._documents[members]
        return ConcatPacking(documents, self._lengths[members], self._sequence_length)

    def _order_of_group(self, epoch: int, group: int) -> Permutation:
        size = min(GROUP_SEQUENCES, self.num_sequences - group * GROUP_SEQUENCES)
        return Permutation(size, *self._key, "sequences", epoch, group)

    def ranges(self, number: int) -> list[TokenRange]:
        epoch, position = divmod(number, self.num_sequences)
        group, within = divmod(position, GROUP_SEQUENCES)
        start = (group * GROUP_SEQUENCES + self._shuffle(epoch, group).near(within)) * self._sequence_length
        stop = min(start + self._sequence_length, self.num_tokens)
        _, order, before = self._epoch(epoch)
        index = int(before.searchsorted(start, side="right")) - 1
        found: list[TokenRange] = []
        while start < stop:
            first, end = int(before[index]), int(before[index + 1])
            if end > start:
                found += self._laid(epoch, int(order[index])).ranges(start - first, min(stop, end) - first)
                start = min(stop, end)
            index += 1
        return found
