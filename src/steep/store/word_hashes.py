"""Words of a text as 64-bit hashes, and hashes of runs of words, vectorized: what near duplicates and contamination compare.

A word is a run of ASCII letters and digits or of characters beyond ASCII, in lower case; typographic punctuation
(U+2000 to U+203F) and all other ASCII separate words. Source of the hashing: polynomials over Z/2^64 with random
values for the bytes, mixed as in SplitMix64; two different runs of words agree with a probability of about 2^-60.
Weakness: text without spaces between words (Chinese, Japanese, Thai) is cut at its punctuation only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

CHUNK_BYTES = 1 << 20
_BASE = np.uint64(0x9E3779B97F4A7C15)
_RUN_BASE = np.uint64(0xD1342543DE82EF95)
_IS_WORD_BYTE = np.array([byte >= 0x80 or chr(byte).isalnum() for byte in range(256)])


def word_hashes(text: str) -> np.ndarray:
    """(words,) uint64: a hash of each word of `text`, in order. Memory: about 60 MB besides the result, for any text."""
    return word_hashes_of([text])[0]


def word_hashes_of(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The words of many short texts at once: (words,) uint64 hashes, and (texts,) int64 words of each text."""
    encoded = [text.lower().encode("utf-8") for text in texts]
    raw = np.frombuffer(b"\n".join(encoded), dtype=np.uint8)
    ends = np.cumsum([len(part) + 1 for part in encoded])
    hashes, starts = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.int64)]
    for begin, stop in _chunks(raw):
        values, positions = _hashes_of(raw[begin:stop])
        hashes.append(values)
        starts.append(positions + begin)
    counts = np.diff(np.searchsorted(np.concatenate(starts), ends), prepend=0)
    return np.concatenate(hashes), counts


def run_hashes(words: np.ndarray, length: int) -> np.ndarray:
    """(len(words) - length + 1,) uint64: a hash of each run of `length` words; empty if there are fewer."""
    count = len(words) - length + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    # run i = sum over k of words[i + k] * B^(length - 1 - k) mod 2^64, by Horner's rule
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        total *= _RUN_BASE
        total += words[offset : offset + count]
    return mixed(total)


def runs_within(counts: np.ndarray, length: int) -> np.ndarray:
    """(runs,) int64: the first words of the runs that lie within one text. counts: (texts,) words of each text, the
    texts one after the other."""
    ends = np.repeat(np.cumsum(counts), counts)
    positions = np.arange(len(ends))
    return positions[positions + length <= ends]


def mixed(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 in which every bit of the result depends on every bit of the value (SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _chunks(raw: np.ndarray) -> Iterator[tuple[int, int]]:
    """Parts of about a megabyte that end at the end of a word, if there is one."""
    start = 0
    while start < len(raw):
        stop = min(len(raw), start + CHUNK_BYTES)
        if stop < len(raw):
            ends = np.flatnonzero(~_IS_WORD_BYTE[raw[start:stop]])
            stop = start + int(ends[-1]) + 1 if len(ends) else stop
        yield start, stop
        start = stop


def _hashes_of(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The hash of each word, and the byte at which it starts."""
    inside = _IS_WORD_BYTE[raw]
    if len(raw) > 2:
        punctuation = np.flatnonzero((raw[:-2] == 0xE2) & (raw[1:-1] == 0x80))
        inside[(punctuation[:, None] + np.arange(3)).ravel()] = False
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    powers, inverse_powers = _powers()
    # word [s, e) = sum over s <= i < e of value[byte i] * B^(i - s) mod 2^64
    sums = np.zeros(len(raw) + 1, dtype=np.uint64)
    np.cumsum(mixed(np.arange(1, 257, dtype=np.uint64) * _BASE)[raw] * powers[: len(raw)], out=sums[1:])
    return mixed((sums[ends] - sums[starts]) * inverse_powers[starts]), starts


@lru_cache(maxsize=1)
def _powers() -> tuple[np.ndarray, np.ndarray]:
    inverse = np.uint64(pow(int(_BASE), -1, 2**64))
    ones = np.ones(1, dtype=np.uint64)
    powers, inverse_powers = (
        np.concatenate([ones, np.full(CHUNK_BYTES, base, dtype=np.uint64)]).cumprod(dtype=np.uint64)
        for base in (_BASE, inverse)
    )
    return powers, inverse_powers
