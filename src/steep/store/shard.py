"""One file of tokens with its documents, whatever wrote it: what a store is made of.

In: a path and its format. Out: Shard. `ShardOpener` opens the files of one store: it decides once, by the first file that
shows it, where the boundary token stands, and collects what a person should know.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np

from steep.core.errors import DataError
from steep.core.files import sha256_file
from steep.store import boundaries
from steep.store.boundaries import Boundary
from steep.store.formats import automodel, datatrove, llm_c, nanogpt
from steep.store.formats.megatron import Unit, read_index
from steep.store.token_file import TokenFile

_SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class Shard:
    """One memory-mapped file with its documents."""

    file: TokenFile
    tokens: np.ndarray
    """(num_tokens,) view of the file in the dtype on disk."""
    lengths: np.ndarray
    """(documents,) integers, tokens of each document."""
    starts: np.ndarray
    """(documents,) i64, where each begins, in `starts_unit`."""
    starts_unit: int = 1
    """Starts per token: 1, or the bytes of a token."""
    boundary: Optional[Boundary] = None
    """The token by which the documents were found."""

    @property
    def path(self) -> Path:
        """The file with the tokens."""
        return self.file.path

    @property
    def format(self) -> str:
        """What wrote it."""
        return self.file.format

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        return len(self.lengths)

    @property
    def prefix(self) -> Path:
        """The path without .bin, for the files that belong to it."""
        return self.path.with_suffix("")

    def content(self) -> list[Any]:
        """What names the content: size, first and last megabyte, and where documents begin.

        A change in the middle of a large file that keeps every document's length is not noticed.
        """
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            digest = hashlib.sha256(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
        if self.format == "megatron":
            return [size, sha256_file(self.prefix.with_name(self.prefix.name + ".idx")), digest.hexdigest()]
        return [
            self.format,
            size,
            hashlib.sha256(np.ascontiguousarray(self.starts).data).hexdigest(),
            digest.hexdigest(),
        ]


@dataclass
class ShardOpener:
    """How the files of one store are opened."""

    unit: Unit = "documents"
    eos_id: Optional[int] = None
    bos_id: Optional[int] = None
    cache_directory: Optional[Path] = None
    asked_for: Optional[str] = None
    """The format, if the user named it."""
    _boundaries: dict[str, Boundary] = field(default_factory=dict)
    _notes: dict[str, list[Path]] = field(default_factory=dict)

    def open(self, path: Path, file_format: str) -> Shard:
        """Open one file. path: the .bin or .ds file. Raises DataError naming what is wrong with it."""
        if file_format == "megatron":
            return open_megatron(path.with_suffix(""), self.unit)
        if file_format == "datatrove":
            dtype, offsets = datatrove.read_index(path)
            file = TokenFile(path, file_format, dtype, 0, int(offsets[-1]), boundary_first=False)
            return Shard(file, file.map_tokens(), np.diff(offsets), offsets[:-1])
        return self._open_without_index(open_token_file(path, file_format, asked_for=self.asked_for == file_format))

    @property
    def messages(self) -> list[str]:
        """What was assumed or found out, one line for all files that it holds for."""
        return [f"{_name_all(paths)}: {note}" for note, paths in self._notes.items()]

    def _open_without_index(self, file: TokenFile) -> Shard:
        tokens = file.map_tokens()
        if file.note:
            self._say(file, file.note)
        boundary = self._boundary(file, tokens)
        indexed = None if boundary is None else self._read_bos_index(file, tokens, boundary)
        if indexed is not None:
            starts = indexed
        elif boundary is None:
            starts = np.zeros(min(1, file.num_tokens), dtype=np.int64)
        else:
            starts = boundaries.document_starts(file, boundary, self.cache_directory)
        lengths = np.diff(starts, append=file.num_tokens)
        return Shard(file, tokens, lengths, starts, boundary=boundary)

    def _boundary(self, file: TokenFile, tokens: np.ndarray) -> Optional[Boundary]:
        """The boundary token; decided by the first file that shows it, since later ones may begin inside a document."""
        if file.format in self._boundaries:
            return self._boundaries[file.format]
        known = any(token is not None for token in (self.eos_id, self.bos_id))
        assumed = None if known else boundaries.assumed_token(file, tokens)
        eos_id = self.eos_id if known else assumed
        boundary = boundaries.choose_boundary(file, tokens, eos_id, self.bos_id)
        ids = " or ".join(str(token) for token in dict.fromkeys((self.bos_id, eos_id)) if token is not None) or "known"
        if boundary is None:
            if file.num_tokens:
                self._say(file, f"holds no end-of-text token ({ids}), so it is one document")
            return None
        self._boundaries[file.format] = boundary
        guess = "" if known else " (assumed: nobody says which tokenizer made it)"
        self._say(file, f"documents: {boundary}{guess}")
        return boundary

    def _read_bos_index(self, file: TokenFile, tokens: np.ndarray, boundary: Boundary) -> Optional[np.ndarray]:
        if not boundary.first or not automodel.index_path(file.path).is_file():
            return None
        positions, note = automodel.read_bos_index(file, tokens, boundary.token)
        if positions is None:
            self._say(file, f"{note}; the file was scanned for it instead")
            return None
        if "byte positions" in note:
            self._say(file, note)
        return boundaries.starts_from(positions, file.num_tokens, boundary)

    def _say(self, file: TokenFile, note: str) -> None:
        self._notes.setdefault(note, []).append(file.path)


def open_token_file(path: Path, file_format: str, *, asked_for: bool = False) -> TokenFile:
    """Header and size of a file without a document index. Raises DataError."""
    if file_format == "llm_c":
        return llm_c.open_tokens(path)
    if file_format == "automodel":
        return automodel.open_tokens(path)
    return nanogpt.open_tokens(path, asked_for=asked_for)


def open_megatron(prefix: Path, unit: Unit) -> Shard:
    """Open a .bin/.idx pair, sizes checked against each other. Raises DataError."""
    bin_path, idx_path = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
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
    return Shard(file, file.map_tokens(), index.lengths, index.byte_starts, index.dtype.itemsize)


def _name_all(paths: list[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1:,} more"
