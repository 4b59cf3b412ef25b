"""Megatron's .bin/.idx pair, byte for byte: tokens without a header, and an index of lengths and document boundaries.

Layout of .idx (little-endian, no padding): magic (9 bytes), version u64, dtype code u8, sequences N u64, boundaries D u64
(documents + 1), then lengths i32[N], byte pointers i64[N], document boundaries i64[D] counted in sequences.
Source: megatron-core `indexed_dataset.py`; golden bytes in tests/golden/test_megatron_store.py.
Weakness: the format has no checksum and no tokenizer; manifest.json beside the shards holds both.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np

from steep.core.errors import DataError

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
LARGEST_U16_VOCABULARY = 65_500
LONGEST_SEQUENCE = 2**31 - 1
_BLOCK = 1 << 18
"""Entries of the index that are checked at once."""
_MAPPED_BYTES = 1 << 24
"""A larger .idx is memory-mapped; a smaller one is read, which saves an open file per shard."""

Unit = Literal["documents", "sequences"]


@dataclass(frozen=True)
class MegatronIndex:
    """What an .idx file says. With one sequence per document the arrays are views of the file, not copies."""

    dtype: np.dtype
    lengths: np.ndarray
    """(documents,) i32 or i64, tokens of each document."""
    byte_starts: np.ndarray
    """(documents,) i64, byte at which each document begins in .bin."""
    num_tokens: int


def token_dtype(vocab_size: int) -> np.dtype:
    """u16 for fewer than 65,500 ids, else i32: the format's own rule, so that other readers agree."""
    return np.dtype(np.uint16 if vocab_size < LARGEST_U16_VOCABULARY else np.int32)


def index_bytes(num_documents: int) -> int:
    """Size of an .idx file with one sequence per document."""
    return _HEADER.size + 8 + 20 * num_documents


def write_index(file: IO[bytes], lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write the .idx of documents of `lengths` tokens, one sequence each.

    lengths: (num_documents,) any integer dtype. Raises DataError for a document that the format cannot hold.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.max() > LONGEST_SEQUENCE:
        raise DataError(f"a document of {lengths.max():,} tokens is longer than the format allows (2,147,483,647)")
    pointers = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1] * dtype.itemsize, out=pointers[1:])
    file.write(_HEADER.pack(MAGIC, VERSION, _CODES[dtype], len(lengths), len(lengths) + 1))
    file.write(lengths.astype("<i4").tobytes())
    file.write(pointers.tobytes())
    file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def read_index(path: Path, unit: Unit = "documents") -> MegatronIndex:
    """Read and check an .idx file, of any number of sequences per document.

    unit: what counts as a document; `sequences` takes each sequence as one, as Megatron's own splits and orders do.
    Raises DataError naming what is wrong. Time and memory: one pass in blocks of a few megabytes, 20 M documents in a second;
    the arrays are views of a memory map, of which only what is used later takes memory.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            num_sequences, num_boundaries, dtype = _check_header(file.read(_HEADER.size), size, path)
            num_tokens = _check_sequences(file, num_sequences, dtype.itemsize, path)
            one_sequence_each = _check_boundaries(file, num_sequences, num_boundaries, path)
            file.seek(0)
            mapped = size > _MAPPED_BYTES
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if mapped else file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    lengths: np.ndarray = np.ndarray(num_sequences, "<i4", content, _HEADER.size)
    pointers: np.ndarray = np.ndarray(num_sequences, "<i8", content, _HEADER.size + 4 * num_sequences)
    if one_sequence_each or unit == "sequences":
        return MegatronIndex(dtype, lengths, pointers, num_tokens)
    boundaries: np.ndarray = np.ndarray(num_boundaries, "<i8", content, _HEADER.size + 12 * num_sequences)
    starts = np.full(num_boundaries, num_tokens * dtype.itemsize, dtype=np.int64)
    with_sequences = int(
        np.searchsorted(boundaries, num_sequences)
    )  # those after it begin where the last sequence ends
    starts[:with_sequences] = pointers[boundaries[:with_sequences]]
    return MegatronIndex(dtype, np.diff(starts) // dtype.itemsize, starts[:-1], num_tokens)


def _check_sequences(file: IO[bytes], num_sequences: int, itemsize: int, path: Path) -> int:
    """Tokens in all, if the sequences follow each other without a gap."""
    total = 0
    for begin in range(0, num_sequences, _BLOCK):
        count = min(_BLOCK, num_sequences - begin)
        lengths = _read_array(file, "<i4", _HEADER.size + 4 * begin, count, path)
        pointers = _read_array(file, "<i8", _HEADER.size + 4 * num_sequences + 8 * begin, count, path)
        ends = np.cumsum(lengths, dtype=np.int64)
        if lengths.min() < 0 or not np.array_equal(pointers, (ends - lengths + total) * itemsize):
            raise DataError(
                f"{path}: its sequences do not follow each other in the .bin file; steep reads only such files."
            )
        total += int(ends[-1])
    return total


def _check_boundaries(file: IO[bytes], num_sequences: int, num_boundaries: int, path: Path) -> bool:
    """Whether each document is one sequence; boundaries must run from 0 to `num_sequences`."""
    one_sequence_each = num_boundaries == num_sequences + 1
    before, ordered = 0, True
    for begin in range(0, num_boundaries, _BLOCK):
        count = min(_BLOCK, num_boundaries - begin)
        boundaries = _read_array(file, "<i8", _HEADER.size + 12 * num_sequences + 8 * begin, count, path)
        steps = np.diff(boundaries, prepend=before)
        ordered = ordered and bool(steps.min() >= 0) and (begin > 0 or steps[0] == 0)
        one_sequence_each = one_sequence_each and bool(np.all(steps[0 if begin else 1 :] == 1))
        before = int(boundaries[-1])
    if not ordered or before != num_sequences:
        raise DataError(f"{path}: its document boundaries are not in order from 0 to {num_sequences:,}; it is damaged.")
    return one_sequence_each


def _read_array(file: IO[bytes], dtype: str, offset: int, count: int, path: Path) -> np.ndarray:
    file.seek(offset)
    array: np.ndarray = np.fromfile(file, dtype, count)
    if len(array) < count:
        raise DataError(f"{path}: ends while it is read; something is changing it.")
    return array


def _check_header(header: bytes, size: int, path: Path) -> tuple[int, int, np.dtype]:
    if len(header) < _HEADER.size or header[:9] != MAGIC:
        raise DataError(f"{path}: is no Megatron index (it does not start with MMIDIDX).")
    _, version, code, num_sequences, num_boundaries = _HEADER.unpack(header)
    dtype = np.dtype(_DTYPES.get(code, np.float64)).newbyteorder("<")
    if version != VERSION or dtype.kind not in "iu":
        raise DataError(f"{path}: version {version}, dtype code {code}; needed are version 1 and an integer dtype.")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if num_boundaries >= 1 and num_sequences and size == expected + num_sequences:
        raise DataError(
            f"{path}: is multimodal data (it holds a mode for each of its {num_sequences:,} sequences); steep trains on "
            "text alone and would read the modes' tokens as text. Write the text sequences without modes, and give those."
        )
    if size != expected or num_boundaries < 1:
        raise DataError(
            f"{path}: has {size:,} bytes, but {num_sequences:,} sequences in {num_boundaries - 1:,} documents "
            f"take {expected:,}; it was cut short or is damaged. Prepare or copy it again."
        )
    return num_sequences, num_boundaries, dtype
