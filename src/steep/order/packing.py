"""Documents laid into sequences. In: document lengths in an order. Out: which token ranges make sequence k.

`concat` lays documents end to end and cuts every `sequence_length` tokens; only the last sequence may be short.
Weakness: about a third of ordinary documents are cut at 2,048 tokens. `best_fit` keeps documents whole where they fit and cuts
only those that are longer than a sequence or fit nowhere else (best-fit decreasing; Ding et al. 2024, arXiv:2404.10830). It uses
as few sequences as the tokens of a window need, or one more. Weakness: up to two sequences per window are padding, and only the
documents of one window are packed together. Neither ever drops a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SPARE_FROM_SEQUENCES = 2000
"""Windows of this many sequences or more get a spare one. Part of the order: never change it."""


class TokenRange(NamedTuple):
    """`count` tokens of `document` from `start` on."""

    document: int
    start: int
    count: int  # type: ignore[assignment]  # the field's word; tuple.count is of no use here


class ConcatPacking:
    """Sequences of `sequence_length` tokens cut from documents laid end to end.

    documents: (num_documents,) int64, document numbers in the order they are laid.
    lengths: (num_documents,) int64, tokens of each of them, in the same order.
    """

    def __init__(self, documents: NDArray[np.int64], lengths: NDArray[np.int64], sequence_length: int):
        self.sequence_length = sequence_length
        self._documents = documents
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self.num_tokens = int(self._ends[-1]) if len(self._ends) else 0
        self.num_sequences = -(-self.num_tokens // sequence_length)  # ceil

    def sequence(self, k: int) -> list[TokenRange]:
        """The ranges of sequence k, in order; together `sequence_length` tokens, fewer only in the last sequence."""
        start = k * self.sequence_length
        stop = min(start + self.sequence_length, self.num_tokens)
        if not 0 <= start < stop:
            raise IndexError(f"sequence {k} of {self.num_sequences}")
        return self.ranges(start, stop)

    def ranges(self, start: int, stop: int) -> list[TokenRange]:
        """The ranges of tokens [start, stop) of the documents laid end to end."""
        # document k covers tokens [ends[k - 1], ends[k]), so the first one is the first k with ends[k] > start
        index = int(np.searchsorted(self._ends, start, side="right"))
        ranges = []
        while start < stop:
            end = int(self._ends[index])
            begin = int(self._ends[index - 1]) if index else 0
            count = min(stop, end) - start
            if count:  # a document of no tokens has no range
                ranges.append(TokenRange(int(self._documents[index]), start - begin, count))
            start += count
            index += 1
        return ranges


@dataclass(frozen=True)
class PackedWindow:
    """The sequences of one window, in arrays: sequence k holds pieces first_piece[k] .. first_piece[k + 1] - 1."""

    first_piece: NDArray[np.int32]
    documents: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int32]

    def sequence(self, k: int) -> list[TokenRange]:
        """The ranges of sequence k."""
        pieces = slice(self.first_piece[k], self.first_piece[k + 1])
        rows = (self.documents[pieces].tolist(), self.starts[pieces].tolist(), self.counts[pieces].tolist())
        return [TokenRange(*row) for row in zip(*rows, strict=True)]


def num_best_fit_sequences(num_tokens: NDArray[np.int64], sequence_length: int) -> NDArray[np.int64]:
    """How many sequences windows of `num_tokens` tokens each get: ceil(tokens / sequence_length), and one more where that adds at
    most a two-thousandth, since with it hardly any document has to be cut for lack of room."""
    fewest = -(-num_tokens // sequence_length)
    return fewest + (fewest >= SPARE_FROM_SEQUENCES)


def pack_best_fit(
    documents: NDArray[np.int64], lengths: NDArray[np.int64], sequence_length: int, num_sequences: int
) -> PackedWindow:
    """Lay whole documents into `num_sequences` sequences of `sequence_length`, enough for all their tokens.

    documents, lengths: (num_documents,) int64. Documents longer than a sequence give full sequences and a rest. Rests and shorter
    documents go, longest first, where they leave the least room; what fits nowhere is cut over the widest rooms left. Within a
    sequence the longest piece comes first.
    """
    pieces = [  # of long documents, each of which fills a sequence alone: (index of the document, start, count)
        (index, start, sequence_length)
        for index in np.flatnonzero(lengths >= sequence_length).tolist()
        for start in range(0, int(lengths[index]) - sequence_length + 1, sequence_length)
    ]
    used = len(pieces)
    bins = list(range(used))  # the sequence of each piece
    by_room: list[list[int]] = [[] for _ in range(sequence_length + 1)]
    rooms = 0  # bit r is set where a sequence has room for exactly r tokens
    rests = lengths % sequence_length
    order = np.argsort(-rests, kind="stable")
    order = order[: np.count_nonzero(rests)]
    for index, length, start in zip(
        order.tolist(), rests[order].tolist(), (lengths - rests)[order].tolist(), strict=True
    ):
        while length:
            fitting = rooms >> length  # bit r - length for each room r >= length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1  # its lowest bit: the smallest room that fits
            elif used < num_sequences:
                room = sequence_length
                by_room[room].append(used)
                rooms |= 1 << room
                used += 1
            else:
                room = rooms.bit_length() - 1  # its highest bit: the widest room
            candidates = by_room[room]
            chosen = candidates.pop()
            if not candidates:
                rooms ^= 1 << room
            count = min(length, room)
            bins.append(chosen)
            pieces.append((index, start, count))
            left = room - count
            if left:
                by_room[left].append(chosen)
                rooms |= 1 << left
            length -= count
            start += count
    for empty in range(used, num_sequences):
        _fill_empty(empty, bins, pieces)
    by_bin = np.argsort(np.array(bins, dtype=np.int64), kind="stable")
    first = np.searchsorted(np.array(bins, dtype=np.int64)[by_bin], np.arange(num_sequences + 1)).astype(np.int32)
    table = np.array(pieces, dtype=np.int64).reshape(-1, 3)[by_bin]
    return PackedWindow(first, documents[table[:, 0]], table[:, 1], table[:, 2].astype(np.int32))


def _fill_empty(empty: int, bins: list[int], pieces: list[tuple[int, int, int]]) -> None:
    """Give an empty sequence something: the last piece moves, or half of the longest one if the last is alone in its sequence."""
    if bins.count(bins[-1]) > 1:
        bins[-1] = empty
        return
    longest = max(range(len(pieces)), key=lambda number: pieces[number][2])
    index, start, count = pieces[longest]
    pieces[longest] = (index, start, count - count // 2)
    bins.append(empty)
    pieces.append((index, start + count - count // 2, count // 2))
