"""A pseudo-random permutation of n numbers that gives any position directly, without being stored.

In: a length, a key (seed, source, epoch, ...) and positions. Out: the numbers at those positions. A Feistel network over the
smallest even number of bits that holds n, with cycle walking for the values that fall outside (Black and Rogaway 2002,
"Ciphers with Arbitrary Finite Domains"). Weakness: six rounds of a fast mixer are shuffling, not cryptography, and not
every one of the n! permutations can come out.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 6
"""Part of the order, as are the mixer's constants: never change them."""
BLOCK_POSITIONS = 1 << 16
NEAR_POSITIONS = 256
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)  # the finalizer of SplitMix64 (Steele, Lea and Flood 2014)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def _mix(value: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """The round function F(value, key) mod 2^64."""
    with np.errstate(over="ignore"):
        value = value + key
        value = (value ^ (value >> np.uint64(30))) * _MULTIPLIER_1
        value = (value ^ (value >> np.uint64(27))) * _MULTIPLIER_2
    return value ^ (value >> np.uint64(31))


class Permutation:
    """A bijection of 0..length-1, fixed by `key`.

    length: 1 to 2**62. key: any integers and strings; another key is another permutation.
    Calling it takes positions (any shape, int64) and gives the numbers at those positions (same shape, int64).
    """

    def __init__(self, length: int, *key: int | str):
        if not 1 <= length <= 2**62:
            raise ValueError(f"a permutation of {length} numbers; it needs 1 to 2**62")
        self.length = length
        self._half_bits = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
        self._half_mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.sha512("/".join(map(str, key)).encode()).digest()
        self._keys = np.frombuffer(digest, dtype="<u8")[:ROUNDS].astype(np.uint64)
        self._last_block: tuple[int, list[int]] = (-1, [])

    def _encrypt(self, value: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._keys:  # (L, R) -> (R, L xor F(R, key)), a bijection whatever F is
            left, right = right, left ^ (_mix(right, key) & self._half_mask)
        return (left << self._half_bits) | right

    def __call__(self, positions: ArrayLike) -> NDArray[np.int64]:
        index = np.asarray(positions, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.length):
            raise IndexError(f"a position outside 0..{self.length - 1}")
        flat = index.reshape(-1)
        found = np.empty(flat.shape, dtype=np.int64)
        for start in range(0, len(flat), BLOCK_POSITIONS):  # a block stays in the processor's cache
            value = self._encrypt(flat[start : start + BLOCK_POSITIONS].astype(np.uint64))
            outside = np.flatnonzero(value >= np.uint64(self.length))
            while outside.size:  # cycle walking: 2^(2 * half_bits) <= 4 * length, so few rounds are needed
                value[outside] = self._encrypt(value[outside])
                outside = outside[value[outside] >= np.uint64(self.length)]
            found[start : start + BLOCK_POSITIONS] = value
        return found.reshape(index.shape)

    def near(self, position: int) -> int:
        """The number at one position, fast where positions are asked for roughly in order: the last block of them is kept."""
        number, within = divmod(position, NEAR_POSITIONS)
        block, numbers = self._last_block
        if number != block:
            first = number * NEAR_POSITIONS
            numbers = self(np.arange(first, min(first + NEAR_POSITIONS, self.length))).tolist()
            self._last_block = (number, numbers)
        return numbers[within]
