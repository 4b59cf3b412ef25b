"""The terminal: a line every few seconds, a live bar below them, a small table per evaluation; all of it also in console.log.

The lines are plain text and complete: colour and the bar add nothing to them, and are only sent to a terminal. On a narrow
terminal whole columns are left out, the least important first, so that no line wraps. Text written by a model is cleaned of
control characters before it is shown.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from steep.core.blank_lines import fold_blank_lines
from steep.core.progress import LineProgress, Progress, TaskProgress, live_progress
from steep.metrics import METRICS, MISSING, SourceTotals, show_count, show_perplexity
from steep.runtime.preemption import discard
from steep.trackers.backends.jsonl import FILE_NAME, read_records
from steep.trackers.tracker import Record, Tracker

LOG_NAME = "console.log"
SEPARATOR = " | "
WIDTH_OF_A_FILE = 160
"""Characters per line where the output is not a terminal and COLUMNS is not set: everything fits."""

NUMBER_WIDTHS = {"loss": 5, "grad_norm": 4, "learning_rate": 7, "tokens_per_second": 5, "tokens": 5, "mfu": 5,
                 "memory_bytes": 8, "data_wait_seconds": 5, "eta_seconds": 11}  # fmt: skip
"""The columns after the step, left to right, and the width of each number in characters, so that they are aligned."""

LEAST_IMPORTANT_FIRST = ("data_wait_seconds", "mfu", "tokens", "forecast_loss", "memory_bytes", "learning_rate", "grad_norm",
                         "tokens_per_second", "eta_seconds")  # fmt: skip

RECENT_STEPS = 10
"""The mean loss of so many steps is where the loss is now."""

NARROW_RATIO = 0.05
"""A forecast's band that is narrower than this share of the loss says where the run ends, wherever the loss is now."""

TEXT_WIDTH = 16
"""Characters for the name of a held-out text, unless one in the run is longer."""


class Output:
    """Lines to a stream, above a live bar where there is one, and the same lines to a log file."""

    def __init__(self, stream: TextIO, bar: bool):
        self.stream = stream
        self.terminal = is_terminal(stream)
        self.live = bar and self.terminal
        self._log: TextIO | None = None
        self._bar: Any = None
        self._task: Any = None

    def open_log(self, path: Path) -> None:
        """Copy every line to the end of `path` from now on."""
        self._log = open(path, "a", encoding="utf-8", newline="\n", buffering=1)  # noqa: SIM115

    def line(self, text: str) -> None:
        """Write one or more lines, cleaned of control characters; shown at once."""
        text = clean_text(text)
        if self._log is not None:
            self._log.write(text + "\n")
        with self._outliving_its_reader():
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False, emoji=False, no_wrap=True, crop=False)
            else:
                self.stream.write(encodable(text, self.stream) + "\n")
                self.stream.flush()

    @contextmanager
    def _outliving_its_reader(self) -> Iterator[None]:
        """A run of days does not end because the reader of its output (head, tee) has exited or its terminal was closed."""
        try:
            yield
        except OSError as error:
            if self._log is None or error.errno not in (errno.EPIPE, errno.EIO):  # EIO: a terminal that is gone
                raise
            discard(self.stream.fileno())
            self._log.write("standard output was closed; the run continues, and its output is in this file\n")

    def show_bar(self, completed: int, total: int) -> None:
        """Draw or move the bar. Does nothing where the stream is not a terminal."""
        if not self.live:
            return
        with self._outliving_its_reader():
            if self._bar is None:
                self._bar = live_progress(self.stream, "steps")
                self._task = self._bar.add_task("training", total=total, completed=completed)
                self._bar.start()
            self._bar.update(self._task, total=total, completed=completed)

    @contextmanager
    def progress(self, description: str, total: int, unit: str) -> Iterator[Progress]:
        """Show the progress of a block: a second bar below the first, or lines where it takes longer than ten seconds."""
        shown: Progress
        if self._bar is not None:
            shown = TaskProgress(description, total, unit, self._bar)
        else:
            shown = LineProgress(description, total, unit, self.line)
        try:
            yield shown
        finally:
            shown.finish()

    def close(self) -> None:
        """Remove the bar and close the log. Lines can still be written to the stream."""
        if self._bar is not None:
            with self._outliving_its_reader():
                self._bar.stop()
            self._bar = None
        if self._log is not None:
            self._log.close()
            self._log = None


