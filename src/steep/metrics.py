"""Every number that a run reports, in one table: unit, how ranks combine it, meaning, and how the console shows it.

In: a metric's value. Out: the text that a person reads. Trackers, the report and the documentation read this table, so it does
not import torch. A metric that is not in `METRICS` is still logged, but nothing formats it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from steep.core.units import format_bytes, format_count, format_seconds

Combine = Literal["sum", "mean", "max", "same"]

MISSING = "–"
"""What is shown where a number does not exist (the MFU of a device whose peak is unknown)."""


@dataclass(frozen=True)
class Metric:
    """One metric. The console shows `label`, the value as `number` formats it, then `suffix`."""

    name: str
    unit: str
    combine: Combine
    """How the values of all ranks are combined; `same`: every rank already has the value of the whole run."""
    meaning: str
    number: Callable[[float], str]
    example: float
    label: str = ""
    suffix: str = ""

    def show(self, value: float | None, width: int = 0) -> str:
        """The value as the console prints it, the number right-aligned in at least `width` characters.

        None is shown as missing, a value that is not finite by its name (nan, inf).
        """
        number = MISSING if value is None else self.number(value) if math.isfinite(value) else str(value)
        return f"{self.label}{number:>{width}}{self.suffix}"


def show_loss(value: float) -> str:
    """Four digits: 2.913, 10.82."""
    return f"{value:.3f}" if abs(value) < 9.9995 else f"{value:.2f}"


def show_norm(value: float) -> str:
    """Three significant digits in at most five characters where the value allows: 1.21, 12.1, 121, 0.051, 5e-05, 1.2e+04."""
    if value == 0 or 0.0995 <= value < 9.995:
        return f"{value:.2f}"
    if value < 0.001:
        return f"{value:.0e}"
    if value < 1e4:
        return f"{value:.3f}" if value < 0.1 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
    return f"{value:.1e}"


def show_perplexity(value: float) -> str:
    """Two decimals up to 1,000, then a whole number: 14.23, 1,234, 12.3k."""
    return f"{value:.2f}" if value < 999.995 else show_count(value)


def show_count(value: float) -> str:
    """A whole number, abbreviated from 10,000 on: 96, 8,192, 24.6k, 1.23M."""
    return format_count(round(value))


def show_rate(value: float) -> str:
    """A number per second: 0.4, 812, 12.3k."""
    return format_count(round(value) if value >= 10 else round(value, 1))


TRAIN_METRICS: tuple[Metric, ...] = (
    Metric("step", "updates", "same", "Optimizer updates made before this one; the first line is step 0.",
           show_count, 12, "step "),
    Metric("loss", "nats per token", "sum", "Cross-entropy summed over the label tokens of the whole global batch, "
           "divided by their number. Each rank holds its share of that sum.", show_loss, 2.9131, "loss "),
    Metric("grad_norm", "1", "same", "Euclidean norm of the whole gradient before clipping.",
           show_norm, 1.2142, "grad "),
    Metric("loss_scale", "1", "same", "What the loss of this step was multiplied by, in mixed_fp16 alone. A line with "
           "`overflow: true` is of a step in which a gradient did not fit fp16 at that scale: it made no update "
           "(`skipped: true`) and the scale was halved.", show_count, 65536),
    Metric("learning_rate", "1", "same", "Learning rate of this update, of the first parameter group.",
           lambda value: f"{value:.1e}", 4.9e-5, "lr "),
    Metric("tokens_per_second", "tokens/s", "sum", "Tokens trained per second of wall time of the step; saving and "
           "evaluation are not counted.", show_rate, 812.4, suffix=" tok/s"),
    Metric("tokens", "tokens", "same", "Tokens trained so far, over all ranks and restarts.",
           show_count, 24576, suffix=" tokens"),
    Metric("sequences", "sequences", "same", "Sequences trained so far; the only data state of a checkpoint.",
           show_count, 96, suffix=" sequences"),
    Metric("mfu", "ratio 0-1", "mean", "Model FLOPs utilisation: useful floating-point operations per second divided "
           "by the device's peak. Missing where the peak is unknown (CPUs).",
           lambda value: f"{100 * value:.1f}%", 0.412, "MFU "),
    Metric("memory_bytes", "bytes", "max", "Peak memory: of the device on CUDA, resident set of the process on CPU.",
           format_bytes, 1.9 * 2**30),
    Metric("data_wait_seconds", "s", "max", "Time during the step that training waited for its batch.",
           lambda value: f"{value:.1f} s", 0.0, "data "),
    Metric("step_seconds", "s", "max", "Wall time of the step.", format_seconds, 2.52, "took "),
    Metric("eta_seconds", "s", "max", "Time left until the last step at the current rate.", format_seconds, 80, "ETA "),
    Metric("forecast_loss", "nats per token", "same", "From 15 % of the run on: the expected mean loss of "
           "its last 5 % of steps.",
           show_loss, 2.7013, "ends at "),
    Metric("forecast_low", "nats per token", "same", "Lower end of the forecast's 90 % band.", show_loss, 2.6513),
    Metric("forecast_high", "nats per token", "same", "Upper end of the forecast's 90 % band.", show_loss, 2.7613),
    Metric("balance_loss", "1", "mean", "Mixtures of experts: the balancing loss, mean over tokens and layers, without its "
           "coefficient: 1 where all experts get the same, the number of experts where one gets everything.",
           lambda value: f"{value:.3f}", 1.042, "balance "),
    Metric("expert_load_max", "1", "max", "Mixtures of experts: the tokens of the busiest expert of all layers, divided by "
           "an even share.", lambda value: f"{value:.2f}", 1.83, "busiest "),
    Metric("expert_load_min", "1", "max", "The same for the expert that got the fewest; 0 for one without a token.",
           lambda value: f"{value:.2f}", 0.41, "idlest "),
    Metric("expert_entropy", "ratio 0-1", "mean", "Mixtures of experts: entropy of the shares of the experts, divided by "
           "that of even shares; mean over layers.", lambda value: f"{value:.3f}", 0.987, "entropy "),
    Metric("time", "s since 1970", "max", "Unix time when the line was written.", lambda value: f"{value:.0f}", 1.78e9),
)  # fmt: skip

EVALUATE_METRICS: tuple[Metric, ...] = (
    Metric("nats_per_token", "nats per token", "same", "Mean negative log-likelihood of a held-out text per token. "
           "Depends on the tokenizer.", lambda value: f"{value:.4f}", 2.6554, suffix=" nats/token"),
    Metric("perplexity", "1", "same", "exp(nats_per_token). Depends on the tokenizer.",
           show_perplexity, 14.23, "perplexity "),
    Metric("bits_per_byte", "bits per byte", "same", "Negative log-likelihood of a held-out text in bits, divided by "
           "its UTF-8 bytes: comparable between tokenizers. Lower is better.",
           lambda value: f"{value:.4f}", 0.8124, suffix=" bits/byte"),
)  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in (*TRAIN_METRICS, *EVALUATE_METRICS)}


class SourceTotals:
    """Training loss by source over several steps, from the `loss_by_source` of training lines."""

    def __init__(self) -> None:
        self._nats: dict[str, float] = {}
        self._tokens: dict[str, int] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Add one training line; one without `loss_by_source` adds nothing."""
        for source, loss in (record.get("loss_by_source") or {}).items():
            mean, tokens = loss.get("nats_per_token"), loss.get("label_tokens")
            if isinstance(mean, (int, float)) and isinstance(tokens, int):
                self._nats[source] = self._nats.get(source, 0.0) + mean * tokens
                self._tokens[source] = self._tokens.get(source, 0) + tokens

    def means(self) -> dict[str, tuple[float, int]]:
        """(nats per label token, label tokens) of every source that had any."""
        return {source: (self._nats[source] / tokens, tokens) for source, tokens in self._tokens.items() if tokens}

    def mean(self) -> float | None:
        """Nats per label token over all sources; None before anything was added."""
        tokens = sum(self._tokens.values())
        return sum(self._nats.values()) / tokens if tokens else None


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """nats / ln 2 / bytes: bits per UTF-8 byte of a text whose tokens have a summed negative log-likelihood of `nats`."""
    return nats / math.log(2) / text_bytes


