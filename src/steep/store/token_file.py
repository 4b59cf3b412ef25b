"""A file of token ids, with or without a header: the parts that the formats of such files share.

In: a file. Out: the dtype of its ids, where they begin, how many there are; the size is checked against the header.
Little-endian, no limit on the size.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Optional

import numpy as np

from steep.core.errors import DataError
from steep.core.files import atomic_writer

HEADER_NUMBERS = 256
HEADER_BYTES = 4 * HEADER_NUMBERS
BLOCK_TOKENS = 1 << 21
LARGEST_COUNT = 2**31 - 1
"""The header's count is a signed 32-bit number."""

Documents = tuple[np.ndarray, np.ndarray]
"""(lengths, tokens) of whole documents: (documents,) int64 and (sum of the lengths,) int64."""


@dataclass(frozen=True)
class TokenFile:
    """Where the ids of a file are."""

    path: Path
    format: str
    dtype: np.dtype
    header_bytes: int
    num_tokens: int
    boundary_first: bool
    """Whether programs that write this format put the boundary token before each document (else after it)."""
    note: str = ""
    """What was assumed of the file, if anything."""
    begins_with_boundary: bool = False
    """Whether the format's first token is certainly the boundary token."""

    def map_tokens(self) -> np.ndarray:
        """(num_tokens,) view of the file, without read-ahead: documents are read in random order, and most of what the system
        would read ahead (megabytes, on some disks) would be wasted. `read_in_order` turns it on."""
        if not self.num_tokens:
            return np.empty(0, self.dtype)  # an empty file cannot be mapped
        with open(self.path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        _advise(content, "MADV_RANDOM")
        return np.frombuffer(content, self.dtype, self.num_tokens, self.header_bytes)

    def blocks(self, *, with_holes: bool = True) -> Iterator[tuple[int, np.ndarray]]:
        """All ids in order: (position of the first, ids), a view that holds until the next.

        with_holes: False skips the holes of a sparse file, which are zeros.

        Read, not mapped: pages of a map that is read in full would count as this process's memory.
        """
        buffer = np.empty(min(self.num_tokens, BLOCK_TOKENS), dtype=self.dtype)
        itemsize = self.dtype.itemsize
        with open(self.path, "rb", buffering=0) as file:
            position = 0
            while position < self.num_tokens:
                if not with_holes:
                    at = self.header_bytes + position * itemsize
                    position += (_skip_hole(file, at) - at) // itemsize
                count = min(BLOCK_TOKENS, self.num_tokens - position)
                if count <= 0:
                    return
                file.seek(self.header_bytes + position * itemsize)
                _fill(file, buffer[:count], self.path)
                yield position, buffer[:count]
                position += count


@contextlib.contextmanager
def read_in_order(tokens: np.ndarray) -> Iterator[None]:
    """While the block runs, read-ahead is on for what `map_tokens` returned."""
    content = map_of(tokens)
    if content is None:
        yield
        return
    _advise(content, "MADV_SEQUENTIAL")
    try:
        yield
    finally:
        _advise(content, "MADV_RANDOM")


def map_of(tokens: np.ndarray) -> Optional[mmap.mmap]:
    """The memory map behind what `map_tokens` returned; None for an empty file, which has none."""
    content = tokens.base
    if isinstance(content, memoryview):
        content = content.obj  # type: ignore[assignment]
    return content if isinstance(content, mmap.mmap) else None


def _advise(content: mmap.mmap, advice: str) -> None:
    if hasattr(mmap, advice):  # not on every system
        content.madvise(getattr(mmap, advice))


def read_header(path: Path) -> np.ndarray:
    """The first 256 numbers of a file: (256,) int32; fewer if the file is shorter. Raises DataError."""
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return np.frombuffer(raw, "<i4", len(raw) // 4)


def read_magic(path: Path) -> int:
    """The first number of a .bin; 0 for anything else. Raises DataError if it cannot be read."""
    if path.suffix != ".bin" or not path.is_file():
        return 0
    header = read_header(path)
    return int(header[0]) if len(header) else 0


def count_tokens(path: Path, itemsize: int, count: int) -> int:
    """The number of tokens after a header. Raises DataError if its count does not agree with the size of the file.

    count: as in the header, a signed 32-bit number; one that wrapped around is accepted if it is right modulo 2^32.
    """
    size = path.stat().st_size
    num_tokens, rest = divmod(size - HEADER_BYTES, itemsize)
    if rest or num_tokens < 0 or (num_tokens - count) % 2**32:
        unfinished = " The count is written last: the writer may have been stopped." if count == 0 else ""
        raise DataError(
            f"{path}: has {size:,} bytes, but its header says {count:,} tokens of {itemsize} bytes = "
            f"{HEADER_BYTES + count * itemsize:,} with the header. It was cut short or is damaged; write or copy it again."
            + unfinished
        )
    return num_tokens


def make_header(magic: int, version: int, num_tokens: int, itemsize: int = 0) -> bytes:
    """1,024 bytes: magic, version, tokens, bytes per token (0 where the format does not say), zeros."""
    header = np.zeros(HEADER_NUMBERS, dtype="<i4")
    header[:4] = magic, version, num_tokens, itemsize
    return header.tobytes()


def write_tokens(
    path: Path, dtype: np.dtype, documents: Iterable[Documents], header: Callable[[int], bytes] = lambda count: b""
) -> np.ndarray:
    """Write the ids of `documents` behind a header, and return the lengths of all of them: (documents,) int64.

    header: from the number of tokens, always of the same size. Raises DataError for more tokens than a header can count.
    """
    lengths, num_tokens = [np.empty(0, dtype=np.int64)], 0
    with atomic_writer(path, sync_folder=False) as file:
        file.write(header(0))
        for block_lengths, tokens in documents:
            num_tokens += len(tokens)
            if num_tokens > LARGEST_COUNT:
                raise DataError(
                    f"a document of {len(tokens):,} tokens is longer than a file of this format can be "
                    f"({LARGEST_COUNT:,} tokens)."
                )
            file.write(tokens.astype(dtype).tobytes())
            lengths.append(block_lengths)
        file.seek(0)
        file.write(header(num_tokens))
    return np.concatenate(lengths)


def _skip_hole(file: IO[bytes], at: int) -> int:
    """The next byte from `at` on that was written; the size of the file if none was. `at` itself where that is not known."""
    if not hasattr(os, "SEEK_DATA"):
        return at
    try:
        return os.lseek(file.fileno(), at, os.SEEK_DATA)
    except OSError:
        status = os.fstat(file.fileno())  # no data from here on, or a file system without holes
        return status.st_size if status.st_blocks * 512 < status.st_size else at


def _fill(file: IO[bytes], out: np.ndarray, path: Path) -> None:
    view = out.view(np.uint8)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:].data)  # type: ignore[attr-defined]
        if not count:
            raise DataError(f"{path}: ends early while it is read; something is changing it.")
        done += count
