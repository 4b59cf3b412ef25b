"""metrics.jsonl: one JSON object per line, for programs.

Each line is appended whole and handed to the operating system at once, so a killed process loses no line. If the machine
fails, at most the lines since the last checkpoint are lost: `flush` makes them durable then.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from steep.core.files import atomic_writer
from steep.trackers.tracker import Record, Tracker, storable_text

FILE_NAME = "metrics.jsonl"


class JsonlTracker(Tracker):
    """Appends every record to metrics.jsonl."""

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def start(self, run_directory: Path, config: Mapping[str, Any]) -> None:
        path = Path(run_directory) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _cut_torn_line(path)
        self._open(path)

    def _open(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "a", encoding="utf-8", newline="\n", buffering=1)  # noqa: SIM115

    def rewind(self, step: int) -> None:
        """Drop what a run that continues after `step` updates will write again; see `truncate_after`."""
        if self._file is not None:
            self.close()
            truncate_after(self._path, step)
            self._open(self._path)

    def log(self, record: Record) -> None:
        if self._file is not None:
            self._file.write(record_line(record))

    def flush(self) -> None:
        """Hand everything to the operating system and the disk (at every checkpoint)."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None


def build() -> JsonlTracker:
    """The tracker that is always used, as the console is."""
    return JsonlTracker()


def record_line(record: Record) -> str:
    """One record as a line, newline included. Numbers that are not finite become null, so that it is standard JSON."""
    return json.dumps(_finite(dict(record)), ensure_ascii=False, separators=(", ", ": "), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The value with None for floats that JSON cannot represent, and lone surrogates (which UTF-8 cannot) replaced."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return storable_text(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_records(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl in order. Lines that are not JSON objects (cut by a kill) are skipped."""
    with open(path, "rb") as file:
        for line in file:
            record = _parse(line)
            if record is not None:
                yield record


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def truncate_after(path: str | os.PathLike[str], step: int) -> int:
    """Drop what a run resumed from a checkpoint after `step` updates will write again; returns the number of lines dropped.

    Training lines below `step` are kept, and held-out scores and samples up to and including `step`, whose weights the
    checkpoint holds. Events are kept, because they say what happened to the process. Half-written lines are dropped. The file is
    replaced atomically, and not touched where there is nothing to drop. A missing file stays missing.
    """
    path = Path(path)
    if not path.exists():
        return 0
    with open(path, "rb") as old:
        dropped = sum(not _is_kept(line, step) for line in old)
        if dropped:
            old.seek(0)
            with atomic_writer(path) as new:
                new.writelines(line for line in old if _is_kept(line, step))
    return dropped


def _is_kept(line: bytes, step: int) -> bool:
    record = _parse(line)
    if record is None or not line.endswith(b"\n"):
        return False
    at, kind = record.get("step"), record.get("kind")
    if kind == "event" or not isinstance(at, (int, float)):
        return True
    return at < step if kind == "train" else at <= step


def _cut_torn_line(path: Path) -> None:
    """Truncate the file after its last newline: only a killed process leaves text after it."""
    with open(path, "r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
