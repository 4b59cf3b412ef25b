"""Documents in a file that has no index: found once by the token before or after each, and remembered.

In: ids and what is known of the tokenizer. Out: the token at which each document begins. Nothing is dropped: what comes
before the first boundary token, or after the last, is a document too.
Memory: 8 bytes per document; time: one pass over the file, in blocks.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np

from steep.core.errors import DataError
from steep.core.files import atomic_writer
from steep.core.fingerprint import fingerprint
from steep.store.token_file import TokenFile

REMEMBERED_BYTES = 1 << 26
"""Positions in larger files are kept in the cache directory. Scanning a smaller one takes no time."""
GPT2_END_OF_TEXT = 50256
LLAMA3_BEGIN_OF_TEXT = 128000


@dataclass(frozen=True)
class Boundary:
    """The token at every document's edge, and on which side it is."""

    token: int
    first: bool
    """Before each document (BOS); else after it (EOS)."""

    def __str__(self) -> str:
        return f"each {'begins' if self.first else 'ends'} with token {self.token}"


def default_cache_directory() -> Path:
    """$STEEP_CACHE, else ~/.cache/steep."""
    return Path(os.environ.get("STEEP_CACHE") or "~/.cache/steep").expanduser()


def choose_boundary(
    file: TokenFile, tokens: np.ndarray, eos_id: Optional[int], bos_id: Optional[int]
) -> Optional[Boundary]:
    """The boundary token of a file: found by its first token, else its last, else by what its format's writers do,
    which also decides when the same token is at both ends. None when neither token occurs.
    """
    if not len(tokens):
        return None
    known = [token for token in (bos_id, eos_id) if token is not None]
    for token in known:
        if tokens[0] == token and (file.boundary_first or tokens[-1] != token):
            return Boundary(token, first=True)
    if eos_id is not None and tokens[-1] == eos_id:
        return Boundary(eos_id, first=False)
    usual = known if file.boundary_first else known[::-1]
    for token in usual:
        if occurs(file, token):
            return Boundary(token, first=file.boundary_first or token != eos_id)
    return None


def assumed_token(file: TokenFile, tokens: np.ndarray) -> Optional[int]:
    """The probable boundary token of a file whose tokenizer is not known."""
    if file.begins_with_boundary:
        return int(tokens[0]) if len(tokens) else None
    return GPT2_END_OF_TEXT if file.dtype.itemsize == 2 else LLAMA3_BEGIN_OF_TEXT


def document_starts(file: TokenFile, boundary: Boundary, cache_directory: Optional[Path] = None) -> np.ndarray:
    """(documents,) int64: the token at which each document begins, 0 first. From the cache if the file has not changed."""
    if file.num_bytes < REMEMBERED_BYTES:
        return starts_from(positions_of(file, boundary.token), file.num_tokens, boundary)
    memory = _memory_path(file, str(boundary), cache_directory or default_cache_directory())
    remembered = _recall(memory, file.num_tokens)
    if remembered is not None:
        return remembered
    starts = starts_from(positions_of(file, boundary.token), file.num_tokens, boundary)
    _remember(memory, starts)
    return starts


def starts_from(positions: np.ndarray, num_tokens: int, boundary: Boundary) -> np.ndarray:
    """Where documents begin, from the positions of the boundary token."""
    starts = positions if boundary.first else positions + 1
    if len(starts) and starts[-1] == num_tokens:
        starts = starts[:-1]
    if num_tokens and (not len(starts) or starts[0] != 0):
        starts = np.concatenate([[0], starts])
    return starts.astype(np.int64, copy=False)


def positions_of(file: TokenFile, token: int) -> np.ndarray:
    """(occurrences,) int64, ascending: the positions of `token`."""
    blocks = file.blocks(with_holes=token == 0)
    found = [np.flatnonzero(block == token) + begin for begin, block in blocks]
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def occurs(file: TokenFile, token: int) -> bool:
    """Whether `token` occurs in the file."""
    return any(bool((block == token).any()) for _, block in file.blocks(with_holes=token == 0))


def largest_id(file: TokenFile, cache_directory: Optional[Path] = None) -> int:
    """The largest id, -1 without any. The result is remembered for large files. Raises DataError for a negative id."""
    memory = _memory_path(file, "largest", cache_directory or default_cache_directory())
    large = file.num_bytes >= REMEMBERED_BYTES
    remembered = _load(memory) if large else None
    if remembered is not None and remembered.shape == (1,) and remembered.dtype == np.int64:
        return int(remembered[0])
    largest = 0 if file.num_tokens else -1
    for begin, block in file.blocks(with_holes=False):
        largest = max(largest, int(block.max()))
        if block.dtype.kind == "i" and block.min() < 0:
            at = int(np.argmax(block < 0))
            raise DataError(
                f"{file.path}: token {begin + at:,} is {block[at]}; ids are 0 or more. The file is damaged."
            )
    if large:
        _remember(memory, np.array([largest], dtype=np.int64))
    return largest


def _memory_path(file: TokenFile, what: str, directory: Path) -> Path:
    """Named after the file's present state: a file that is changed, moved or touched is scanned again."""
    status = file.path.stat()
    facts = [os.path.realpath(file.path), status.st_size, status.st_mtime_ns, str(file.dtype), file.header_bytes, what]
    return directory / "scanned" / f"{fingerprint(facts)}.npy"


def _recall(memory: Path, num_tokens: int) -> Optional[np.ndarray]:
    """The remembered starts, if there are any and they are plausible."""
    starts = _load(memory)
    if starts is None or starts.dtype != np.int64 or starts.ndim != 1 or not len(starts):
        return None
    return starts if starts[0] == 0 and starts[-1] < num_tokens and np.all(np.diff(starts) > 0) else None


def _load(memory: Path) -> Optional[np.ndarray]:
    try:
        array: np.ndarray = np.load(memory, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None  # not remembered, or a damaged memory: the file is scanned
    return array


def _remember(memory: Path, array: np.ndarray) -> None:
    """Keep an array for the next time. Where it cannot be written, the file is scanned every time."""
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(memory) as stream:
            np.lib.format.write_array(stream, array, allow_pickle=False)
