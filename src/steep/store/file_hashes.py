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
    names = _real_paths(paths)
    entries = [_known_entry(path, known.get(name)) for path, name in zip(paths, names, strict=True)]
    missing = [number for number, entry in enumerate(entries) if entry is None]
    with (
        ThreadPoolExecutor() as pool
    ):  # threads only for what is hashed: 200,000 known files would cost more there than here
        for number, entry in zip(missing, pool.map(lambda number: _new_entry(paths[number]), missing), strict=True):
            entries[number] = entry
    found = {name: entry for name, entry in zip(names, entries, strict=True) if entry is not None}
    if memory is not None and any(known.get(path) != entry for path, entry in found.items()):
        with contextlib.suppress(OSError):  # a cache that is only read: next time they are hashed again
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, {**known, **found})
    hashed = (found[name] for name in names)
    return [HashedFile(entry["sha256"], entry["size"], entry["modified"]) for entry in hashed]


def _real_paths(paths: list[Path]) -> list[str]:
    """As os.path.realpath gives, which looks at every folder of a path: here each folder is resolved once."""
    folders: dict[str, str] = {}
    found = []
    for path in map(str, paths):
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        is_plain = name not in ("", "..", ".") and not os.path.islink(path)
        found.append(os.path.join(folders[folder], name) if is_plain else os.path.realpath(path))
    return found


def check_unchanged(path: Path, size: int, modified: int) -> None:
    """Raise DataError if a file has changed since it was hashed: a growing log, a copy in progress."""
    with reading(path):
        state = os.stat(path)
    if (state.st_size, state.st_mtime_ns) != (size, modified):
        raise DataError(
            f"{path}: changed while it was being read ({size:,} bytes when it was hashed, {state.st_size:,} now). "
            "Wait until it is complete, then run the same command again, with --overwrite if it asks for that."
        )


def _known_entry(path: Path, before: Optional[dict[str, Any]]) -> Optional[dict[str, Any]]:
    """What is remembered of a file, if it is still that of the file as it is now."""
    if not isinstance(before, dict):
        return None
    with reading(path):
        state = os.stat(path)
    identity = (state.st_ino, state.st_size, state.st_mtime_ns)
    settled = before.get("hashed", 0) - state.st_mtime_ns > SETTLED_NANOSECONDS
    same = settled and (before.get("inode"), before.get("size"), before.get("modified")) == identity
    return before if same else None


def _new_entry(path: Path) -> dict[str, Any]:
    with reading(path):
        state = os.stat(path)
        hashed = time.time_ns()
        sha256 = sha256_file(path)
        check_unchanged(path, state.st_size, state.st_mtime_ns)
        identity = {"inode": state.st_ino, "size": state.st_size, "modified": state.st_mtime_ns}
        return {**identity, "hashed": hashed, "sha256": sha256}
