"""All trackers of a run as one: the console and metrics.jsonl always, others as configured. Only the first rank writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, TextIO

from steep.core.progress import Progress
from steep.core.section import Target
from steep.runtime.ranks import Ranks
from steep.trackers.backends import console, jsonl
from steep.trackers.config import ConsoleConfig, TrackerConfig
from steep.trackers.tracker import Record, Tracker, build_tracker


class Trackers:
    """A context that opens every tracker of a run and closes every one, whatever happens in between.

    The console and metrics.jsonl start at once, the configured trackers with `start_configured`: they note the configuration.
    config: without secrets; the console reads the names of the texts in it. build_target: builds a tracker that is configured as
    a `_target_`. ranks: on any rank but the first, nothing is built, opened or written.
    """

    def __init__(
        self,
        run_directory: Path,
        config: dict[str, Any],
        trackers: Iterable[TrackerConfig | Target],
        console_config: ConsoleConfig,
        *,
        stream: TextIO | None = None,
        build_target: Callable[[Target], Tracker],
        ranks: Ranks = Ranks(),
    ):
        self._run_directory, self._config = run_directory, config
        self._is_first = ranks.is_first
        self._console = console.build(**console_config.model_dump(), stream=stream)
        self._jsonl = jsonl.build()
        self._all: list[Tracker] = []
        self._configured: list[Tracker] = []
        if self._is_first:
            self._configured = [
                build_target(tracker)
                if isinstance(tracker, Target)
                else build_tracker(tracker.name, **(tracker.model_extra or {}))
                for tracker in trackers
            ]
            self._all = [self._jsonl, self._console]
        self._stack = ExitStack()

    def __enter__(self) -> Trackers:
        for tracker in self._all:
            self._start(tracker, self._config)
        return self

    def start_configured(self, config: dict[str, Any]) -> None:
        """Start the configured trackers. config: as the run has it, without `auto` and without secrets."""
        for tracker in self._configured:
            self._start(tracker, config)
            self._all.append(tracker)

    def _start(self, tracker: Tracker, config: dict[str, Any]) -> None:
        self._stack.callback(tracker.close)
        tracker.start(self._run_directory, config)

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def line(self, text: str = "") -> None:
        """Print a line for the person, on the console and in console.log."""
        if self._is_first:
            self._console.line(text)

    def progress(self, description: str, total: int, unit: str) -> AbstractContextManager[Progress]:
        """Show the progress of a block on the console: `with trackers.progress(…) as progress: progress.advance()`."""
        if self._is_first:
            return self._console.output.progress(description, total, unit)
        return nullcontext(Progress(description, total, unit))

    def log(self, record: Record) -> None:
        """Give a record to every tracker."""
        for tracker in self._all:
            tracker.log(record)

    def log_all(self, records: Iterable[Record]) -> None:
        """Give records to every tracker, in order."""
        for record in records:
            self.log(record)

    def rewind(self, step: int) -> None:
        """Remove from metrics.jsonl what a run that continues after `step` updates will write again; -1: everything."""
        self._jsonl.rewind(step)  # not open on other ranks, where this and `flush` do nothing

    def flush(self) -> None:
        """Make metrics.jsonl durable, as at every checkpoint."""
        self._jsonl.flush()

    def expect_steps(self, total_steps: int, completed_steps: int) -> None:
        """Tell the console how long the run is."""
        if self._is_first:
            self._console.expect_steps(total_steps, completed_steps)
