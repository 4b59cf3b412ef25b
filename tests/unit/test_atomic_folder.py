"""Folders that are whole or absent: nothing is left of an attempt that failed, nor of one that was killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from steep.core.files import atomic_folder, temporary_path


def write(path: Path, text: str) -> None:
    with atomic_folder(path) as folder:
        folder.mkdir()
        (folder / "file").write_text(text)


def test_a_folder_appears_when_it_is_complete_and_replaces_an_older_one(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    for text in ("first", "second"):
        write(out, text)
        assert (out / "file").read_text() == text
        assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_or_is_interrupted_leaves_the_older_folder_alone(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    write(out, "first")

    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "file").touch()
        raise error

    with pytest.raises(error), atomic_folder(out) as folder:
        fail(folder)
    assert list(tmp_path.iterdir()) == [out]
    assert (out / "file").read_text() == "first"


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    out = tmp_path / "o[u]t"
    mine = temporary_path(out)  # of an earlier process of the same number, as in containers
    left = [
        mine,
        tmp_path / f".partial-{dead.pid}-{out.name}",
        tmp_path / f".partial-{dead.pid}-unquantized-{out.name}",
    ]
    kept = [tmp_path / f".partial-{alive.pid}-{out.name}", tmp_path / f".partial-{dead.pid}-another"]
    for folder in (*left, *kept):
        folder.mkdir()
    try:
        write(out, "text")
    finally:
        alive.communicate(b"\n")
    assert set(tmp_path.iterdir()) == {out, *kept}
