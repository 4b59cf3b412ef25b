"""The README.md of an exported model: base, data, settings and scores, as the run recorded them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steep import __version__
from steep.core.units import format_count
from steep.runtime.run_directory import RunDirectory


def model_card(reference: str, run: Path | None, dtype: str) -> str:
    """The card as Markdown with the metadata block that model hubs read."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [steep]"]
    if run is None:
        lines += ["---", "", f"# {Path(reference).name}", "", f"Exported from {reference} in {dtype}.", ""]
        return "\n".join(lines)
    directory = RunDirectory(run)
    plan, summary, ledger = (directory.read(name) or {} for name in ("plan.json", "summary.json", "ledger.json"))
    model = plan.get("model", {})
    base = model.get("pretrained")
    is_hub_id = base is not None and not Path(base).exists()
    head = [*lines, *([f"base_model: {base}"] if is_hub_id else []), "---", "", f"# {run.name}", ""]
    parameters = format_count(model.get("parameters", 0))
    fresh = f"a {model.get('family', 'model')} trained from fresh weights"
    made_from = f"`{model['name']}`, trained further" if base else fresh
    trained = f"This is {made_from} ({parameters} parameters, {dtype}), with steep {__version__}."
    return "\n".join([*head, trained, "", *_data(ledger), *_settings(plan, summary), *_scores(summary)])


def _data(ledger: dict[str, Any]) -> list[str]:
    rows = [
        f"| {source['name']} | {source['documents_kept']:,} | {source['tokens']:,} | {source['tokens_held_out']:,} | "
        f"{source['tokens_trained']:,} |"
        for source in ledger.get("sources", [])
    ]
    head = ["| Source | Documents | Tokens | Held out | Trained, repeats counted |", "|---|---|---|---|---|"]
    return ["## Data", "", *head, *rows, ""] if rows else []


def _settings(plan: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    names = {
        "steps": summary.get("step"),
        "tokens trained": summary.get("tokens"),
        "sequences per step": plan.get("global_batch_size"),
        "tokens per sequence": plan.get("data", {}).get("sequence_length"),
        "optimizer": plan.get("optimizer"),
        "peak learning rate": plan.get("learning_rate"),
        "schedule": plan.get("schedule"),
        "precision": plan.get("precision"),
        "seed": plan.get("seed"),
    }
    return ["## Training", "", *(f"- {name}: {value}" for name, value in names.items() if value is not None), ""]


def _scores(summary: dict[str, Any]) -> list[str]:
    rows = [
        f"| {name} | {_bits(scores.get('before'))} | {_bits(scores.get('after'))} |"
        for name, scores in summary.get("texts", {}).items()
    ]
    head = ["| Text | Before | After |", "|---|---|---|"]
    return ["## Held-out scores, bits per byte (lower is better)", "", *head, *rows, ""] if rows else []


def _bits(score: dict[str, Any] | None) -> str:
    bits = (score or {}).get("bits_per_byte")
    return "–" if bits is None else f"{bits:.4f}"
