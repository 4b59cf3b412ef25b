"""What a finished run did to its model. In: its state. Out: values for summary.json and lines for the person at the terminal."""

from __future__ import annotations

from typing import Any

from steep.config.run import RunConfig
from steep.evaluation.end_of_text import EndOfTextAudit, StopScore, audit, named_ids, source_ends
from steep.evaluation.forgetting import configured_roles, forgetting_report
from steep.training.assemble import Job
from steep.training.state import TrainState


def describe_outcome(config: RunConfig, job: Job, state: TrainState) -> tuple[dict[str, Any], list[str]]:
    """Keys of summary.json, and what is printed at the end: the forgetting report of a run that began from pretrained weights,
    and whether the model learned to stop.
    """
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
    if state.scores:
        ends = end_of_text(job, state, config.data.document_mask)
        outcome["end_of_text"] = ends.to_mapping()
        lines += ends.to_text().splitlines()
    return outcome, lines


def end_of_text(job: Job, state: TrainState, document_mask: bool) -> EndOfTextAudit:
    """The audit of a run's data, its model before and after, and the files that its checkpoints hold."""
    before, after = (
        StopScore(**score) if score is not None else None for score in (state.base_end_of_text, state.end_of_text)
    )
    return audit(
        job.tokenizer,
        sources=source_ends(job.data.names, job.data.stores, job.tokenizer, document_mask),
        before=before,
        after=after,
        ids=named_ids("checkpoint", job.hf_files, job.tokenizer.backend.token_to_id),
    )
