"""Write one shard: .bin, .idx and the sidecar of documents, each complete or absent.

In: ids and text, document by document. Out: three files and their counts and checksums. Tokens go to disk at once;
memory is 20 bytes per document.
"""

from __future__ import annotations

import contextlib
import hashlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from steep.core.arrays import write_array
from steep.core.errors import DataError
from steep.core.file_errors import NO_SPACE
from steep.core.files import atomic_writer, sha256_file
from steep.store.blocks import BlockSums
from steep.store.formats.megatron import write_index
from steep.store.manifest import SIDECAR_SUFFIX
from steep.tokenizer.encode import EncodedTexts

SIDECAR_DTYPE = np.dtype([("text_bytes", "<i8"), ("content_hash", "<u8")])
_COPY_TOKENS = 1 << 20


def content_hash(text: bytes) -> int:
    """The 64-bit identity of a document: BLAKE2b-8 of its UTF-8 bytes, little-endian."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class ShardWriter:
    """Collects documents into the open .bin of one shard. Made by `open_shard`."""

    def __init__(self, bin_file: IO[bytes], dtype: np.dtype):
        self._file = bin_file
        self.digest = hashlib.sha256()
        """SHA-256 of what was written to .bin so far."""
        self.block_sums = BlockSums()
        self.dtype = dtype
        self.lengths = array("q")
        self.text_bytes = array("q")
        self.content_hashes = array("Q")
        self.num_tokens = 0
        self.max_token_id = -1

    def add(self, ids: np.ndarray, text: str) -> None:
        """Append one document. ids: (tokens,) integers that fit the dtype; an id that does not raises DataError."""
        self.add_documents(EncodedTexts(ids, np.array([len(ids)])), [text])

    def add_documents(self, encoded: EncodedTexts, texts: Sequence[str]) -> None:
        """Append documents: their ids as in `add`, and their texts, in the same order."""
        ids = encoded.ids
        if len(ids):
            largest = int(ids.max())
            if largest > np.iinfo(self.dtype).max or int(ids.min()) < 0:
                raise DataError(f"token id {largest} does not fit {self.dtype}: the tokenizer has ids beyond its size")
            self.max_token_id = max(self.max_token_id, largest)
        self._write(ids)
        for text in texts:
            utf8 = text.encode("utf-8")
            self.text_bytes.append(len(utf8))
            self.content_hashes.append(content_hash(utf8))
        self.lengths.extend(encoded.lengths.tolist())
        self.num_tokens += len(ids)

    def add_stored(self, tokens: np.ndarray, lengths: np.ndarray, sidecar: np.ndarray) -> None:
        """Append documents of another shard with the same dtype: their tokens, (documents,) lengths and sidecar entries."""
        for start in range(0, len(tokens), _COPY_TOKENS):
            block = tokens[start : start + _COPY_TOKENS]
            self.max_token_id = max(self.max_token_id, int(block.max()))
            self._write(block)
        self.lengths.extend(lengths.tolist())
        self.text_bytes.extend(sidecar["text_bytes"].tolist())
        self.content_hashes.extend(sidecar["content_hash"].tolist())
        self.num_tokens += len(tokens)

    def _write(self, tokens: np.ndarray) -> None:
        raw = np.ascontiguousarray(tokens, dtype=self.dtype).view(np.uint8).data
        self._file.write(raw)
        self.digest.update(raw)
        self.block_sums.update(raw)


@contextlib.contextmanager
def open_shard(folder: Path, name: str, dtype: np.dtype) -> Iterator[ShardWriter]:
    """Write shard `name` in `folder`: all three files appear when the block ends, .bin first; none after an exception."""
    with disk_errors(folder):
        with atomic_writer(folder / f"{name}.bin", sync_folder=False) as bin_file:
            writer = ShardWriter(bin_file, dtype)
            yield writer
        with atomic_writer(folder / f"{name}.idx", sync_folder=False) as index_file:
            write_index(index_file, np.frombuffer(writer.lengths, dtype=np.int64), dtype)
        with atomic_writer(folder / f"{name}{SIDECAR_SUFFIX}") as sidecar_file:
            sidecar = np.empty(len(writer.lengths), dtype=SIDECAR_DTYPE)
            sidecar["text_bytes"] = np.frombuffer(writer.text_bytes, dtype=np.int64)
            sidecar["content_hash"] = np.frombuffer(writer.content_hashes, dtype=np.uint64)
            write_array(sidecar_file, sidecar)


def describe_shard(folder: Path, name: str, writer: ShardWriter) -> dict[str, Any]:
    """A finished shard's entry in the manifest."""
    return {
        "name": name,
        "documents": len(writer.lengths),
        "tokens": writer.num_tokens,
        "bytes": writer.num_tokens * writer.dtype.itemsize,
        "sha256_bin": writer.digest.hexdigest(),
        "xxh3_blocks": writer.block_sums.listed(),
        "sha256_idx": sha256_file(folder / f"{name}.idx"),
        "sha256_documents": sha256_file(folder / f"{name}{SIDECAR_SUFFIX}"),
    }


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise DataError(
            f"{folder}: {NO_SPACE[error.errno]} while writing tokens. Free some space (the tokens take about half the "
            "size of the text) and run the same command again: it continues from what is finished."
        ) from error
