"""Documents that are the same text, or nearly: found from 8 bytes, or a MinHash signature of 512 bytes, per document.

Exact: equal 64-bit content hashes. Near: MinHash over runs of 5 words, 128 values in 16 bands of 8 (Broder 1997; Leskovec,
Rajaraman, Ullman, Mining of Massive Datasets, 3.4); documents that share a band and agree in at least 0.8 of their values (an
estimate of the share of runs they have in common) form one group. The first of each group in input order is the original.
Memory: 8 bytes per document, and as much again for each of sorting and grouping; signatures stay on disk.
Cost: 10 MB of text per second and process, hashing of words included (datasketch 2.0: 1.2).
Weakness: of documents that are 0.8 alike about 95 % are found, at 0.9 all. Near duplicates of near duplicates join one group.
"""

from __future__ import annotations

import numpy as np

from steep.store.word_hashes import mixed, run_hashes, runs_within

VALUES = 128
BANDS = 16
SHINGLE_WORDS = 5
SIMILARITY = 0.8
_BLOCK_SHINGLES = 1 << 9
_BLOCK_PAIRS = 1 << 16
_RANDOM = mixed(np.arange(1, 2 * VALUES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint32)
_MULTIPLIERS, _OFFSETS = _RANDOM[:VALUES] | np.uint32(1), _RANDOM[VALUES:]
"""128 bijections x -> multiplier * x + offset of the integers modulo 2^32."""


def repeated(hashes: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """(documents,) int64: for each document the first one with the same hash, -1 if that is the document itself.

    hashes: (documents,) uint64. alive: (documents,) bool; the others are neither duplicates nor originals.
    """
    originals = np.full(len(hashes), -1, dtype=np.int64)
    for firsts, members in _groups(hashes, np.flatnonzero(alive)):
        originals[members] = firsts
    return originals


def signatures_of(words: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(texts, 128) uint32: the signatures of many texts. words, counts: from `word_hashes_of`.

    A text of fewer than 5 words is a single run; one without words has the largest value everywhere.
    """
    lowest = np.full((len(counts), VALUES), 2**32 - 1, dtype=np.uint32)
    text_of_word = np.repeat(np.arange(len(counts)), counts)
    first_words = np.cumsum(counts) - counts
    for length in range(1, SHINGLE_WORDS + 1):
        short = np.flatnonzero(counts == length) if length < SHINGLE_WORDS else None
        positions = runs_within(counts, length) if short is None else first_words[short]
        if len(positions):
            _lower(lowest, run_hashes(words, length)[positions].astype(np.uint32), text_of_word[positions])
    return lowest


def _lower(lowest: np.ndarray, shingles: np.ndarray, texts: np.ndarray) -> None:
    """Bring the signatures down to the values of more shingles. texts: (shingles,) ascending, the text of each."""
    for start in range(0, len(shingles), _BLOCK_SHINGLES):
        block, owners = shingles[start : start + _BLOCK_SHINGLES], texts[start : start + _BLOCK_SHINGLES]
        begins = np.flatnonzero(np.diff(owners, prepend=-1))
        values = block[:, None] * _MULTIPLIERS  # (shingles, 128): h_v(x) = multiplier_v * x + offset_v mod 2^32
        values += _OFFSETS
        values = np.minimum.reduceat(values, begins, axis=0)
        changed = owners[begins]
        lowest[changed] = np.minimum(lowest[changed], values)


def alike(signatures: list[np.ndarray], hashes: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """(documents,) int64: for each document the first of its group of near duplicates, -1 if that is the document itself.

    signatures: (documents of a part, 128) uint32 arrays, memory maps as a rule, in order. hashes: as for `repeated`;
    documents without words are compared by these. alive: as for `repeated`.
    """
    first_of = np.arange(len(hashes), dtype=np.int64)
    starts = np.cumsum([0, *(len(part) for part in signatures)])
    rows_per_band = VALUES // BANDS
    living = np.flatnonzero(alive)
    for band in range(BANDS):
        keys = np.empty(len(hashes), dtype=np.uint64)
        for part, start in zip(signatures, starts, strict=False):
            keys[start : start + len(part)] = _band_keys(part[:, band * rows_per_band : (band + 1) * rows_per_band])
            empty = part[:, 0] == 2**32 - 1
            keys[start : start + len(part)][empty] = hashes[start : start + len(part)][empty]
        for firsts, members in _groups(keys, living):
            new = _roots(first_of, firsts) != _roots(first_of, members)
            firsts, members = firsts[new], members[new]
            equal = _rows(signatures, starts, firsts) == _rows(signatures, starts, members)
            close = equal.mean(axis=1) >= SIMILARITY
            for one, other in zip(firsts[close].tolist(), members[close].tolist(), strict=True):
                one, other = _root(first_of, one), _root(first_of, other)
                first_of[max(one, other)] = min(one, other)  # the root of a group is its lowest document
    roots = _roots(first_of, np.arange(len(hashes)))
    return np.where(roots == np.arange(len(hashes)), -1, roots)


def _groups(keys: np.ndarray, living: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(firsts, members)] in blocks: every living document that is not the first with its key, and that first."""
    order = living[np.argsort(keys[living], kind="stable")]
    repeats = np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1
    if not len(repeats):
        return []
    begins = np.ones(len(order), dtype=bool)
    begins[repeats] = False
    group_starts = np.flatnonzero(begins)
    firsts = order[group_starts[np.searchsorted(group_starts, repeats, side="right") - 1]]
    members = order[repeats]
    return [
        (firsts[at : at + _BLOCK_PAIRS], members[at : at + _BLOCK_PAIRS]) for at in range(0, len(members), _BLOCK_PAIRS)
    ]


def _band_keys(columns: np.ndarray) -> np.ndarray:
    key = np.zeros(len(columns), dtype=np.uint64)
    for number in range(columns.shape[1]):
        key = mixed(key ^ columns[:, number].astype(np.uint64)) + np.uint64(number + 1)
    return key


def _rows(signatures: list[np.ndarray], starts: np.ndarray, documents: np.ndarray) -> np.ndarray:
    rows = np.empty((len(documents), VALUES), dtype=np.uint32)
    part_of = np.searchsorted(starts, documents, side="right") - 1
    for number in np.unique(part_of):
        chosen = part_of == number
        rows[chosen] = signatures[number][documents[chosen] - starts[number]]
    return rows


def _roots(first_of: np.ndarray, documents: np.ndarray) -> np.ndarray:
    roots = first_of[documents]
    while True:
        further = first_of[roots]
        if np.array_equal(further, roots):
            return roots
        roots = further


def _root(first_of: np.ndarray, document: int) -> int:
    while first_of[document] != document:
        first_of[document] = first_of[first_of[document]]
        document = int(first_of[document])
    return document
