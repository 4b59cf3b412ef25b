"""Which part of the training sources is held out. In: document hashes and lengths, a share. Out: documents, blocks of long ones.

The share is of the tokens of each source. Documents that are short against what is held out go whole, in the order of their
content hashes, so the choice hardly changes when text is added and not at all when it is reordered or resharded. A document
longer than an eighth of what is held out would decide the score alone; such documents give contiguous blocks instead, one from
each of equal stretches of all of them, and what stands around a block is trained on as separate documents. Copies of a document
are treated alike, in every source. The choice depends on nothing else: not on the seed, nor on the length of the run.
Weaknesses: a block is new text, but in the words of a document that is trained on, so its score is better than that of a new
document; and text that is added moves the blocks, and documents near the edge of the share.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LONG_RATIO = 1 / 8
"""A document with more than this part of the tokens to hold out is long."""
BLOCKS = 16
"""So many blocks, where they then have between FEWEST_BLOCK_TOKENS and MOST_BLOCK_TOKENS."""
FEWEST_BLOCK_TOKENS, MOST_BLOCK_TOKENS = 64, 8192

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class HeldOut:
    """What one source holds out."""

    documents: Ints
    """(n,) numbers of the documents that are held out whole, rising."""
    blocks: Ints
    """(m, 3) document, first token and tokens of each block that is held out, rising."""
    rests: Ints
    """(r, 3) the same for what is left of the documents that have blocks: it is trained on."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the choice."""
        return hashlib.sha256(self.documents.astype("<i8").tobytes() + self.blocks.astype("<i8").tobytes()).hexdigest()[
            :16
        ]


class HoldOut:
    """Holds out a share of each source in turn, so that no text is held out of one and trained on in another.

    share: above 0 and below 1. blocks: whether long documents may be cut. A document that an earlier source trains on is not held
    out of a later one, so a source that is added at the end leaves the others as they were.
    """

    def __init__(self, share: float, *, blocks: bool = True):
        self.share = share
        self._may_cut = blocks
        self._earlier: list[NDArray[np.uint64]] = []
        self._held: NDArray[np.uint64] = np.empty(0, dtype=np.uint64)
        self._cuts: dict[int, list[tuple[int, int]]] = {}

    def take(self, hashes: NDArray[np.uint64], lengths: Ints) -> HeldOut:
        """What the next source holds out. hashes: (num_documents,) uint64 of the documents' content; lengths: their tokens."""
        wanted = round(self.share * int(lengths.sum()))
        is_long = (lengths > max(1, wanted) * LONG_RATIO) if self._may_cut else np.zeros(len(lengths), dtype=bool)
        whole = self._unless_trained(_whole_documents(hashes, lengths, ~is_long, self.share))
        cuts = _blocks(hashes, lengths, is_long, self.share, wanted)
        kept = set(self._unless_trained(np.array(list(cuts), dtype=np.uint64)).tolist())
        self._held = np.union1d(self._held, whole)
        self._cuts.update({value: found for value, found in cuts.items() if value in kept})
        self._earlier.append(hashes)
        documents = np.flatnonzero(_among(hashes, self._held))
        cut = np.flatnonzero(_among(hashes, np.sort(np.array(list(self._cuts), dtype=np.uint64))))
        blocks, rests = [], []
        for document in cut.tolist():
            found = self._cuts[int(hashes[document])]
            blocks += [(document, start, count) for start, count in found]
            rests += [(document, start, count) for start, count in _complement(found, int(lengths[document]))]
        return HeldOut(documents, _table(blocks), _table(rests))

    def _unless_trained(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Those that no earlier source trains on."""
        values = np.unique(values)
        for hashes in self._earlier:
            values = np.setdiff1d(values, hashes[_among(hashes, values)])
        return values


def _whole_documents(
    hashes: NDArray[np.uint64], lengths: Ints, allowed: NDArray[np.bool_], share: float
) -> NDArray[np.uint64]:
    """The hashes of the documents to hold out whole: the smallest, with all their copies, that come nearest to the share."""
    wanted = share * int(lengths[allowed].sum())
    # uniform hashes: the share lies near the value share * 2^64, so only few of them are sorted
    few = allowed & (hashes < np.uint64(min(int(2 * share * 2**64), 2**64 - 1)))
    chosen = few if int(lengths[few].sum()) >= wanted else allowed
    values, inverse = np.unique(hashes[chosen], return_inverse=True)
    sums = np.cumsum(np.bincount(inverse.reshape(-1), weights=lengths[chosen], minlength=len(values)))
    if not len(values):
        return values
    count = int(np.searchsorted(sums, wanted, side="right"))
    below = sums[count - 1] if count else 0.0
    if count < len(values) and sums[count] - wanted < wanted - below:
        count += 1
    return values[:count]


def _blocks(
    hashes: NDArray[np.uint64], lengths: Ints, is_long: NDArray[np.bool_], share: float, wanted: int
) -> dict[int, list[tuple[int, int]]]:
    """(first token, tokens) of the blocks of each long document that gives some, by its hash."""
    values, first = np.unique(hashes[is_long], return_index=True)
    tokens = lengths[is_long][first]
    to_hold = round(share * int(lengths[is_long].sum()))
    if not len(values) or to_hold < 2:
        return {}
    # copies count in the share, and are cut alike
    copies = np.bincount(np.searchsorted(values, hashes[is_long]), minlength=len(values))
    each = copies.sum() / len(copies)
    number = max(1, round(to_hold / each / min(max(wanted // BLOCKS, FEWEST_BLOCK_TOKENS), MOST_BLOCK_TOKENS)))
    block = max(2, round(to_hold / each / number))
    slots = np.maximum(1, tokens // block)  # places for a block in each document, none overlapping another
    ends = np.cumsum(slots)
    number = min(number, int(ends[-1]))
    # one place from each of `number` stretches; PCG64 is stable between numpy versions (NEP 19)
    edges = np.arange(number + 1) * int(ends[-1]) // number
    raw = np.asarray(np.random.PCG64(20).random_raw(number), dtype=np.uint64)
    places = edges[:-1] + (raw % np.diff(edges).astype(np.uint64)).astype(np.int64)
    owners = np.searchsorted(ends, places, side="right")
    found: dict[int, list[tuple[int, int]]] = {}
    for owner, place in zip(owners.tolist(), places.tolist(), strict=True):
        start = (place - int(ends[owner] - slots[owner])) * block
        found.setdefault(int(values[owner]), []).append((start, min(block, int(tokens[owner]) - start)))
    return found


def _complement(blocks: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """(first token, tokens) of what a document has around its blocks."""
    starts = [0, *(start + count for start, count in blocks)]
    stops = [*(start for start, _ in blocks), length]
    return [(start, stop - start) for start, stop in zip(starts, stops, strict=True) if stop > start]


def _among(values: NDArray[np.uint64], chosen: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which values are among `chosen`, which is sorted and short."""
    if not len(chosen):
        return np.zeros(len(values), dtype=bool)
    found = np.searchsorted(chosen, values)
    found[found == len(chosen)] = 0
    return chosen[found] == values


def _table(rows: list[tuple[int, int, int]]) -> Ints:
    return np.array(rows, dtype=np.int64).reshape(-1, 3)
