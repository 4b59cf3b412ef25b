"""One run per directory, seen from real processes."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from steep.core.errors import CheckpointError
from steep.core.lock import LOCK_NAME, FileLock, LockHeldError, RunLock, is_stale

HOLD = """
import sys, time
from steep.core.lock import RunLock
with RunLock(sys.argv[1]) as lock:
    print("held", flush=True)
    sys.stdin.readline()
"""


def start_holder(directory: Path) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(directory)], **pipes)
    assert process.stdout.readline() == "held\n"
    return process


def stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_the_second_run_is_refused_naming_pid_and_host(tmp_path):
    holder = start_holder(tmp_path / "run")
    try:
        with pytest.raises(CheckpointError, match=f"in use by process {holder.pid} on {socket.gethostname()}"):
            RunLock(tmp_path / "run").acquire()
        os.rename(tmp_path / "run", tmp_path / "moved")
        with pytest.raises(CheckpointError, match=f"process {holder.pid}"):
            RunLock(tmp_path / "moved").acquire()
        holder.communicate("end\n")
        assert holder.returncode == 0
        RunLock(tmp_path / "moved").acquire().release()
    finally:
        stop(holder)


def test_the_lock_of_a_killed_run_is_stale(tmp_path):
    holder = start_holder(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == holder.pid
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
        with pytest.raises(CheckpointError, match=f"process {os.getpid()}"):
            RunLock(tmp_path).acquire()
    stop(holder)


@pytest.mark.parametrize("content", [b"", b"not json", b"[1]", b"[" * 4000, b'{"pid": true}', b"\xff"])
def test_unreadable_content_does_not_matter_while_nobody_holds_the_lock(tmp_path, content):
    (tmp_path / LOCK_NAME).write_bytes(content)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="run directory .*file/run cannot be used"):
        RunLock(tmp_path / "file" / "run").acquire()


def test_which_owners_are_known_to_be_gone(tmp_path):
    holder = start_holder(tmp_path)
    owner = json.loads((tmp_path / LOCK_NAME).read_text())
    assert not is_stale(owner)
    assert is_stale({**owner, "boot_id": "another boot"})
    assert not is_stale({**owner, "host": "elsewhere", "boot_id": "another boot"})
    stop(holder)
    assert is_stale(owner)


@pytest.mark.parametrize("left", ["", "999999999"])
def test_a_refused_process_waits_for_the_owner_to_be_named(tmp_path: Path, left: str) -> None:
    """left: what stands in the file when the lock is taken, of nobody or of a process that was killed."""
    path = tmp_path / "lock"
    path.write_text(left)
    with path.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        naming = threading.Timer(0.2, path.write_text, [str(os.getpid())])
        naming.start()
        with pytest.raises(LockHeldError, match=f"^{os.getpid()}$"):
            FileLock(path).acquire()
        naming.join()


def test_a_lock_that_is_given_back_meanwhile_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    held = path.open("r+")
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(0.2, held.close).start()
    with FileLock(path):
        assert path.read_text() == str(os.getpid())
