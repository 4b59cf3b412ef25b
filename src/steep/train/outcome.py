"""What a finished run did to its model. In: its state. Out: values for summary.json and lines for the person at the terminal."""

from __future__ import annotations

from typing import Any

from steep.config.run import RunConfig
from steep.evaluate.forgetting import configured_roles, forgetting_report
from steep.train.assemble import Job
from steep.train.state import TrainState


def describe_outcome(config: RunConfig, job: Job, state: TrainState) -> tuple[dict[str, Any], list[str]]:
    """Keys of summary.json, and what is printed at the end: the forgetting report of a run that began from pretrained weights."""
    outcome: dict[str, Any] = {}
    lines: list[str] = []
    if getattr(config.model, "pretrained", None) is not None:
        report = forgetting_report(
            {name: {"before": state.base_scores.get(name), "after": after} for name, after in state.scores.items()},
            roles=configured_roles(config.data.validation),
            cap_ratio=config.evaluate.forgetting_cap,
        )
        outcome["forgetting"] = report.to_mapping()
        lines += report.to_text().splitlines()
    return outcome, lines
