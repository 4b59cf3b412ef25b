"""The report's section on data: what became of every record and token of every source."""

from __future__ import annotations

from typing import Any

from steep.core.html import escape, table
from steep.core.units import format_bytes
from steep.reporting.html import missing, plain
from steep.reporting.run_files import RunFiles

PLANNED_COLUMNS = ("documents", "tokens", "sequences", "epochs")

LEDGER_COLUMNS = {
    "records_read": "Records read",
    "documents_kept": "Documents kept",
    "tokens": "Tokens",
    "tokens_held_out": "Held out",
    "tokens_per_epoch": "For training",
    "tokens_trained": "Trained",
    "epochs": "Epochs",
}


def ledger_section(run: RunFiles) -> str:
    """What became of every record and token of every source."""
    sources = run.ledger.get("sources") or []
    if not sources:
        return missing(run, "ledger.json", "token ledger")
    columns = {key: name for key, name in LEDGER_COLUMNS.items() if any(key in source for source in sources)}
    rows = [[_source_name(source), *(plain(source.get(key)) for key in columns)] for source in sources]
    if len(sources) > 1:
        rows.append(["all sources", *(plain(_ledger_sum(sources, key)) for key in columns)])
    dropped, unused = _dropped(sources), _not_trained(sources)
    lost = table(["Source", "Reason dropped", "Records", "Bytes"], dropped, numbers_from=2) if dropped else ""
    lost += table(["Source", "Reason not trained", "Tokens"], unused, numbers_from=2) if unused else ""
    events = [*(run.ledger.get("rollbacks") or []), *(run.ledger.get("spikes") or [])]
    spikes = [
        [e.get("step"), plain(e.get("loss")), plain(e.get("threshold")), e.get("action"), _documents(e)] for e in events
    ]
    head = ["Loss spike at step", "Loss", "Threshold", "Action", "Documents"]
    lost += table(head, spikes, numbers_from=1) if spikes else ""
    notes = [] if dropped else ["No record was dropped."]
    padding = sum(part.get("padding_tokens") or 0 for part in [run.ledger, *sources])  # positions without a token
    notes += [f"Trained tokens are counted in every epoch. Padding: {plain(padding)} tokens."]
    notes += [
        f"From step {change['step']} on, the data was changed: {'; '.join(change['changed'])}."
        for change in run.ledger.get("data_changes") or []
    ]
    return (
        f"{table(['Source', *columns.values()], rows)}{lost}"
        f'<p class="note">{escape(" ".join(notes))}</p>\n{_plan_sources(run)}'
    )


def _documents(spike: dict[str, Any]) -> str:
    found = spike.get("documents") or {}
    return "; ".join(f"{name}: {', '.join(map(str, ids))}" for name, ids in found.items())


def _dropped(sources: list[dict[str, Any]]) -> list[list[Any]]:
    """Source, reason, records and bytes of what was dropped; no bytes where an older version of steep wrote the store."""
    rows = []
    for source in sources:
        sizes = source.get("dropped_bytes") or {}
        for reason, count in (source.get("dropped") or {}).items():
            rows.append(
                [source.get("name"), reason, plain(count), format_bytes(sizes[reason]) if reason in sizes else ""]
            )
    return rows


def _not_trained(sources: list[dict[str, Any]]) -> list[list[Any]]:
    """Source, reason and tokens of what is not trained on."""
    return [
        [source.get("name"), reason, plain(number)]
        for source in sources
        for reason, number in (source.get("dropped_tokens") or {}).items()
    ]


def _ledger_sum(sources: list[dict[str, Any]], key: str) -> float | None:
    """The sum over all sources; None where a source has no number, and for epochs, which do not add up."""
    values = [source.get(key) for source in sources]
    return None if key == "epochs" or None in values else sum(values)  # type: ignore[arg-type]


def _plan_sources(run: RunFiles) -> str:
    data = run.plan.get("data") or {}
    rows = [
        [_source_name(source), *(plain(source.get(key)) for key in PLANNED_COLUMNS), f"{source.get('share', 0):.1%}"]
        for source in data.get("sources") or []
    ]
    if not rows:
        return ""
    caption = f"Planned, in sequences of {plain(data.get('sequence_length'))} tokens"
    return table(["Source", *(name.capitalize() for name in PLANNED_COLUMNS), "Share"], rows, caption)


def _source_name(source: dict[str, Any]) -> str:
    """The name of a source, marked if its role is replay."""
    return f"{source.get('name')} (replay)" if source.get("role") == "replay" else str(source.get("name"))
