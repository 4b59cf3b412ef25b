"""Progress: rate and time left, few lines where there is no terminal, a bar where there is one."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from steep.core.progress import LineProgress, PlainProgress, Progress, progress_bar, show_amount, show_rate


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_a_line_holds_amount_rate_and_time_left() -> None:
    clock = Clock()
    progress = PlainProgress("reading", 50_000, "documents", io.StringIO(), clock)
    clock.seconds += 20
    progress.update(12_345)
    assert progress.line() == "reading: 12.3k of 50k documents (25 %), 617 documents/s, 1 min 01 s left"


@pytest.mark.parametrize(
    ("completed", "total", "unit", "line"),
    [
        (0, 10, "steps", "x: 0 of 10 steps (0 %)"),
        (10, 10, "steps", "x: 10 of 10 steps (100 %), 5 steps/s, 2.0 s"),
        (7, None, "records", "x: 7 records, 3.5 records/s, 2.0 s so far"),
        (0, 0, "files", "x: 0 of 0 files"),
        (2**20, 2**21, "bytes", "x: 1.0 MiB of 2.0 MiB (50 %), 512.0 KiB/s, 2.0 s left"),
        (12, 10, "steps", "x: 12 of 10 steps (120 %), 6 steps/s, 2.0 s"),
    ],
)
def test_lines_at_the_edges(completed: int, total: int | None, unit: str, line: str) -> None:
    clock = Clock()
    progress = PlainProgress("x", total, unit, io.StringIO(), clock)
    clock.seconds += 2
    progress.update(completed)
    assert progress.line() == line


def test_plain_lines_come_every_ten_per_cent() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = PlainProgress("reading", 1000, "documents", stream, clock)
    for _ in range(1000):
        clock.seconds += 0.05  # 50 s in all: 10 per cent take 5 s
        progress.advance()
    progress.finish()
    percents = [line.split("(")[1].split(" ")[0] for line in stream.getvalue().splitlines()]
    assert percents == [str(10 * n) for n in range(1, 11)]


def test_plain_lines_come_every_ten_seconds_of_a_slow_operation() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = PlainProgress("reading", None, "documents", stream, clock)
    for _ in range(60):
        clock.seconds += 1
        progress.advance()
    progress.finish()
    assert len(stream.getvalue().splitlines()) == 6


def test_a_quick_operation_is_one_line() -> None:
    stream = io.StringIO()
    with progress_bar("reading", 1000, "documents", stream=stream) as progress:
        for _ in range(1000):
            progress.advance()
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().startswith("reading: 1,000 of 1,000 documents (100 %)")
    assert "\x1b" not in stream.getvalue()


def test_a_failed_operation_shows_how_far_it_came() -> None:
    stream = io.StringIO()

    def fails() -> None:
        with progress_bar("reading", 10, "documents", stream=stream) as progress:
            progress.advance(4)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert stream.getvalue().startswith("reading: 4 of 10 documents (40 %)")


def test_silent_is_silent() -> None:
    stream = io.StringIO()
    with progress_bar("reading", 10, "documents", silent=True, stream=stream) as progress:
        progress.advance(4)
        progress.update(10)
    assert stream.getvalue() == ""
    assert type(progress) is Progress
    assert progress.completed == 10


def test_amounts_and_rates() -> None:
    assert show_amount(512, None, "documents") == "512 documents"
    assert show_amount(2**20, 2**30, "bytes") == "1.0 MiB of 1.0 GiB"
    assert show_rate(0.412, "steps") == "0.41 steps/s"
    assert show_rate(1234.5, "tokens") == "1,234 tokens/s"


def test_standard_output_stays_clean() -> None:
    code = "from steep.core.progress import progress_bar\nwith progress_bar('x', 2, 'files') as p: p.advance(2)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == ""
    assert ended.stderr.startswith("x: 2 of 2 files")


@pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminals")
def test_a_terminal_gets_a_bar() -> None:
    import pty

    master, slave = pty.openpty()
    code = (
        "from steep.core.progress import progress_bar\nwith progress_bar('reading [b]', 2, 'files') as p: p.advance(2)"
    )
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    subprocess.run([sys.executable, "-c", code], stderr=slave, check=True, env=environment)
    written = os.read(master, 65536).decode()
    os.close(slave)
    os.close(master)
    assert "reading [b]" in written
    assert "2 of 2 files" in written
    assert "\x1b[" in written


def test_lines_of_something_within_a_run_come_from_ten_seconds_on() -> None:
    clock, lines = Clock(), list[str]()
    quick = LineProgress("scoring", 100, "tokens", lines.append, clock)
    clock.seconds += 9
    quick.update(100)
    quick.finish()
    assert lines == []
    slow = LineProgress("scoring", 100, "tokens", lines.append, clock)
    for completed in (20, 40, 60, 80, 100):
        clock.seconds += 6
        slow.update(completed)
    slow.finish()
    assert [line.partition(" (")[0] for line in lines] == [f"scoring: {n} of 100 tokens" for n in (40, 60, 80, 100)]
