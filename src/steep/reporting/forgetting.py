"""The report's sections on how a run changed its model: scores before and after, forgetting, the end of text."""

from __future__ import annotations

import math

from steep.core.html import escape, table
from steep.evaluation.config import DEFAULT_CAP_RATIO
from steep.evaluation.end_of_text import audit_lines
from steep.evaluation.forgetting import ForgettingReport, forgetting_report
from steep.metrics import METRICS, MISSING
from steep.reporting.html import missing, plain
from steep.reporting.run_files import Record, RunFiles


def forgetting_of(run: RunFiles) -> ForgettingReport:
    """The forgetting report of a run, from its scores and the roles and cap in its plan."""
    cap = run.plan.get("forgetting_cap")
    held_out = (run.plan.get("data") or {}).get("held_out") or []
    return forgetting_report(
        run.scores(),
        roles={str(text.get("name")): text.get("role") for text in held_out},
        cap_ratio=cap if isinstance(cap, (int, float)) else DEFAULT_CAP_RATIO,
    )


def started_fresh(run: RunFiles) -> bool:
    """Whether the plan says that the run started from untrained weights."""
    model = run.plan.get("model") or {}
    return "pretrained" in model and model["pretrained"] is None


def scores_section(run: RunFiles) -> str:
    """The scores of every held-out text before and after."""
    changes = {change.text: change for change in forgetting_of(run).changes}
    rows = []
    for text, score in run.scores().items():
        sides, change = (score.get("before") or {}, score.get("after") or {}), changes.get(text)
        changed = MISSING if change is None else f"{100 * change.change_ratio:+.1f} %"
        scores = [_shown("bits_per_byte", side) for side in sides]
        rows.append([text, *scores, changed, *(_shown("perplexity", _with_perplexity(side)) for side in sides)])
    if not rows:
        return missing(run, "metrics.jsonl", "held-out scores")
    head = ["Text", "Bits/byte before", "after", "Change", "Perplexity before", "after"]
    note = "Bits per UTF-8 byte of the text can be compared between tokenizers; lower is better."
    return table(head, rows) + f'<p class="note">{note}</p>\n'


def forgetting_section(run: RunFiles) -> str:
    """The forgetting report: gains, losses and the verdict."""
    report = forgetting_of(run)
    if started_fresh(run):
        return '<p class="missing">No forgetting report: the run started from fresh weights.</p>\n'
    if not report.changes:
        return missing(run, "metrics.jsonl", "text scored both before and after")
    rows = [[text, role or MISSING, *(cell or MISSING for cell in rest)] for text, role, *rest in report.rows()]
    head = ["Text", "Role", "Base", "Trained", "Change"]
    sentence = report.verdict_sentence[0].upper() + report.verdict_sentence[1:]
    notes = f"In {report.unit}; lower is better. Roles: {'; '.join(report.role_notes)}."
    lead, note = f'<p class="lead">{escape(sentence)}</p>\n', f'<p class="note">{escape(notes)}</p>\n'
    return lead + table(head, rows, numbers_from=2) + note


def end_of_text_section(run: RunFiles) -> str:
    """Whether documents in the data end with the token, the model stops there, and every file names the same token."""
    audit = run.summary.get("end_of_text")
    if not isinstance(audit, dict):
        return missing(run, "summary.json", "audit of the end of text")
    rows = [
        [side, f"{score['eos_probability']:.3f}", f"{100 * score['stop_ratio']:.0f} %", plain(score["documents"])]
        for side in ("before", "after")
        if (score := audit.get(side))
    ]
    head = ["", "Probability at document ends", "Stop rate", "Held-out documents"]
    warnings = "".join(f'<p class="lead">Warning: {escape(warning)}.</p>\n' for warning in audit["warnings"])
    name, *lines = [line.strip() for line in audit_lines({**audit, "before": None, "after": None, "warnings": []})]
    note = f'<p class="note">{escape(". ".join([name.capitalize(), *lines]))}.</p>\n'
    return warnings + (table(head, rows) if rows else "") + note


def _with_perplexity(score: Record) -> Record:
    nats = score.get("nats_per_token")
    known = "perplexity" in score or not isinstance(nats, (int, float)) or nats > 700
    return score if known else {**score, "perplexity": math.exp(nats)}  # type: ignore[arg-type]


def _shown(name: str, record: Record) -> str:
    value = record.get(name)
    return METRICS[name].number(value) if isinstance(value, (int, float)) else MISSING
