"""The folder that `prepare` writes: its content while it is unfinished, its lock, and what may not be overwritten."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steep.core.errors import DataError
from steep.core.lock import FileLock, LockHeldError
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
from steep.store.spool import SPOOL_FILE
from steep.store.writer import NO_SPACE

IDENTITY_FILE = "plan.json"
LOCK_FILE = "lock"


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


def remove_shard(out: Path, name: str) -> None:
    """Delete a shard without documents."""
    for suffix in (".bin", ".idx", SIDECAR_SUFFIX):
        (out / f"{name}{suffix}").unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(out: Path, wait: bool) -> Iterator[None]:
    """Hold the folder's lock, which the system releases however this process ends."""
    lock = FileLock(out / PREPARE_FOLDER / LOCK_FILE)
    try:
        lock.acquire(wait)
    except LockHeldError as error:
        who = str(error) or "(unknown)"
        raise DataError(f"{out}: process {who} is preparing it now. Wait for it or stop it.") from None
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        reason = error.strerror or str(error)
        raise DataError(f"{out}: cannot be created or written: {reason}. Choose another folder.") from error
    with contextlib.ExitStack() as stack:
        stack.callback(lock.release)
        stack.callback(_remove_empty_prepare_folder, out)
        yield


def _remove_empty_prepare_folder(out: Path) -> None:
    """Remove the lock's folder if nothing else is in it, so that a refused call leaves no trace."""
    folder = out / PREPARE_FOLDER
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK_FILE}:
        shutil.rmtree(folder)


def refuse_other(out: Path, there: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    """Raise DataError if the store in `out` is made from something else. there, wanted: as from `store_identity`."""
    differences = identity_differences(there, wanted)
    if differences:
        raise DataError(
            f"{out} {what} made from something else:\n"
            + "".join(f"  {difference}\n" for difference in differences)
            + "  Choose another folder, or overwrite it (--overwrite)."
        )


def identity_differences(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs between two identities, in words."""
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
    return found
