"""One run per run directory: the second one refuses and names the first. No torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from steep.core.errors import CheckpointError

LOCK_NAME = "run.lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """Held while a process trains in `run_directory`; a context manager.

    The kernel's lock on `run.lock` decides, so a killed run frees it at once and moving the directory keeps it. The
    file's content (pid, host, boot id, start) is for the message, and decides only where the file system has no locks:
    then an owner on this host that is dead or from before the last boot is stale, one on another host must be
    cleared by hand. Weakness: a child forked while the lock is held keeps it until it ends.
    """

    def __init__(self, run_directory: str | os.PathLike[str]):
        self.path = Path(run_directory) / LOCK_NAME
        self.stale_owner: dict[str, Any] | None = None
        """Who held the lock and was killed, if so: {"pid", "host", "boot_id", "started"}."""
        self._descriptor: int | None = None

    def acquire(self) -> RunLock:
        """Take the lock. Raises CheckpointError naming who holds it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CheckpointError(f"the run directory {self.path.parent} cannot be used: {error.strerror}") from error
        try:
            self._take(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return self

    def release(self) -> None:
        """Give the lock back. The emptied file stays: removing it would race with a run that has just opened it."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._refusal(_read_owner(descriptor)) from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise CheckpointError(f"{self.path} cannot be locked: {error.strerror}") from error
            self._refuse_by_content(_read_owner(descriptor))
        self.stale_owner = _read_owner(descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)

    def _refusal(self, owner: dict[str, Any] | None) -> CheckpointError:
        who = "another process"
        if owner:
            who = f"process {owner['pid']} on {owner['host']}, since {owner['started']}"
        return CheckpointError(
            f"the run directory {self.path.parent} is in use by {who}. "
            "Wait for it, stop it, or give this run another run.name."
        )

    def _refuse_by_content(self, owner: dict[str, Any] | None) -> None:
        if owner is None or is_stale(owner):
            return
        if owner["host"] != socket.gethostname():
            raise CheckpointError(f"{self._refusal(owner)} If that run is gone, delete {self.path}.")
        raise self._refusal(owner)


def is_stale(owner: dict[str, Any]) -> bool:
    """Whether the owner of a lock is known to be gone: on this host, and dead or from before the last boot."""
    if owner["host"] != socket.gethostname():
        return False
    if owner["boot_id"] != _boot_id():
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # alive, of another user
        return False
    return owner["pid"] == os.getpid()


def _this_process() -> dict[str, Any]:
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot_id": _boot_id(), "started": started}


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux: pids alone decide
        return ""


def _read_owner(descriptor: int) -> dict[str, Any] | None:
    """The owner in the lock file; None if it is empty or not what a RunLock writes."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, RecursionError):
        return None
    types = {"pid": int, "host": str, "boot_id": str, "started": str}
    valid = isinstance(owner, dict) and all(isinstance(owner.get(key), kind) for key, kind in types.items())
    return owner if valid and 0 < owner["pid"] < 2**31 else None
