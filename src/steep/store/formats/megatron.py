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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Optional

import numpy as np

from steep.core.errors import DataError
from steep.core.files import atomic_writer
from steep.store.bos_index import token_path
from steep.store.formats import Evidence, Sniffed
from steep.store.shard import Shard, ShardOpener, Unit
from steep.store.token_file import Documents, TokenFile, write_tokens

ENDINGS = (".bin", ".idx")
NAMES_SPLITS = False
BOUNDARY_FIRST = None

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
LARGEST_U16_VOCABULARY = 65_500
LONGEST_SEQUENCE = 2**31 - 1
_BLOCK = 1 << 18
"""Entries of the index that are checked at a time."""
_MAPPED_BYTES = 1 << 24
"""A larger .idx is memory-mapped. A smaller one is read, which saves an open file per shard."""


@dataclass(frozen=True)
class MegatronIndex:
    """What an .idx file says. With one sequence per document, the arrays are views of the file."""

    dtype: np.dtype
    lengths: np.ndarray
    """(documents,) i32 or i64, tokens of each document."""
    byte_starts: np.ndarray
    """(documents,) i64, byte at which each document begins in .bin."""
    num_tokens: int


def sniff(path: Path) -> Optional[Sniffed]:
    """A .bin and .idx pair, by either of them or by their common prefix."""
    path = token_path(path)
    prefix = path.with_suffix("") if path.suffix in ENDINGS else path
    pair = [prefix.with_name(prefix.name + ending) for ending in ENDINGS]
    return Sniffed(pair[0], Evidence.INDEX) if all(file.is_file() for file in pair) else None


def accepts(sniffed: Optional[str]) -> bool:
    """Its own files."""
    return sniffed == "megatron"


def open(path: Path, opener: ShardOpener) -> Shard:
    """Open the pair of a .bin. Raises DataError."""
    return open_pair(path.with_suffix(""), opener.unit)


def write(prefix: Path, dtype: np.dtype, documents: Iterable[Documents]) -> None:
    """Write `prefix`.bin and `prefix`.idx, without a manifest."""
    bin_path, idx_path = (prefix.with_name(prefix.name + ending) for ending in ENDINGS)
    lengths = write_tokens(bin_path, dtype, documents)
    with atomic_writer(idx_path, sync_folder=False) as file:
        write_index(file, lengths, dtype)


def token_dtype(num_ids: int) -> np.dtype:
    """u16 for fewer than 65,500 ids, else i32: the format's own rule, so that other readers agree."""
    return np.dtype(np.uint16 if num_ids < LARGEST_U16_VOCABULARY else np.int32)


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


def open_pair(prefix: Path, unit: Unit) -> Shard:
    """Open a .bin/.idx pair, sizes checked against each other. Raises DataError."""
    bin_path, idx_path = (prefix.with_name(prefix.name + suffix) for suffix in ENDINGS)
    index = read_index(idx_path, unit)
    if not bin_path.is_file():
        raise DataError(f"{bin_path}: is missing beside {idx_path.name}.")
    size, expected = bin_path.stat().st_size, index.num_tokens * index.dtype.itemsize
    if size != expected:
        raise DataError(
            f"{bin_path}: has {size:,} bytes, but {idx_path.name} describes {index.num_tokens:,} tokens of "
            f"{index.dtype.itemsize} bytes = {expected:,}. It was cut short or is damaged; prepare or copy it again."
        )
    file = TokenFile(bin_path, "megatron", index.dtype, 0, index.num_tokens, boundary_first=False)
    return Shard(file, file.map_tokens(), index.lengths, index.byte_starts, index.dtype.itemsize, index_path=idx_path)


def read_index(path: Path, unit: Unit = "documents") -> MegatronIndex:
    """Read and check an .idx file with any number of sequences per document.

    unit: what counts as a document. `sequences` takes each sequence as one, as Megatron's own splits and orders do.
    Raises DataError naming what is wrong. Time and memory: one pass in blocks of a few megabytes, 20 M documents in a second;
    the arrays are views of a memory map, of which only the parts used later take memory.
    """
    try:
        with path.open("rb", buffering=0) as file:
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
    with_sequences = int(np.searchsorted(boundaries, num_sequences))  # the others begin where the last sequence ends
    starts[:with_sequences] = pointers[boundaries[:with_sequences]]
    return MegatronIndex(dtype, np.diff(starts) // dtype.itemsize, starts[:-1], num_tokens)


def _check_sequences(file: IO[bytes], num_sequences: int, itemsize: int, path: Path) -> int:
    """The number of tokens. Raises DataError unless the sequences follow each other without a gap."""
    total = 0
    for begin in range(0, num_sequences, _BLOCK):
        count = min(_BLOCK, num_sequences - begin)
        lengths = _read_array(file, "<i4", _HEADER.size + 4 * begin, count, path)
        pointers = _read_array(file, "<i8", _HEADER.size + 4 * num_sequences + 8 * begin, count, path)
        ends = np.cumsum(lengths, dtype=np.int64)
        if lengths.min() < 0 or not np.array_equal(pointers, (ends - lengths + total) * itemsize):
            raise DataError(
                f"{path}: its sequences do not follow each other in the .bin file; steep reads only files in which they do."
            )
        total += int(ends[-1])
    return total


def _check_boundaries(file: IO[bytes], num_sequences: int, num_boundaries: int, path: Path) -> bool:
    """Whether each document is one sequence. Raises DataError unless boundaries run from 0 to `num_sequences`."""
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
        raise DataError(f"{path}: ends early while it is read; something is changing it.")
    return array


def _check_header(header: bytes, size: int, path: Path) -> tuple[int, int, np.dtype]:
    if len(header) < _HEADER.size or header[:9] != MAGIC:
        raise DataError(f"{path}: is not a Megatron index (it does not start with MMIDIDX).")
    _, version, code, num_sequences, num_boundaries = _HEADER.unpack(header)
    dtype = np.dtype(_DTYPES.get(code, np.float64)).newbyteorder("<")
    if version != VERSION or dtype.kind not in "iu":
        raise DataError(f"{path}: version {version}, dtype code {code}; steep reads version 1 with an integer dtype.")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if num_boundaries >= 1 and num_sequences and size == expected + num_sequences:
        raise DataError(
            f"{path}: is multimodal data (it holds a mode for each of its {num_sequences:,} sequences); steep trains on "
            "text only and would read the modes' tokens as text. Write the text sequences without modes and give those."
        )
    if size != expected or num_boundaries < 1:
        raise DataError(
            f"{path}: has {size:,} bytes, but {num_sequences:,} sequences in {num_boundaries - 1:,} documents "
            f"take {expected:,}; it was cut short or is damaged. Prepare or copy it again."
        )
    return num_sequences, num_boundaries, dtype
