"""Files that are either whole or absent: written under a temporary name, fsynced, renamed.

A reader never sees half a file, and a process killed at any moment leaves the previous version in place. A kill can leave
files behind whose names start with `TEMPORARY_PREFIX`; `remove_leftovers` deletes them. `atomic_folder` does the same
for folders.
Weakness: on a file system without atomic rename (some FUSE mounts) none of this is guaranteed.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from steep.core.errors import DamagedFileError
from steep.core.lock import is_alive

TEMPORARY_PREFIX = ".partial-"


def temporary_path(path: Path) -> Path:
    """Where `path` is written before it is renamed into place: same folder, so that the rename is atomic."""
    return path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")


@contextlib.contextmanager
def atomic_writer(
    path: str | os.PathLike[str], mode: str = "wb", *, sync_folder: bool = True, **open_arguments: Any
) -> Iterator[IO[Any]]:
    """Open a file that appears at `path`, complete and fsynced, only when the block ends without an exception.

    sync_folder: also make its name durable; False if another file is written to the same folder right after.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        with open(temporary, mode, **open_arguments) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync_folder:
        sync_directory(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The name of a folder to make, which becomes `path` when the block ends without an exception, and is removed otherwise.

    It replaces a folder at `path`. What killed processes left of earlier attempts is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    for leftover in path.parent.glob(f"{TEMPORARY_PREFIX}*-{glob.escape(path.name)}"):
        owner = leftover.name.removeprefix(TEMPORARY_PREFIX).split("-")[0]
        # In a container the process that was killed may have had this one's number.
        if leftover == temporary or (owner.isdigit() and not is_alive(int(owner))):
            shutil.rmtree(leftover)
    try:
        yield temporary
        sync_directory(temporary)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_writer(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file atomically, indented, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file. Raises OSError or DamagedFileError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise damaged(path, f"it is not UTF-8: byte {error.object[error.start]:#04x} at {error.start:,}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file. Raises OSError, or DamagedFileError, which is a ValueError too."""
    try:
        return json.loads(read_text(path))
    except RecursionError as error:
        raise damaged(path, "it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise damaged(path, f"it is not JSON: line {error.lineno}: {error.msg}") from error


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises as `read_json` does."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise damaged(path, f"it holds {type(value).__name__}, and an object is needed")
    return value


def damaged(path: str | os.PathLike[str], reason: str) -> DamagedFileError:
    """The error of a file that cannot be what was written."""
    return DamagedFileError(f"{path} is damaged: {reason}. Restore it from a copy, or remove it")


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` durable. A no-op where directories cannot be opened (Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(directory: Path) -> list[Path]:
    """Delete what killed writers left in `directory` (not below it) and return what was deleted."""
    leftovers = sorted(directory.glob(f"{TEMPORARY_PREFIX}*"))
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return leftovers


def free_bytes(folder: Path) -> int | None:
    """Free space on the disk of a folder, or of the nearest folder above it that exists; None where it cannot be asked."""
    try:
        existing = next((path for path in (folder, *folder.absolute().parents) if path.exists()), None)
        return None if existing is None else shutil.disk_usage(existing).free
    except OSError:
        return None


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file as hex. Releases the interpreter lock while hashing."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