class ConsoleTracker(Tracker):
    """Prints records for people. `line` prints anything else through the same output."""

    def __init__(
        self,
        output: Output,
        width: int | None,
        log_every_seconds: float,
        log_every_steps: int | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.output = output
        self._width = width
        self.log_every_seconds, self.log_every_steps = log_every_seconds, log_every_steps
        self._clock = clock
        self._printed_at = self._step_at = 0.0
        self._recent_losses: deque[float] = deque(maxlen=RECENT_STEPS)
        self.total_steps: int | None = None
        self._has_logged = False
        self._start_scores: dict[str, float] = {}
        self._table_step: int | None = None
        self._text_width = TEXT_WIDTH
        self._sources, self._sources_from = SourceTotals(), 0

    @property
    def width(self) -> int:
        """Characters per line: as configured, else of the terminal, which may have been resized."""
        return self._width or shutil.get_terminal_size((80 if self.output.terminal else WIDTH_OF_A_FILE, 24)).columns

    def start(self, run_directory: Path, config: Mapping[str, Any]) -> None:
        run_directory = Path(run_directory)
        run_directory.mkdir(parents=True, exist_ok=True)
        self.output.open_log(run_directory / LOG_NAME)
        self._start_scores = scores_at_start(run_directory / FILE_NAME)  # of a resumed run
        texts = config.get("data", {}).get("validation", {})
        self._text_width = max([TEXT_WIDTH, *map(len, texts)])

    def expect_steps(self, total_steps: int, completed_steps: int = 0) -> None:
        """Set the length of the run and how much of it earlier processes have done; shows the bar."""
        self.total_steps = total_steps
        self.output.show_bar(completed_steps, total_steps)

    def line(self, text: str = "") -> None:
        """Print one or more lines that are not a record."""
        self._table_step = None
        self.output.line(text)

    def log(self, record: Record) -> None:
        """Print one record. Training lines are printed when they are due, and always for the first and last step."""
        kind = record.get("kind")
        if kind == "evaluate":
            self._log_evaluation(record)
            return
        self._table_step = None
        if kind == "train":
            self._log_train(record)
        elif kind == "sample":
            self.output.line(sample_text(record, self.width))
        elif kind == "event":
            self.output.line(str(record.get("message", "")))

    def _log_train(self, record: Record) -> None:
        step = int(record["step"])
        first, self._has_logged = not self._has_logged, True
        last = self.total_steps is not None and step == self.total_steps - 1
        if isinstance(record.get("loss"), (int, float)):
            self._recent_losses.append(record["loss"])
        if self._is_due(step) or first or last:
            shown = record if self._says_something(record) else {**record, "forecast_loss": None}
            self.output.line(train_line(shown, self.total_steps, self.width))
            self._printed_at = self._clock()
        if not self._sources.means():
            self._sources_from = step
        self._sources.add(record)
        if last:
            self._show_sources(step + 1)
        if self.total_steps is not None:
            self.output.show_bar(step + 1, self.total_steps)

    def _is_due(self, step: int) -> bool:
        """Whether a step has a line: by its number where that is configured, else if it is nearest to the time of a line."""
        now = self._clock()
        step_seconds, self._step_at = now - self._step_at, now
        if self.log_every_steps is not None:
            return step % self.log_every_steps == 0
        return now - self._printed_at + step_seconds / 2 >= self.log_every_seconds

    def _says_something(self, record: Record) -> bool:
        """Whether the forecast's band is narrow, or the loss now lies outside it, so that it will fall or rise."""
        low, high, expected = (record.get(f"forecast_{name}") for name in ("low", "high", "loss"))
        if low is None or high is None or expected is None or not self._recent_losses or low == high:
            return False  # where they are equal the end is there
        now = sum(self._recent_losses) / len(self._recent_losses)
        return high - low <= NARROW_RATIO * expected or not low <= now <= high

    def _log_evaluation(self, record: Record) -> None:
        name, score = str(record.get("text")), record.get("bits_per_byte")
        if record.get("step") != self._table_step:
            self._table_step = record.get("step")
            self._show_sources(int(record.get("step") or 0))
            title = "held-out text" if record.get("step") is None else f"held-out at {record.get('step')}"
            columns = f"{'bits/byte':>9}  {'perplexity':>10}  change from the start"
            self.output.line(f"  {title:<{self._text_width}} {columns}")
        self.output.line(evaluation_row(record, self._start_scores.get(name), self._text_width))
        if score is not None:
            self._start_scores.setdefault(name, score)

    def _show_sources(self, stop_step: int) -> None:
        """The training loss of each source since the last such line, where a run has several; at evaluations and at the end."""
        if means := self._sources.means():
            show = METRICS["loss"].number
            parts = [f"{source} {show(mean)} ({show_count(tokens)} tokens)" for source, (mean, tokens) in means.items()]
            steps = f"steps {self._sources_from} to {stop_step - 1}"
            self.output.line(f"  training loss by source, {steps}: {', '.join(parts)}")
            self._sources = SourceTotals()

    def close(self) -> None:
        self.output.close()


def build(
    log_every_seconds: float = 10.0,
    log_every_steps: int | None = None,
    progress: Literal["auto", "bar", "plain"] = "auto",
    width: int | None = None,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> ConsoleTracker:
    """The console, with the fields of ConsoleConfig. stream: standard output by default. clock: gives seconds.

    Where the stream is not a terminal, `bar` prints plain lines too: control codes would spoil a file.
    """
    output = Output(stream or sys.stdout, bar=progress != "plain")
    return ConsoleTracker(output, width, log_every_seconds, log_every_steps, clock)


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that understands control codes."""
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


def train_line(record: Record, total_steps: int | None, width: int) -> str:
    """`step 12/40 | loss 2.913 | …` in at most `width` characters; whole columns are left out where it would be longer.

    The step and the loss always stay. A metric without a value has no column.
    """
    digits = len(str(total_steps)) if total_steps is not None else 6
    step = f"step {int(record['step']):>{digits}}" + (f"/{total_steps}" if total_steps is not None else "")
    given = {name: digits for name, digits in NUMBER_WIDTHS.items() if name == "loss" or record.get(name) is not None}
    if record.get("eta_seconds") == 0:  # the last step
        del given["eta_seconds"]
    cells = {name: METRICS[name].show(record.get(name), digits) for name, digits in given.items()}
    if record.get("forecast_loss") is not None:
        low, high = (METRICS["loss"].number(record[name]) for name in ("forecast_low", "forecast_high"))
        expected = METRICS["forecast_loss"].show(record["forecast_loss"])
        cells["forecast_loss"] = f"{expected} ({low} to {high})"  # with the 90 % band
    for name in LEAST_IMPORTANT_FIRST:
        if len(SEPARATOR.join([step, *cells.values()])) <= width:
            break
        cells.pop(name, None)
    return SEPARATOR.join([step, *cells.values()])


def evaluation_row(record: Record, score_at_start: float | None, text_width: int) -> str:
    """One text of an evaluation table; the change is in bits per byte and in percent."""
    score, perplexity = record.get("bits_per_byte"), record.get("perplexity")
    shown = MISSING if score is None else f"{score:.4f}"
    change = "" if score is None or score_at_start is None else show_change(score, score_at_start)
    perplexity_shown = MISSING if perplexity is None else show_perplexity(perplexity)
    return f"  {record.get('text')!s:<{text_width}} {shown:>9}  {perplexity_shown:>10}  {change}".rstrip()


def show_change(score: float, score_at_start: float) -> str:
    """`-0.1030 (-11.3 %), better`: lower bits per byte are better."""
    change = score - score_at_start
    percent = f" ({100 * change / score_at_start:+.1f} %)" if score_at_start else ""
    word = "the same" if abs(change) < 5e-5 else "better" if change < 0 else "worse"
    return f"{change:+.4f}{percent}, {word}"


def sample_text(record: Record, width: int) -> str:
    """A prompt and its continuation, wrapped to the width, each line quoted with `>`."""
    words = fold_blank_lines(clean_text(f"{record.get('prompt', '')}{record.get('text', '')}"))
    quoted = [
        line
        for paragraph in words.split("\n")
        for line in textwrap.wrap(paragraph, max(20, min(width, 100) - 4), drop_whitespace=True) or [""]
    ]
    return "\n".join([f"sample at step {record.get('step')}:", *(f"  > {line}".rstrip() for line in quoted)])


def scores_at_start(path: Path) -> dict[str, float]:
    """Bits per byte of each text before the first update, from the lines of metrics.jsonl before the first training line."""
    scores: dict[str, float] = {}
    if not path.exists():
        return scores
    for record in read_records(path):
        if record.get("kind") == "train":
            break
        if record.get("kind") == "evaluate" and isinstance(record.get("bits_per_byte"), float):
            scores.setdefault(str(record.get("text")), record["bits_per_byte"])
    return scores


def clean_text(text: str) -> str:
    """The text with control characters made visible, so that a model's text cannot control the terminal."""
    return "".join(char if char == "\n" or char.isprintable() else _visible(char) for char in text)


def _visible(char: str) -> str:
    return "    " if char == "\t" else " " if char.isspace() else "\N{REPLACEMENT CHARACTER}"


def encodable(text: str, stream: TextIO) -> str:
    """The text with a question mark for every character that the stream's encoding (ASCII in some containers) lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
