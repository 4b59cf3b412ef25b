"""Megatron's .bin/.idx pair, byte for byte: tokens without a header, and an index of lengths and document boundaries.

Layout of .idx (little-endian, no padding): magic (9 bytes), version u64, dtype code u8, sequences N u64, boundaries D u64
(documents + 1), then lengths i32[N], byte pointers i64[N], document boundaries i64[D] counted in sequences.
Source: megatron-core `indexed_dataset.py`; golden bytes in tests/golden/test_megatron_store.py.
Weakness: the format has no checksum and no tokenizer; manifest.json beside the shards holds both.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from steep.core.errors import DataError

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
LARGEST_U16_VOCABULARY = 65_500
LONGEST_SEQUENCE = 2**31 - 1


@dataclass(frozen=True)
class MegatronIndex:
    """What an .idx file says, in tokens."""

    dtype: np.dtype
    offsets: np.ndarray
    """(documents + 1,) int64, first token of each document in .bin and the end."""

    @property
    def num_documents(self) -> int:
        """Documents, those without tokens included."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.offsets[-1])


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


def read_index(path: Path) -> MegatronIndex:
    """Read and check an .idx file, of any number of sequences per document. Raises DataError naming what is wrong."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    num_sequences, num_boundaries, dtype = _read_header(content, path)
    lengths = np.frombuffer(content, "<i4", num_sequences, _HEADER.size).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", num_sequences, _HEADER.size + 4 * num_sequences)
    boundaries = np.frombuffer(content, "<i8", num_boundaries, _HEADER.size + 12 * num_sequences)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if len(lengths) and (lengths.min() < 0 or not np.array_equal(pointers, ends[:-1] * dtype.itemsize)):
        raise DataError(
            f"{path}: its sequences do not follow each other in the .bin file; steep reads only such files."
        )
    if boundaries[0] != 0 or boundaries[-1] != num_sequences or np.any(np.diff(boundaries) < 0):
        raise DataError(f"{path}: its document boundaries are not in order from 0 to {num_sequences:,}; it is damaged.")
    return MegatronIndex(dtype, ends[boundaries])


def _read_header(content: bytes, path: Path) -> tuple[int, int, np.dtype]:
    if len(content) < _HEADER.size or content[:9] != MAGIC:
        raise DataError(f"{path}: is no Megatron index (it does not start with MMIDIDX).")
    _, version, code, num_sequences, num_boundaries = _HEADER.unpack_from(content)
    dtype = np.dtype(_DTYPES.get(code, np.float64)).newbyteorder("<")
    if version != VERSION or dtype.kind not in "iu":
        raise DataError(f"{path}: version {version}, dtype code {code}; needed are version 1 and an integer dtype.")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
    with_modes = expected + num_sequences  # one byte per sequence in multimodal data; not read
    if len(content) not in (expected, with_modes) or num_boundaries < 1:
        raise DataError(
            f"{path}: has {len(content):,} bytes, but {num_sequences:,} sequences in {num_boundaries - 1:,} documents "
            f"take {expected:,}; it was cut short or is damaged. Prepare or copy it again."
        )
    return num_sequences, num_boundaries, dtype
