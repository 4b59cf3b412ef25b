"""SHA-256 of input files, remembered, so that a restarted run does not first read its whole corpus.

A remembered hash is used only while path, inode, size and modification time are the same, and only if the file had not been
modified in the two seconds before it was hashed (file systems with coarse times could hide a later change).
Weakness: a file rewritten in place with its size and modification time restored deliberately is not noticed.
"""

from __future__ import annotations

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Optional

from steep.core.errors import DataError
from steep.core.files import read_json, sha256_file, write_json
from steep.sources.files import reading

SETTLED_NANOSECONDS = 2 * 10**9


class HashedFile(NamedTuple):
    """A file as it was when it was hashed."""

    sha256: str
    """As hex."""
    size: int
    """In bytes."""
    modified: int
    """Modification time in nanoseconds."""


def hash_files(paths: list[Path], memory: Optional[Path] = None) -> list[HashedFile]:
    """SHA-256 of each file, on all cores. memory: a JSON file of hashes to use and to extend.

    Raises DataError naming a file that cannot be read, or that changes meanwhile.
    """
    known: dict[str, Any] = {}
    if memory is not None:
        with contextlib.suppress(
            OSError, ValueError
        ):  # not there or damaged: everything is hashed again, and it is rewritten
            known = read_json(memory)
    with ThreadPoolExecutor() as pool:
        entries = list(pool.map(lambda path: _entry(path, known), paths))
    found = {os.path.realpath(path): entry for path, entry in zip(paths, entries, strict=True)}
    if memory is not None and any(known.get(path) != entry for path, entry in found.items()):
        with contextlib.suppress(OSError):  # a cache that is only read: next time they are hashed again
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, {**known, **found})
    return [HashedFile(entry["sha256"], entry["size"], entry["modified"]) for entry in entries]


def check_unchanged(path: Path, size: int, modified: int) -> None:
    """Raise DataError if a file has changed since it was hashed: a growing log, a copy in progress."""
    with reading(path):
        state = os.stat(path)
    if (state.st_size, state.st_mtime_ns) != (size, modified):
        raise DataError(
            f"{path}: changed while it was being read ({size:,} bytes when it was hashed, {state.st_size:,} now). "
            "Wait until it is complete, then run the same command again, with --overwrite if it asks for that."
        )


def _entry(path: Path, known: dict[str, Any]) -> dict[str, Any]:
    with reading(path):
        state = os.stat(path)
        identity = {"inode": state.st_ino, "size": state.st_size, "modified": state.st_mtime_ns}
        before = known.get(os.path.realpath(path), {})
        settled = before.get("hashed", 0) - state.st_mtime_ns > SETTLED_NANOSECONDS
        if settled and all(before.get(key) == value for key, value in identity.items()):
            return before
        hashed = time.time_ns()
        sha256 = sha256_file(path)
        check_unchanged(path, state.st_size, state.st_mtime_ns)
        return {**identity, "hashed": hashed, "sha256": sha256}
