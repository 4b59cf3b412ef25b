"""The folder that `prepare` writes: its content while it is unfinished, its lock, and what may not be overwritten.

Standard input can be neither split nor read twice, so a copy of it lies in the unfinished folder until the end. A killed
`prepare` continues when the same text is piped in again.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steep.core.errors import DataError
from steep.core.file_errors import NO_SPACE
from steep.core.files import atomic_writer
from steep.core.lock import FileLock, LockHeldError
from steep.sources.config import SourceConfig
from steep.sources.inputs import STANDARD_INPUT, paths_of
from steep.store.formats import writable_formats
from steep.store.manifest import (
    CONTAMINATED_FILE,
    MANIFEST_FILE,
    PREPARE_FOLDER,
    REJECTED_FILE,
    SIDECAR_SUFFIX,
    TOKENIZER_FOLDER,
    has_manifest,
)

IDENTITY_FILE = "plan.json"
LOCK_FILE = "lock"
SPOOL_FILE = "standard_input"
SHOWN_NAME = "standard input"
_BLOCK_BYTES = 1 << 20


def record_path(out: Path, name: str) -> Path:
    """Where a finished shard's entry is kept until the manifest is written; it is the last file of a shard."""
    return out / PREPARE_FOLDER / f"{name}.json"


def rejected_path(out: Path, name: str) -> Path:
    """Where the rejected records of one shard are kept until all are joined."""
    return out / PREPARE_FOLDER / f"{name}.rejected.jsonl"


def check_folder(out: Path) -> None:
    """Refuse to write beside files that are not ours."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: is a file; the token store needs a folder.")
    visible = [path for path in out.iterdir() if not path.name.startswith(".")]
    if visible and not has_manifest(out) and not (out / PREPARE_FOLDER).is_dir():
        raise DataError(
            f"{out}: is not empty and not a token store (it holds {visible[0].name}). Choose another folder."
        )


def remove_store(out: Path) -> None:
    """Delete what `prepare` writes, the manifest first, so that half a store never looks complete. The lock stays."""
    (out / MANIFEST_FILE).unlink(missing_ok=True)
    for name in (REJECTED_FILE, CONTAMINATED_FILE):
        (out / name).unlink(missing_ok=True)
    for folder in (TOKENIZER_FOLDER, *writable_formats()):
        shutil.rmtree(out / folder, ignore_errors=True)
    for path in [*out.glob("shard_*.bin"), *out.glob("shard_*.idx"), *out.glob(f"shard_*{SIDECAR_SUFFIX}")]:
        path.unlink()
    for path in (out / PREPARE_FOLDER).glob("*"):
        if path.name not in (LOCK_FILE, SPOOL_FILE):
            path.unlink()


def shown_name(file: str, folder: Path) -> str:
    """A source file's name in messages: its path, or `standard input` for the copy in `folder`."""
    return SHOWN_NAME if file == str(folder / SPOOL_FILE) else file


@contextlib.contextmanager
def exclusive(out: Path, wait: bool) -> Iterator[None]:
    """Hold the folder's lock, which the system releases however this process ends."""
    folder = out / PREPARE_FOLDER
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(wait)
    except LockHeldError as error:
        who = f"process {error}" if str(error) else "another process"
        raise DataError(f"{out}: {who} is preparing it now. Wait for it or stop it.") from None
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        reason = error.strerror or str(error)
        raise DataError(f"{out}: cannot be created or written: {reason}. Choose another folder.") from error
    with contextlib.ExitStack() as stack:
        stack.callback(lock.release)
        try:
            yield
        finally:
            if folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK_FILE}:
                shutil.rmtree(folder)  # a refused call leaves no trace


def refuse_other(out: Path, there: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    """Raise DataError if the store in `out` is made from something else. there, wanted: as from `store_identity`."""
    found = []
    if there["version"] != wanted["version"]:
        found.append("it was made by another version of steep")
    if there["tokenizer"] != wanted["tokenizer"]:
        found.append(f"tokenizer: {there['tokenizer']} there, {wanted['tokenizer']} now")
    for key in [*wanted["settings"], *(key for key in there["settings"] if key not in wanted["settings"])]:
        before, now = there["settings"].get(key), wanted["settings"].get(key)
        if before != now:
            found.append(f"{key}: {before} there, {now} now")
    if there["files"] != wanted["files"]:
        before, after = ({tuple(file) for file in identity["files"]} for identity in (there, wanted))
        found.append(
            f"input: {len(there['files'])} files there, {len(wanted['files'])} now; "
            f"{len(before & after)} of them with the same content"
        )
    if found:
        raise DataError(
            f"{out} {what} made from something else:\n"
            + "".join(f"  {difference}\n" for difference in found)
            + "  Choose another folder, or overwrite it (--overwrite)."
        )


def spool_standard_input(source: SourceConfig, folder: Path) -> SourceConfig:
    """Copy standard input to `folder` if the source names it (`-`), and return the source with the copy's path.

    Raises DataError if `-` is given with other paths or without a format, or if nothing is piped in.
    """
    paths = paths_of(source)
    if STANDARD_INPUT not in paths:
        return source
    if len(paths) > 1:
        raise DataError("- is standard input and was given with other paths; prepare it by itself.")
    if source.format == "auto":
        raise DataError(
            "- is standard input, whose format cannot be read from a file name: add --input-format jsonl or plain_text."
        )
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError(
            "- is standard input, and nothing is piped into it. For example: zcat a.gz | steep prepare - ..."
        )
    with atomic_writer(folder / SPOOL_FILE) as file:
        shutil.copyfileobj(sys.stdin.buffer, file, _BLOCK_BYTES)
    return source.model_copy(update={"path": str(folder / SPOOL_FILE), "name": source.name or SHOWN_NAME})
