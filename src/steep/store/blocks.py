"""Checksums of a token file, one for each 4 MiB, so that a reader knows every byte that it uses without reading the whole file.

In: bytes as they are written, or a mapped file and what its manifest lists. Out: checksums, or a DataError that names the block.
XXH3 with 64 bits reads at the speed of memory (`benchmarks/block_checks.py`); zlib's CRC-32 takes three times as long. It misses
one chance change in 2^64, and does not withstand someone who forges a file on purpose. The manifest's SHA-256 does (`--verify`).
"""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import xxhash

from steep.core.errors import DataError

BLOCK_SHIFT = 22
BLOCK_BYTES = 1 << BLOCK_SHIFT
SUM_DIGITS = 16
"""Hex digits of one checksum. A terabyte of tokens has 4 MB of them."""


class BlockSums:
    """The checksums of what is written to a file, in order."""

    def __init__(self) -> None:
        self._whole: list[str] = []
        self._sum, self._filled = xxhash.xxh3_64(), 0

    def update(self, content: memoryview) -> None:
        """The next bytes of the file."""
        start = 0
        while start < len(content):
            piece = content[start : start + BLOCK_BYTES - self._filled]
            self._sum.update(piece)
            self._filled += len(piece)
            start += len(piece)
            if self._filled == BLOCK_BYTES:
                self._whole.append(self._sum.hexdigest())
                self._sum, self._filled = xxhash.xxh3_64(), 0

    def listed(self) -> str:
        """All checksums as the manifest lists them: 16 hex digits for each block, joined."""
        return "".join([*self._whole, *([self._sum.hexdigest()] if self._filled else [])])


class BlockCheck:
    """Compares each block of a mapped file with its checksum when it is first read.

    Once for a block and process: a disk that changes a block after it was read is found by the next process.
    """

    def __init__(self, path: Path, content: mmap.mmap, itemsize: int, listed: str, remedy: str):
        """itemsize: bytes of a token. listed: as `BlockSums.listed`. remedy: what the error tells the user to do.

        Raises DataError if the number of checksums is not that of the blocks.
        """
        self._path, self._content, self._itemsize, self._remedy = path, content, itemsize, remedy
        num_blocks = -(-len(content) // BLOCK_BYTES)
        self._sums = [listed[at : at + SUM_DIGITS] for at in range(0, len(listed), SUM_DIGITS)]
        if len(self._sums) != num_blocks:
            raise DataError(
                f"{path}: has {num_blocks:,} blocks of 4 MiB, but its manifest lists {len(self._sums):,} checksums of them; it "
                f"was edited. {remedy}"
            )
        self._checked = bytearray(num_blocks)

    def check(self, first: int, stop: int) -> None:
        """Raise DataError unless the blocks that hold the tokens [first, stop) are as they were written."""
        first_block, last_block = first * self._itemsize >> BLOCK_SHIFT, (stop * self._itemsize - 1) >> BLOCK_SHIFT
        if first_block == last_block and self._checked[first_block]:
            return  # called for every range of a document that is read: a long way here costs more than the checksums
        for block in range(first_block, min(last_block + 1, len(self._checked))):
            if not self._checked[block]:
                self._check(block)

    def _check(self, block: int) -> None:
        begin = block * BLOCK_BYTES
        end = min(begin + BLOCK_BYTES, len(self._content))
        self._advise("MADV_WILLNEED", begin, end)  # in one request: the map itself is read without read-ahead
        with memoryview(self._content) as content, content[begin:end] as piece:
            found = xxhash.xxh3_64_hexdigest(piece)
        self._advise("MADV_DONTNEED", begin, end)  # else a map that is read in full counts as this process's memory
        if found != self._sums[block]:
            raise DataError(
                f"{self._path}: block {block:,} (bytes {begin:,} to {end - 1:,}) has the checksum {found}, and its manifest "
                f"lists {self._sums[block]}: it was damaged or replaced after it was written. {self._remedy}"
            )
        self._checked[block] = 1

    def _advise(self, advice: str, begin: int, end: int) -> None:
        if hasattr(mmap, advice):  # not on every system
            with contextlib.suppress(OSError):  # advice only: without it the block is read all the same
                self._content.madvise(getattr(mmap, advice), begin, end - begin)
