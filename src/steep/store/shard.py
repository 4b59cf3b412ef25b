"""One file of tokens with its documents, whatever wrote it: what a store is made of.

A format gives a Shard. `ShardOpener` is what the files of one store share: it decides once, by the first file that shows
it, where the boundary token is, and says what a person should know.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np

from steep.core.files import sha256_file
from steep.core.say import Say
from steep.store import bos_index, boundaries
from steep.store.blocks import BlockCheck
from steep.store.boundaries import Boundary
from steep.store.token_file import TokenFile

_SAMPLE_BYTES = 1 << 20

Unit = Literal["documents", "sequences"]


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
    index_path: Optional[Path] = None
    """The index that says where documents begin, and represents that in `content`; None: `starts` does."""
    blocks: Optional[BlockCheck] = None
    """Compares what is read with its checksums, where there are any."""

    def read(self, first: int, stop: int) -> np.ndarray:
        """(stop - first,) view of the tokens [first, stop), compared with its checksums. Raises DataError for damage."""
        if self.blocks is not None:
            self.blocks.check(first, stop)
        return self.tokens[first:stop]

    @property
    def path(self) -> Path:
        """The file with the tokens."""
        return self.file.path

    @property
    def format(self) -> str:
        """Its format."""
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
        """What identifies the content: size, first and last megabyte, and where documents begin.

        A change in the middle of a large file that keeps every document's length is not noticed.
        """
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            digest = hashlib.sha256(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
        if self.index_path is not None:
            return [size, sha256_file(self.index_path), digest.hexdigest()]
        starts = hashlib.sha256(np.ascontiguousarray(self.starts).data)
        return [self.format, size, starts.hexdigest(), digest.hexdigest()]


@dataclass
class ShardOpener:
    """What the files of one store share while they are opened."""

    unit: Unit = "documents"
    eos_id: Optional[int] = None
    bos_id: Optional[int] = None
    cache_directory: Optional[Path] = None
    asked_for: Optional[str] = None
    """The format, if the user named it."""
    _boundaries: dict[str, Boundary] = field(default_factory=dict)
    _notes: dict[str, list[Path]] = field(default_factory=dict)

    def say_notes(self, say: Say) -> None:
        """Say what was assumed or found out, in one line for all files that it is true of."""
        for note, paths in self._notes.items():
            others = f" and {len(paths) - 1:,} more" if len(paths) > 1 else ""
            say(f"{paths[0]}{others}: {note}")

    def without_index(self, file: TokenFile) -> Shard:
        """The shard of a file whose documents are found by the boundary token."""
        tokens = file.map_tokens()
        if file.note:
            self._note(file, file.note)
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
                self._note(file, f"holds no end-of-text token ({ids}), so it is one document")
            return None
        self._boundaries[file.format] = boundary
        guess = "" if known else " (assumed: the tokenizer that made it is not known)"
        self._note(file, f"documents: {boundary}{guess}")
        return boundary

    def _read_bos_index(self, file: TokenFile, tokens: np.ndarray, boundary: Boundary) -> Optional[np.ndarray]:
        if not boundary.first or not bos_index.index_path(file.path).is_file():
            return None
        positions, remark = bos_index.read_bos_index(file, tokens, boundary.token)
        if positions is None:
            self._note(file, f"{remark}; the file was scanned for it instead")
            return None
        if remark:
            self._note(file, remark)
        return boundaries.starts_from(positions, file.num_tokens, boundary)

    def _note(self, file: TokenFile, note: str) -> None:
        self._notes.setdefault(note, []).append(file.path)
