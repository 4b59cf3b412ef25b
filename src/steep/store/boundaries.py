"""Documents in a file that has no index: found once by the token before or after each, and remembered.

In: ids and what is known of the tokenizer. Out: the token at which each document begins. Nothing is dropped: what comes
before the first boundary token, or after the last, is a document too.
Memory: 8 bytes per document; time: one pass over the file, in blocks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np

from steep.core.arrays import write_array
from steep.core.cache_directory import default_cache_directory
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
    for token in known if file.boundary_first else known[::-1]:
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

    def scan() -> np.ndarray:
        return starts_from(positions_of(file, boundary.token), file.num_tokens, boundary)

    def may_be_starts(found: np.ndarray) -> bool:
        is_list = found.ndim == 1 and len(found) and found[0] == 0 and found[-1] < file.num_tokens
        return bool(is_list and np.all(np.diff(found) > 0))

    return _remembered(file, str(boundary), cache_directory, may_be_starts, scan)


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

    def scan() -> np.ndarray:
        largest = 0 if file.num_tokens else -1
        for begin, block in file.blocks(with_holes=False):
            largest = max(largest, int(block.max()))
            if block.dtype.kind == "i" and block.min() < 0:
                at = int(np.argmax(block < 0))
                raise DataError(
                    f"{file.path}: token {begin + at:,} is {block[at]}; ids are 0 or more. The file is damaged."
                )
        return np.array([largest], dtype=np.int64)

    return int(_remembered(file, "largest", cache_directory, lambda found: found.shape == (1,), scan)[0])


def _remembered(
    file: TokenFile,
    what: str,
    cache_directory: Optional[Path],
    is_plausible: Callable[[np.ndarray], bool],
    scan: Callable[[], np.ndarray],
) -> np.ndarray:
    """What `scan` finds, int64; for a large file it is kept in the cache directory where that can be written.

    Kept under a name made from the file's present state: a file that is changed, moved or touched is scanned again.
    """
    if file.num_tokens * file.dtype.itemsize < REMEMBERED_BYTES:
        return scan()
    status = file.path.stat()
    facts = [os.path.realpath(file.path), status.st_size, status.st_mtime_ns, str(file.dtype), file.header_bytes, what]
    memory = (cache_directory or default_cache_directory()) / "scanned" / f"{fingerprint(facts)}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # not remembered, or a damaged memory
        remembered: np.ndarray = np.load(memory, allow_pickle=False)
        if remembered.dtype == np.int64 and is_plausible(remembered):
            return remembered
    found = scan()
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(memory) as stream:
            write_array(stream, found)
    return found
