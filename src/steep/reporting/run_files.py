"""The contents of a run directory. Files that are missing or unreadable are noted with the reason, never refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steep.core.files import read_object
from steep.trackers.backends.jsonl import read_records

Record = dict[str, Any]

MAPPINGS = ("environment", "plan", "ledger", "summary")
"""The JSON files, each an attribute of RunFiles."""


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run directory. Mappings and lists are empty where their file is missing."""

    name: str
    config_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    train: list[Record] = field(default_factory=list)
    evaluate: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    """File name -> why nothing was read from it."""

    def text_names(self) -> list[str]:
        """The held-out texts, in the order of their first scores."""
        names = [*self.scores(), *(str(record.get("text")) for record in self.evaluate)]
        return list(dict.fromkeys(names))

    def scores(self) -> dict[str, dict[str, dict[str, float]]]:
        """{text: {"before": {...}, "after": {...}}} from the summary, else from the first and last line of each text.

        A text that was scored once has no "after".
        """
        if isinstance(self.summary.get("texts"), dict) and self.summary["texts"]:
            return self.summary["texts"]
        found: dict[str, dict[str, dict[str, float]]] = {}
        for record in self.evaluate:
            name = str(record.get("text"))
            if name in found:
                found[name]["after"] = record
            else:
                found[name] = {"before": record}
        return found


def read_run(run_directory: str | Path) -> RunFiles:
    """Read every file that the report shows."""
    directory, problems = Path(run_directory), dict[str, str]()
    records: list[Record] = _read(directory / "metrics.jsonl", problems) or []
    mappings = {name: _read(directory / f"{name}.json", problems) for name in MAPPINGS}
    return RunFiles(
        name=directory.resolve().name,
        config_text=_read(directory / "config.yaml", problems) or "",
        **{name: value if isinstance(value, dict) else {} for name, value in mappings.items()},
        train=latest(records, "train", ("step",)),
        evaluate=latest(records, "evaluate", ("text", "step")),
        samples=latest(records, "sample", ("prompt", "step")),
        problems=problems,
    )


def latest(records: list[Record], kind: str, key: tuple[str, ...]) -> list[Record]:
    """The records of one kind, sorted by step; of several with the same key (a resumed run) the last one written."""
    chosen = {
        tuple(str(record.get(name)) for name in key): record
        for record in records
        if record.get("kind") == kind and isinstance(record.get("step"), (int, float))
    }
    return sorted(chosen.values(), key=lambda record: record["step"])


def _read(path: Path, problems: dict[str, str]) -> Any:
    """The content of one file, or None and a reason in `problems`."""
    try:
        if path.suffix == ".json":
            return read_object(path)
        return list(read_records(path)) if path.suffix == ".jsonl" else path.read_text(encoding="utf-8")
    except FileNotFoundError:
        problems[path.name] = "is not in the run directory"
    except (OSError, ValueError) as error:
        problems[path.name] = f"cannot be read ({error})"
    return None
