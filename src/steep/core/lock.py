"""Locks on files that the kernel frees when their holder dies; one run per run directory. No torch."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, TypeVar

from steep.core.errors import CheckpointError

LOCK_NAME = "run.lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
OWNER_SECONDS = 2.0
"""How long a process that is refused waits to read its owner, which is written just after the lock is taken, and removed just
before it is given back."""
AnyLock = TypeVar("AnyLock", bound="FileLock")


class LockHeldError(Exception):
    """Another process holds the lock."""

    def __init__(self, owner: bytes):
        super().__init__(owner.decode("utf-8", "replace"))
        self.owner = owner
        """What that process wrote into the file."""


class FileLock:
    """An exclusive lock on a file, held by this process until `release`, or until it dies; a context manager.

    The file names its owner, for the message of a process that is refused. Weakness: a child forked while the lock is held
    keeps it until it ends.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._descriptor: int | None = None

    def acquire(self: AnyLock, wait: bool = False) -> AnyLock:
        """Take the lock. Raises LockHeldError unless `wait`; OSError where the file cannot be made or locked."""
        while True:
            descriptor = self._open()
            try:
                self._take(descriptor, wait)
                if self._is_in_place(descriptor):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, self._owner_text().encode(), 0)
                    self._descriptor = descriptor
                    return self
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its holder finished and removed the file: try again with a new one

    def release(self) -> None:
        """Give the lock back. The emptied file stays: removing it here would race with a process that has just opened it."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self: AnyLock) -> AnyLock:
        return self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _take(self, descriptor: int, wait: bool) -> None:
        import fcntl  # absent on Windows, where tokenizing still imports this module

        deadline = time.monotonic() + OWNER_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                return
            except BlockingIOError:
                owner = os.pread(descriptor, 4096, 0)
                if self._is_current(owner) or time.monotonic() > deadline:
                    raise LockHeldError(owner) from None
            time.sleep(0.01)

    def _is_current(self, owner: bytes) -> bool:
        """Whether the file names a living process, not nobody yet or one that was killed while it had the lock."""
        return owner.isdigit() and is_alive(int(owner))

    def _is_in_place(self, descriptor: int) -> bool:
        """Whether the locked file is still the one under this path."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _owner_text(self) -> str:
        return str(os.getpid())


class RunLock(FileLock):
    """Held while a process trains in `run_directory`; a context manager.

    The kernel's lock on `run.lock` decides, so a killed run frees it at once and moving the directory keeps it. The
    file's content (pid, host, boot id, start) is for the message, and decides only where the file system has no locks:
    then an owner on this host that is dead or from before the last boot is stale, and one on another host must be
    cleared by hand.
    """

    def __init__(self, run_directory: str | os.PathLike[str]):
        super().__init__(Path(run_directory) / LOCK_NAME)

    def _open(self) -> int:
        try:
            return super()._open()
        except OSError as error:
            raise CheckpointError(f"the run directory {self.path.parent} cannot be used: {error.strerror}") from error

    def _take(self, descriptor: int, wait: bool) -> None:
        try:
            super()._take(descriptor, wait)
        except LockHeldError as error:
            raise CheckpointError(self._refusal(_parse_owner(error.owner))) from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise CheckpointError(f"{self.path} cannot be locked: {error.strerror}") from error
            owner = _parse_owner(os.pread(descriptor, 4096, 0))
            if owner is not None and not is_stale(owner):
                elsewhere = owner["host"] != socket.gethostname()
                hint = f" If that run is gone, delete {self.path}." if elsewhere else ""
                raise CheckpointError(self._refusal(owner) + hint) from error

    def _is_current(self, owner: bytes) -> bool:
        named = _parse_owner(owner)
        return named is not None and not is_stale(named)

    def _is_in_place(self, descriptor: int) -> bool:
        return True  # nothing removes this file, and the directory may be moved

    def _owner_text(self) -> str:
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")
        return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "boot_id": _boot_id(), "started": started})

    def _refusal(self, owner: dict[str, Any] | None) -> str:
        who = f"process {owner['pid']} on {owner['host']}, since {owner['started']}" if owner else "another process"
        return (
            f"the run directory {self.path.parent} is in use by {who}. "
            "Wait for it, stop it, or give this run another run.name."
        )


def is_stale(owner: dict[str, Any]) -> bool:
    """Whether the owner of a lock is known to be gone: on this host, and dead or from before the last boot."""
    if owner["host"] != socket.gethostname():
        return False
    if owner["boot_id"] != _boot_id():
        return True
    return owner["pid"] == os.getpid() or not is_alive(owner["pid"])


def is_alive(pid: int) -> bool:
    """Whether a process of this number runs on this host."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # alive, of another user
        return True
    return True


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux: pids alone decide
        return ""


def _parse_owner(content: bytes) -> dict[str, Any] | None:
    """The owner that a lock file names; None if it is empty or not what a RunLock writes."""
    try:
        owner = json.loads(content)
    except (ValueError, RecursionError):
        return None
    types = {"pid": int, "host": str, "boot_id": str, "started": str}
    valid = isinstance(owner, dict) and all(isinstance(owner.get(key), kind) for key, kind in types.items())
    return owner if valid and 0 < owner["pid"] < 2**31 else None
