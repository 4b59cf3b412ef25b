"""report.html: one self-contained page about one run.

In: a run directory, complete or not. Out: HTML that includes its style and pictures, without scripts, that loads nothing from
the network. The same run directory always gives the same bytes. What is missing is named where it would be.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any, Union

from steep.config.checks import nearest_path
from steep.core.blank_lines import fold_blank_lines
from steep.core.errors import ConfigError
from steep.core.files import write_text
from steep.core.html import details, escape, table
from steep.core.public import public
from steep.core.units import format_bytes, format_count, format_seconds
from steep.metrics import METRICS, MISSING, SourceTotals
from steep.reporting.curves import curve, downsample
from steep.reporting.forgetting import (
    end_of_text_section,
    forgetting_of,
    forgetting_section,
    scores_section,
    started_fresh,
)
from steep.reporting.html import missing, plain
from steep.reporting.ledger import ledger_section
from steep.reporting.palette import css_variables
from steep.reporting.plots import held_out_curve, inline_svg, loss_plot, memory_parts, memory_plot, metric_plot
from steep.reporting.run_files import Record, RunFiles, read_run
from steep.runtime.run_directory import is_run_directory

FILE_NAME = "report.html"

STATUS = {"done": "finished", "interrupted": "interrupted, can be resumed", "failed": "failed"}


@public
def report(run: Union[str, os.PathLike[str]]) -> Path:
    """Write report.html, one self-contained page, into the directory of a run, and return its path.

    run: the directory. Raises ConfigError for any other.
    """
    folder = Path(run)
    if not folder.exists():
        raise ConfigError(f"{folder}: there is no such run directory{nearest_path(str(folder))}")
    if not is_run_directory(folder):
        raise ConfigError(f"{folder}: is not a run directory; it has no config.yaml and checkpoints/")
    return write_report(folder)


def write_report(run_directory: str | Path) -> Path:
    """Write report.html into a run directory and return its path. Raises OSError where it cannot be written."""
    path = Path(run_directory) / FILE_NAME
    write_text(path, report_page(read_run(run_directory)))
    return path


def report_page(run: RunFiles) -> str:
    """The page as text."""
    style = files("steep.reporting").joinpath("page.css").read_text(encoding="utf-8")
    sections = "".join(
        f"<section>\n<h2>{escape(title)}</h2>\n{content(run)}</section>\n" for title, content in SECTIONS.items()
    )
    footer = f"<footer><p>Written by steep from the run directory {escape(run.name)}.</p></footer>\n"
    body = f"{_header(run)}<main>\n{sections}</main>\n{footer}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(run.name)} – steep</title>\n"
        f"<style>\n{css_variables()}{style}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


# ── the top of the page ──────────────────────────────────────────────────────────────────────────────────────────────


def _header(run: RunFiles) -> str:
    report = forgetting_of(run)
    verdict = report.learned if report.changes and started_fresh(run) else report.headline
    headline = "failed" if run.summary.get("status") == "failed" else verdict
    sentences = f'<p class="lead">{escape(" ".join(report.sentences))}</p>\n' if report.sentences else ""
    cause = run.summary.get("error")
    error = f'<p class="error">{escape(cause)}</p>\n' if cause else ""
    return (
        f'<header>\n<p class="kind">steep run report</p>\n'
        f"<h1><b>{escape(run.name)}</b> {escape(headline)}</h1>\n{sentences}"
        f'<p class="facts">{escape(" · ".join(_facts(run)))}</p>\n{error}{_key_figures(run)}</header>\n'
    )


def _facts(run: RunFiles) -> list[str]:
    status, model = run.summary.get("status"), run.plan.get("model") or {}
    facts = [STATUS.get(str(status), str(status)) if status else "no summary yet: still running, or killed"]
    if model.get("name"):
        facts.append(str(model["name"]))
    if isinstance(model.get("parameters"), (int, float)):
        facts.append(f"{format_count(model['parameters'])} parameters")
    started = next((record["time"] for record in run.train if isinstance(record.get("time"), (int, float))), None)
    if started is not None:
        facts.append(f"started {datetime.fromtimestamp(started, timezone.utc):%Y-%m-%d %H:%M} UTC")
    return facts


def _key_figures(run: RunFiles) -> str:
    """The numbers that people look for first, as a list of terms, without those that are unknown."""
    report = forgetting_of(run)
    figures = [(f"{c.text}, {report.unit}", f"{c.base:.3f} → {c.trained:.3f}") for c in report.changes[:3]]
    last = run.train[-1] if run.train else {}
    steps_planned = run.plan.get("steps")
    if last:
        done = int(last["step"]) + 1
        figures.append(("steps", f"{done:,}" + (f" of {steps_planned:,}" if steps_planned else "")))
    figures += [
        (label, show(value))
        for label, value, show in (
            ("tokens trained", last.get("tokens"), format_count),
            ("time", run.summary.get("seconds"), format_seconds),
            ("tokens per second", run.summary.get("tokens_per_second"), METRICS["tokens_per_second"].number),
            ("peak memory", measured_memory(run), format_bytes),
        )
        if isinstance(value, (int, float))
    ]
    items = "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(value)}</dd></div>\n" for term, value in figures)
    return f'<dl class="figures">\n{items}</dl>\n' if figures else ""


def measured_memory(run: RunFiles) -> float | None:
    """Peak memory in bytes: from the summary, else from the plan, else the highest of the training lines."""
    for value in (run.summary.get("peak_memory_bytes"), run.plan.get("measured_peak_bytes")):
        if isinstance(value, (int, float)):
            return value
    return max(curve(run.train, "memory_bytes").values, default=None)


# ── sections ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _loss(run: RunFiles) -> str:
    """The loss curves, for wide and narrow screens, and their numbers as a table."""
    if not run.train and not run.evaluate:
        return missing(run, "metrics.jsonl", "loss curve")
    description = _describe_loss(run)
    wide = inline_svg(loss_plot(run), "loss", "Loss over the steps", description, "wide")
    narrow_figure = loss_plot(run, width=400, height=360, max_points=400)
    narrow = inline_svg(narrow_figure, "loss-narrow", "Loss over the steps", description, "narrow")
    lost = sum(record.get("loss") is None for record in run.train)
    note = f'<p class="note">{lost:,} training lines have no finite loss and are not drawn.</p>\n' if lost else ""
    figure = f"<figure>\n{wide}{narrow}</figure>\n{note}{details('The numbers in this figure', _loss_table(run))}"
    return figure + _forecast(run) + _source_losses(run)


def _forecast(run: RunFiles) -> str:
    """The first forecast of the final loss and the one at half the run, and the loss that the run ended with."""
    made = [record for record in run.train if isinstance(record.get("forecast_loss"), (int, float))]
    steps = run.plan.get("steps")
    if not made or not isinstance(steps, int):
        return ""
    half = next((record for record in made if record["step"] + 1 >= steps / 2), None)
    chosen = [made[0], *([half] if half is not None and half is not made[0] else [])]
    if run.train[-1]["step"] + 1 < steps and made[-1] not in chosen:
        chosen.append(made[-1])
    parts = [
        f"at step {record['step']:,} the forecast was {record['forecast_loss']:.3f} (90 % band: "
        f"{record['forecast_low']:.3f} to {record['forecast_high']:.3f})"
        for record in chosen
    ]
    ends = [record["loss"] for record in run.train[-max(1, round(0.05 * steps)) :] if record.get("loss") is not None]
    if run.train[-1]["step"] + 1 == steps and ends:
        parts.append(f"it was {sum(ends) / len(ends):.3f}")
    return f'<p class="note">Mean training loss of the last 5 % of the steps: {escape("; ".join(parts))}.</p>\n'


def _source_losses(run: RunFiles, most_rows: int = 8) -> str:
    """Training loss by source in equal intervals of the run; nothing for a run with one source."""
    lines = [record for record in run.train if isinstance(record.get("loss_by_source"), dict)]
    names = list(dict.fromkeys(source for record in lines for source in record["loss_by_source"]))
    if not names:
        return ""
    count = min(most_rows, len(lines))
    rows = []
    for number in range(count):
        interval = lines[number * len(lines) // count : (number + 1) * len(lines) // count]
        totals = SourceTotals()
        for record in interval:
            totals.add(record)
        means = totals.means()
        of_sources = [f"{means[name][0]:.4f}" if name in means else MISSING for name in names]
        together = totals.mean()
        steps = f"{interval[0]['step']:,} to {interval[-1]['step']:,}"
        rows.append([steps, *of_sources, MISSING if together is None else f"{together:.4f}"])
    caption = "Training loss by source in nats per label token; “all” is the mean over the label tokens of all sources"
    return table(["Steps", *names, "all"], rows, caption)


def _describe_loss(run: RunFiles) -> str:
    """What the picture shows, in one sentence per curve."""
    curves = [("Training loss", curve(run.train, "loss"))]
    curves += [(f"Loss on held-out {text}", held_out_curve(run, text)) for text in run.text_names()]
    return " ".join(
        f"{name}: {points.values[0]:.3f} at step {points.steps[0]:,}, {points.values[-1]:.3f} at step {points.steps[-1]:,}."
        for name, points in curves
        if points
    )


def _loss_table(run: RunFiles, rows: int = 24) -> str:
    """About `rows` steps with the training loss, and about as many with held-out scores."""
    columns = [curve(run.train, "loss"), *(held_out_curve(run, text) for text in run.text_names())]
    scored = downsample(columns[1], rows).steps if len(columns) > 1 else []
    train = columns[0].steps
    spread = [train[index * (len(train) - 1) // max(1, rows - 1)] for index in range(rows)] if train else []
    values = [dict(zip(points.steps, points.values, strict=True)) for points in columns]
    body = [
        [f"{step:,}", *(f"{column[step]:.4f}" if step in column else MISSING for column in values)]
        for step in sorted({*scored, *spread})
    ]
    return table(["Step", "Training", *run.text_names()], body, "Nats per token at selected steps")


def _speed(run: RunFiles) -> str:
    """Learning rate and throughput, side by side where there is room."""
    parts = []
    for name, title in (("learning_rate", "Learning rate"), ("tokens_per_second", "Tokens per second")):
        points = curve(run.train, name)
        if points:
            first, last, most = map(METRICS[name].number, (points.values[0], points.values[-1], max(points.values)))
            description = f"From {first} to {last}, at most {most}."
            svg = inline_svg(metric_plot(run, name, title.lower()), name.replace("_", "-"), title, description)
            parts.append(f"<figure>\n{svg}</figure>\n")
        else:
            parts.append(missing(run, "metrics.jsonl", title.lower()))
    return f'<div class="pair">\n{"".join(parts)}</div>\n'


def _memory(run: RunFiles) -> str:
    memory, measured = run.plan.get("memory") or {}, measured_memory(run)
    parts = memory_parts(memory)
    if not parts:
        return missing(run, "plan.json", "memory plan")
    total = sum(size for _, size in parts)
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts)
    description = f"Predicted {format_bytes(total)}: {listed}"
    if measured:
        difference = f"{100 * (total / measured - 1):+.1f} %"
        description += f". Measured {format_bytes(measured)}; the prediction differs by {difference}"
    svgs = (
        inline_svg(memory_plot(memory, measured, width), f"memory-{css}", "Memory by part", f"{description}.", css)
        for width, css in ((900, "wide"), (400, "narrow"))
    )
    rows = [[name, format_bytes(size), f"{100 * size / total:.0f} %"] for name, size in parts]
    rows.append(["predicted total", format_bytes(total), "100 %"])
    rows += [["measured peak", format_bytes(measured), f"{100 * measured / total:.0f} %"]] if measured else []
    explained = run.plan.get("memory_note")
    note = f'<p class="note">{escape(explained[0].upper() + explained[1:])}.</p>\n' if explained else ""
    return f"<figure>\n{''.join(svgs)}</figure>\n{table(['Part', 'Memory', 'Share'], rows)}{note}"


def _samples(run: RunFiles) -> str:
    """Each prompt, continued by the model before and after training."""
    if not run.samples:
        return missing(run, "metrics.jsonl", "samples")
    by_prompt: defaultdict[str, list[Record]] = defaultdict(list)
    for record in run.samples:
        by_prompt[str(record.get("prompt", ""))].append(record)
    return "".join(_sample_pair(prompt, records) for prompt, records in by_prompt.items())


def _sample_pair(prompt: str, records: list[Record]) -> str:
    shown = records if len(records) == 1 else [records[0], records[-1]]
    sides = "".join(
        f'<div class="sample"><h3>Step {plain(record["step"])}</h3>\n'
        f'<p dir="auto"><b>{escape(prompt)}</b>{escape(fold_blank_lines(str(record.get("text", ""))))}</p></div>\n'
        for record in shown
    )
    hidden = len(records) - len(shown)
    more = f"{hidden:,} more samples, from the steps in between, are in metrics.jsonl."
    return f'<div class="pair">\n{sides}</div>\n' + (f'<p class="note">{more}</p>\n' if hidden else "")


def _configuration(run: RunFiles) -> str:
    if not run.config_text:
        return missing(run, "config.yaml", "configuration")
    return details("config.yaml, fully resolved", f"<pre>{escape(run.config_text)}</pre>\n")


def _environment(run: RunFiles) -> str:
    if not run.environment:
        return missing(run, "environment.json", "environment")
    rows = [[key, value] for key, value in flatten(run.environment)]
    return details("Hardware and versions", table(["Name", "Value"], rows, numbers_from=99))


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested value as (dotted key, text) pairs."""
    if isinstance(value, dict) and value:
        return [row for key, item in value.items() for row in flatten(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list):
        return [(prefix, ", ".join(str(item) for item in value))]
    return [(prefix, str(value))]


SECTIONS: dict[str, Callable[[RunFiles], str]] = {
    "What the model gained and lost": scores_section,
    "Forgetting report": forgetting_section,
    "End of text": end_of_text_section,
    "Loss": _loss,
    "Learning rate and throughput": _speed,
    "Memory": _memory,
    "Where the tokens went": ledger_section,
    "Samples before and after": _samples,
    "Configuration": _configuration,
    "Environment": _environment,
}