def reference_markdown() -> str:
    """The page docs/reference/metrics.md."""
    return "\n".join(
        [
            "# Metrics",
            "",
            "Generated from `steep/metrics.py`; do not edit by hand.",
            "",
            "Every line of `metrics.jsonl` is one JSON object with `kind` and `step`. `step` counts the optimizer updates",
            "made before the number was measured, so a training loss and a held-out score with the same `step` belong to the",
            "same weights. A number that does not exist or is not finite is `null`.",
            "",
            "| `kind` | Other keys |",
            "|---|---|",
            f"| `train` | {', '.join(f'`{metric.name}`' for metric in TRAIN_METRICS[1:])}; with several sources "
            "also `loss_by_source`: for each source with a label token in the step, `nats_per_token` (mean over its label "
            "tokens) and `label_tokens` (their number). `loss` is the mean of the sources weighted by `label_tokens`. Of a "
            "mixture of experts also `experts_by_layer` (for each layer `balance_loss`, `load_max`, `load_min` and `entropy`) "
            "and, in every n-th line of a large model, `expert_load`: for each layer the load of every expert, its tokens "
            "divided by an even share |",
            f"| `evaluate` | `text` (name of the held-out text), "
            f"{', '.join(f'`{metric.name}`' for metric in EVALUATE_METRICS)}, `tokens` (those predicted), `documents`, "
            "`text_bytes`, `part_nats` (see below) |",
            "| `sample` | `prompt`, `text` (the continuation, without the prompt) |",
            "| `event` | `message` |",
            "",
            "*Ranks* says how the values of all processes are combined: their sum, mean or maximum, or the same value on each.",
            "",
            *_table("Training lines", TRAIN_METRICS),
            *_table("Held-out texts", EVALUATE_METRICS),
            *ERROR_OF_A_CHANGE,
        ]
    )


ERROR_OF_A_CHANGE = (
    "## The error of a change",
    "",
    "A run says that a model learned or forgot only where the change of a text exceeds its error; otherwise there is too little "
    "text to tell.",
    "",
    "- `part_nats` are the nats of up to 64 parts of the text: its documents, or groups of neighbouring ones; of fewer than 16 "
    "documents, blocks of at least 32 tokens.",
    "- The error is half of the interval that holds 95 % of the changes of 2,000 texts made of these parts, drawn with "
    "replacement (bootstrap), both models on the same parts. The draws are always the same. A text of fewer than 8 parts has no "
    "known error, and no change of it counts.",
    "- Weakness: this is the error of the choice of text and nothing else. Another seed of the run may differ by more. Blocks of "
    "one document say how evenly that document changed, not how another would. With 8 parts the error is about a tenth too "
    "small. Scores of earlier versions have no parts: their changes all count.",
    "",
)


def _table(title: str, metrics: Sequence[Metric]) -> list[str]:
    rows = [f"| `{m.name}` | {m.unit} | {m.combine} | {m.meaning} | `{m.show(m.example)}` |" for m in metrics]
    return [f"## {title}", "", "| Name | Unit | Ranks | Meaning | Shown as |", "|---|---|---|---|---|", *rows, ""]
