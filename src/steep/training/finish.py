"""How a run ends: its result, and the files that say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steep.config.run import RunConfig
from steep.core.errors import ConfigError
from steep.core.units import format_count, format_seconds, listing
from steep.evaluation.end_of_text import EndOfTextAudit, StopScore, audit, named_ids, source_ends
from steep.evaluation.forgetting import ForgettingReport, forgetting_report, roles_of
from steep.reporting.page import write_report
from steep.reporting.plots import write_training_loss
from steep.runtime.run_directory import RunDirectory
from steep.trackers.run_trackers import Trackers
from steep.training.assemble import Job
from steep.training.result import TrainResult
from steep.training.spikes import ROLLBACKS_FILE
from steep.training.state import TrainState

MOST_TEXTS = 4
"""Held-out texts that the verdict names; the report has all."""


def is_finished(run: RunDirectory, job: Job, state: TrainState) -> bool:
    """Whether every step was made and everything was written at the end. Raises ConfigError for a run that is past its end."""
    if state.step > job.sizes.steps:
        raise ConfigError(
            f"{run.path} has made {state.step} steps already, and the run is now configured to end after {job.sizes.steps}. Give "
            "a length beyond that to continue it, or another --run.name to train a shorter run from the start."
        )
    summary = run.read("summary.json") or {}
    return state.step == job.sizes.steps and summary.get("status") == "done" and summary.get("step") == state.step


def is_complete(job: Job, state: TrainState) -> bool:
    """Whether every step is made, and everything that is scored and sampled at the end is."""
    scored = state.scores_step == state.step or not job.data.held_out_texts
    sampled = state.samples_step == state.step or not job.config.evaluate.prompts
    return state.step == job.sizes.steps and scored and sampled


def already_finished(run: RunDirectory, job: Job, state: TrainState, trackers: Trackers) -> TrainResult:
    """Say that there is nothing to do; every file stays as the run left it."""
    trackers.line(
        f"nothing left to train: the run is finished, at step {state.step} of {job.sizes.steps}. "
        "A larger train.steps, train.epochs or train.tokens continues it."
    )
    scores = (run.read("summary.json") or {}).get("texts", {})
    return _result(run, state, "done", 0, {name: score["after"] for name, score in scores.items()})


def describe_end(
    run: RunDirectory, config: RunConfig, job: Job, state: TrainState, trackers: Trackers, exit_code: int
) -> TrainResult:
    """Write ledger.json, summary.json and the report, and say in three lines what the run did; the rest is in the report."""
    done = is_complete(job, state)
    status, exit_code = ("done", 0) if done else ("interrupted", exit_code)
    seconds = state.elapsed_seconds
    texts = {name: {"before": state.base_scores.get(name), "after": after} for name, after in state.scores.items()}
    reports = _reports(config, job, state, texts) if done else {}
    ledger = job.data.ledger(
        sequences_seen=state.sequences_seen,
        tokens_by_source=state.tokens_by_source,
        skipped_tokens=state.skipped_tokens,
        padding_tokens=state.padding_tokens,
        data_changes=state.data_changes,
        spikes=state.spikes,
    )
    run.write("ledger.json", {**ledger, "rollbacks": run.read_list(ROLLBACKS_FILE)})
    run.write(
        "summary.json",
        {
            "status": status,
            "step": state.step,
            "steps": job.sizes.steps,
            "tokens": state.tokens_seen,
            "seconds": seconds,
            "tokens_per_second": state.tokens_seen / seconds if seconds else None,
            "overflowed_steps": state.overflowed_steps,
            "peak_memory_bytes": job.engine.peak_memory_bytes(),
            "texts": texts,
            **{name: report.to_mapping() for name, report in reports.items()},
        },
    )
    spent = f"{format_count(state.tokens_seen)} tokens in {format_seconds(seconds)}"
    trackers.line(f"{status} at step {state.step} of {job.sizes.steps}: {spent}")
    for line in job.data.dropped_of_streams(state.sequences_seen):
        trackers.line(line)
    if state.overflowed_steps:
        lost = format_count(sum(state.skipped_tokens.values()))
        trackers.line(
            f"{state.overflowed_steps:,} of {state.step:,} steps made no update, since a gradient overflowed fp16; steps without "
            f"an update left {lost} tokens untrained"
        )
    if done:
        trackers.line(verdict_line(reports.get("forgetting"), texts))
    if config.report.enabled and run.ranks.is_first:
        write_training_loss(run.path)
        trackers.line(f"report: {write_report(run.path)}")
    if not done:
        trackers.line("run the same command again to continue")
    return _result(run, state, status, exit_code, state.scores)


def verdict_line(report: ForgettingReport | EndOfTextAudit | None, texts: Mapping[str, Any]) -> str:
    """What a run did to the model: gained and forgot against its base; for a run from fresh weights, its last scores.

    texts: {text: {"before": score, "after": score}}.
    """
    if not texts:
        return "no held-out text was scored: data.validation names some"
    if not isinstance(report, ForgettingReport):
        shown = (_score_words(name, score["before"], score["after"]) for name, score in texts.items())
        return f"held-out text: {listing(list(shown), MOST_TEXTS)}"
    changes = [f"{change.text} {100 * change.change_ratio:+.1f} %" for change in report.changes]
    line = f"the model {report.headline}" + (f": {report.unit} of {listing(changes, MOST_TEXTS)}" if changes else "")
    if report.verdict == "not measured":
        return f"{line}; forgetting is not measured, since no held-out text is general"
    against = {"forgot": "over", "kept": "under"}.get(report.verdict)
    return line if against is None else f"{line}, {against} the cap of {100 * report.cap_ratio:+.1f} %"


def _score_words(name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> str:
    key, unit = "bits_per_byte", "bits per byte"
    if after.get(key) is None:
        key, unit = "nats_per_token", "nats per token"
    start = (before or {}).get(key)
    return f"{name} {after[key]:.4f} {unit}" + ("" if start is None else f" ({start:.4f} at the start)")


def _reports(
    config: RunConfig, job: Job, state: TrainState, texts: dict[str, Any]
) -> dict[str, ForgettingReport | EndOfTextAudit]:
    """By key of summary.json: what a run from pretrained weights forgot, and whether the model learned to stop."""
    reports: dict[str, ForgettingReport | EndOfTextAudit] = {}
    if getattr(config.model, "pretrained", None) is not None:
        reports["forgetting"] = forgetting_report(
            texts, roles=roles_of(job.data.held_out_texts), cap_ratio=config.evaluate.forgetting_cap
        )
    if state.scores:
        stops = (state.base_end_of_text, state.end_of_text)
        before, after = (StopScore(**score) if score is not None else None for score in stops)
        reports["end_of_text"] = audit(
            job.tokenizer,
            sources=source_ends(job.data.names, job.data.stores, job.tokenizer, config.data.document_mask),
            before=before,
            after=after,
            ids=named_ids("checkpoint", job.hf_files, job.tokenizer.backend.token_to_id),
        )
    return reports


def _result(run: RunDirectory, state: TrainState, status: str, exit_code: int, after: dict[str, Any]) -> TrainResult:
    return TrainResult(
        run_directory=run.path,
        status=status,
        exit_code=exit_code,
        step=state.step,
        tokens=state.tokens_seen,
        seconds=state.elapsed_seconds,
        before=state.base_scores,
        after=after,
    )
