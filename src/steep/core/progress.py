"""Progress of one long operation: a live bar on a terminal, occasional lines elsewhere, both with rate and time left.

Standard library only; rich is imported when a bar is drawn. Output goes to standard error, so that what a command
prints for a program stays clean.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from steep.core.units import format_bytes, format_count, format_seconds

SECONDS_BETWEEN_LINES = 10.0
"""A plain line appears at least this often while there is progress."""

SHARE_BETWEEN_LINES = 0.1
"""A plain line appears after this share of the total, but not more than once a second."""


class Progress:
    """How much of `total` is done (None: the total is unknown). The base class is silent."""

    def __init__(self, description: str, total: int | None, unit: str, clock: Callable[[], float] = time.monotonic):
        self.description = description
        self.total = total
        self.unit = unit
        self.completed = 0
        self._clock = clock
        self._started = clock()

    def advance(self, count: int = 1) -> None:
        """`count` more are done."""
        self.update(self.completed + count)

    def update(self, completed: int, total: int | None = None) -> None:
        """`completed` are done in all. total: where it has become known, or has grown."""
        self.completed = completed
        self.total = self.total if total is None else total
        self._show()

    def _show(self) -> None:
        """Shows nothing; the other classes do."""

    def finish(self) -> None:
        """Leave the last state on the screen."""

    def line(self) -> str:
        """`reading: 12.3k of 50k documents (25 %), 812 documents/s, 47 s left`."""
        seconds = max(self._clock() - self._started, 1e-9)
        rate = self.completed / seconds
        parts = [f"{self.description}: {show_amount(self.completed, self.total, self.unit)}"]
        if self.total:
            parts[0] += f" ({100 * self.completed / self.total:.0f} %)"
        if self.completed:
            parts.append(show_rate(rate, self.unit))
        if self.total and 0 < self.completed < self.total:
            parts.append(f"{format_seconds((self.total - self.completed) / rate)} left")
        elif self.completed:
            parts.append(f"{format_seconds(seconds)} so far" if self.total is None else format_seconds(seconds))
        return ", ".join(parts)


class LineProgress(Progress):
    """A line every ten per cent or ten seconds, at most one a second; one at the end if there was one before.

    say: takes each line.
    """

    def __init__(self, description: str, total: int | None, unit: str, say: Callable[[str], None],
                 clock: Callable[[], float] = time.monotonic):  # fmt: skip
        super().__init__(description, total, unit, clock)
        self._say = say
        self._shown_at = self._started
        self._shown: int | None = None

    def _show(self) -> None:
        waited = self._clock() - self._shown_at
        share = (self.completed - (self._shown or 0)) / self.total if self.total else 0.0
        regular = self._shown is not None or waited >= self._seconds_before_the_first
        if waited >= SECONDS_BETWEEN_LINES or (regular and waited >= 1 and share >= SHARE_BETWEEN_LINES):
            self._write()

    _seconds_before_the_first = SECONDS_BETWEEN_LINES

    def finish(self) -> None:
        """Write the last line, where something was written before."""
        if self._shown is not None and self._shown != self.completed:
            self._write()

    def _write(self) -> None:
        self._shown, self._shown_at = self.completed, self._clock()
        self._say(self.line())


class PlainProgress(LineProgress):
    """The same to a stream, with a first line after a second and always one at the end."""

    _seconds_before_the_first = 1.0

    def __init__(self, description: str, total: int | None, unit: str, stream: TextIO,
                 clock: Callable[[], float] = time.monotonic):  # fmt: skip
        super().__init__(description, total, unit, self._to_stream, clock)
        self._stream = stream

    def finish(self) -> None:
        """Write the last line, unless it is there already."""
        if self._shown != self.completed:
            self._write()

    def _to_stream(self, line: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()


class TaskProgress(Progress):
    """A second bar of a live display, gone when it is finished."""

    def __init__(self, description: str, total: int | None, unit: str, bars: Any):
        super().__init__(description, total, unit)
        self._bars = bars
        self._task = bars.add_task(description, total=total, unit=unit)

    def _show(self) -> None:
        self._bars.update(self._task, completed=self.completed)

    def finish(self) -> None:
        """Take the bar away."""
        self._bars.remove_task(self._task)


class BarProgress(Progress):
    """A bar of rich, redrawn four times a second."""

    def __init__(self, description: str, total: int | None, unit: str, stream: TextIO):
        super().__init__(description, total, unit)
        self._bar = live_progress(stream, unit)
        self._task = self._bar.add_task(description, total=total)
        self._bar.start()

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.completed, total=self.total)

    def finish(self) -> None:
        """Draw the last state and give the terminal back."""
        self._bar.stop()


@contextlib.contextmanager
def progress_bar(
    description: str, total: int | None, unit: str, *, silent: bool = False, stream: TextIO | None = None
) -> Iterator[Progress]:
    """Show the progress of a block: `with progress_bar("reading", 500, "documents") as progress: progress.advance()`.

    unit: a plural noun; "bytes" is shown in KiB, MiB, GiB. total: None where it is not known.
    Not safe to advance from several threads at once.
    """
    stream = stream or sys.stderr
    progress: Progress
    if silent:
        progress = Progress(description, total, unit)
    elif stream.isatty() and os.environ.get("TERM", "") != "dumb":
        progress = BarProgress(description, total, unit, stream)
    else:
        progress = PlainProgress(description, total, unit, stream)
    try:
        yield progress
    finally:
        progress.finish()


@contextlib.contextmanager
def progress_when_needed(
    description: str, unit: str, stream: TextIO | None = None
) -> Iterator[Callable[[int, int], None]]:
    """A function of (completed, total) that shows a progress bar from its first call on; nothing if it is never called."""
    with contextlib.ExitStack() as stack:
        bars: list[Progress] = []

        def show(completed: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(progress_bar(description, total, unit, stream=stream)))
            bars[0].update(completed, total)

        yield show


def live_progress(stream: TextIO, unit: str) -> Any:
    """A rich Progress on `stream` with amount, rate and time left; start and stop it yourself."""
    from rich import progress as bars
    from rich.console import Console
    from rich.table import Column
    from rich.text import Text

    class AmountColumn(bars.ProgressColumn):
        """`12 of 40 steps, 0.4 steps/s`."""

        def render(self, task: bars.Task) -> Text:
            total = None if task.total is None else int(task.total)
            noun = task.fields.get("unit", unit)
            rate = f", {show_rate(task.speed, noun)}" if task.speed else ""
            return Text(show_amount(int(task.completed), total, noun) + rate)

    class TimeColumn(bars.ProgressColumn):
        """`1 min 20 s left`."""

        def render(self, task: bars.Task) -> Text:
            if task.finished or task.time_remaining is None:
                return Text(format_seconds(task.elapsed or 0))
            return Text(f"{format_seconds(task.time_remaining)} left")

    return bars.Progress(
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=6)),
        AmountColumn(table_column=Column(no_wrap=True, justify="right")),
        TimeColumn(table_column=Column(no_wrap=True, justify="right")),
        console=Console(file=stream, highlight=False),
        refresh_per_second=4,
        expand=True,
        speed_estimate_period=60,
    )


def show_amount(completed: int, total: int | None, unit: str) -> str:
    """`12 of 40 steps`, `1.2 GiB of 3.0 GiB`, `512 documents`."""
    show = format_bytes if unit == "bytes" else format_count
    amount = show(completed) if total is None else f"{show(completed)} of {show(total)}"
    return amount if unit == "bytes" else f"{amount} {unit}"


def show_rate(rate: float, unit: str) -> str:
    """`812 documents/s`, `35.2 MiB/s`."""
    if unit == "bytes":
        return f"{format_bytes(rate)}/s"
    return f"{format_count(round(rate) if rate >= 10 else float(f'{rate:.2g}'))} {unit}/s"
