"""What `steep.train` gives back: where the run is, how it ended, its curves, and how a notebook shows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steep.core.html import notebook_table, picture
from steep.core.units import format_count, format_seconds
from steep.metrics import MISSING
from steep.reporting.plots import loss_plot, png_of
from steep.reporting.run_files import read_run


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    run_directory: Path
    status: str
    """done, or interrupted by a signal or a time limit."""
    exit_code: int
    """0, or 128 and the number of the signal: 129 after SIGHUP, 130 after SIGINT, 143 after SIGTERM."""
    step: int
    tokens: int
    seconds: float
    before: dict[str, Any] = field(repr=False)
    """Scores of the model before step 0, by text."""
    after: dict[str, Any] = field(repr=False)
    """Scores at the end, by text."""

    def __repr__(self) -> str:
        head = (
            f"TrainResult({self.run_directory}: {self.status} at step {self.step}, {format_count(self.tokens)} tokens"
        )
        changes = [
            f"{text} {self.before[text]['bits_per_byte']:.4f} -> {score['bits_per_byte']:.4f} bits/byte"
            for text, score in self.after.items()
            if score.get("bits_per_byte") is not None and text in self.before
        ]
        return ", ".join([head, *changes]) + ")"

    @property
    def history(self) -> list[dict[str, Any]]:
        """A mapping for each step of the run, those of earlier processes included, from metrics.jsonl.

        `step`, `loss` (nats per token), `grad_norm`, `learning_rate`, `tokens_per_second`, `tokens` (trained so far),
        `sequences`, `step_seconds`, `memory_bytes` and more: docs/reference/metrics.md has each with its unit.
        `pandas.DataFrame(result.history)` makes a table of it.
        """
        return [_plain_record(record) for record in read_run(self.run_directory).train]

    @property
    def scores(self) -> list[dict[str, Any]]:
        """A mapping for each score of a held-out text: `step`, `text`, `nats_per_token`, `perplexity`, `bits_per_byte`."""
        return [_plain_record(record) for record in read_run(self.run_directory).evaluate]

    def _repr_html_(self) -> str:
        """What a notebook shows: the texts before and after, and the loss over the steps."""
        run = read_run(self.run_directory)
        head = ["text", "nats/token", "bits/byte before", "bits/byte after", "change"]
        rows = []
        for text, score in self.after.items():
            before, after = (self.before.get(text) or {}).get("bits_per_byte"), score.get("bits_per_byte")
            numbers = (score.get("nats_per_token"), before, after)
            rows.append(
                [text, *(MISSING if value is None else f"{value:.4f}" for value in numbers), _change(before, after)]
            )
        spent = f"{format_count(self.tokens)} tokens in {format_seconds(self.seconds)}"
        caption = f"{self.run_directory}: {self.status} at step {self.step:,}, {spent}"
        figure = picture(png_of(loss_plot(run, height=340)), f"loss over {len(run.train):,} steps")
        return notebook_table(head, rows, caption) + figure


def _plain_record(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "kind"}


def _change(before: float | None, after: float | None) -> str:
    return f"{100 * (after / before - 1):+.2f} %" if before and after is not None else MISSING
