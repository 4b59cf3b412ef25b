"""What is noted of each document while its text is in memory, for the choice made after all have been read.

Written by the worker beside its shard, a fixed number of bytes per document, in reading order: its location
(`places`), its MinHash signature (`signatures`), what it shares with evaluation texts (`evaluation`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from steep.core.files import atomic_writer
from steep.sources.document import Document
from steep.sources.files import LinesBeforeOffset, count_lines
from steep.store.contamination import EVALUATION_DTYPE, EvaluationRuns
from steep.store.duplicates import VALUES, signatures_of
from steep.store.word_hashes import word_hashes_of

LOCATIONS, SIGNATURES, EVALUATION = "places", "signatures", "evaluation"
LOCATION_DTYPE = np.dtype([("file", "<u4"), ("row", "<i8"), ("offset", "<i8")])
_DTYPES = {LOCATIONS: LOCATION_DTYPE, SIGNATURES: np.dtype(("<u4", (VALUES,))), EVALUATION: EVALUATION_DTYPE}


def notes_path(folder: Path, shard: str, kind: str) -> Path:
    """Where the notes of a shard are."""
    return folder / f"{shard}.{kind}"


class Notes:
    """Collects the notes of one shard. Made by `open_notes`."""

    def __init__(self, files: dict[str, IO[bytes]], runs: EvaluationRuns | None):
        self._files, self._runs = files, runs
        self.source_files: list[str] = []

    def add(self, documents: Sequence[Document]) -> None:
        """Note documents that were kept, in order."""
        if LOCATIONS in self._files:
            self._files[LOCATIONS].write(
                np.array([self._location(d) for d in documents], dtype=LOCATION_DTYPE).tobytes()
            )
        if not documents or (SIGNATURES not in self._files and EVALUATION not in self._files):
            return
        words, counts = word_hashes_of([document.text for document in documents])
        if SIGNATURES in self._files:
            self._files[SIGNATURES].write(signatures_of(words, counts).astype("<u4").tobytes())
        if self._runs is not None:
            self._files[EVALUATION].write(self._runs.find(words, counts).tobytes())

    def _location(self, document: Document) -> tuple[int, int, int]:
        if not self.source_files or self.source_files[-1] != document.file:
            self.source_files.append(document.file)
        before = document.lines_before
        offset = before.offset if isinstance(before, LinesBeforeOffset) else 0
        return len(self.source_files) - 1, document.row, offset


@contextlib.contextmanager
def open_notes(folder: Path, shard: str, kinds: Sequence[str], runs: EvaluationRuns | None) -> Iterator[Notes]:
    """The notes of a shard, complete in `folder` when the block ends; none after an exception."""
    with contextlib.ExitStack() as stack:
        yield Notes({kind: stack.enter_context(atomic_writer(notes_path(folder, shard, kind))) for kind in kinds}, runs)


def read_notes(folder: Path, shard: str, kind: str) -> np.ndarray:
    """(documents, ...) array of one kind of notes, mapped from disk."""
    path = notes_path(folder, shard, kind)
    if not path.stat().st_size:
        return np.empty(0, dtype=_DTYPES[kind])
    return np.memmap(path, dtype=_DTYPES[kind], mode="r")


class Locations:
    """Finds documents in their files. Lines are counted once per file, as long as documents are asked for in reading order."""

    def __init__(self) -> None:
        self._file, self._offset, self._lines = "", 0, 0

    def find(self, source_files: list[str], location: Any) -> tuple[str, int]:
        """(file, 1-based line). source_files: of the shard's entry. location: an entry of its `places`."""
        file, offset = source_files[int(location["file"])], int(location["offset"])
        if not offset:
            return file, max(1, int(location["row"]))
        if file != self._file or offset < self._offset:
            self._file, self._offset, self._lines = file, 0, 0
        self._lines += count_lines(Path(file), offset, self._offset)
        self._offset = offset
        return file, self._lines + int(location["row"])
