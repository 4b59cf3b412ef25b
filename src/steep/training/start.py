"""The small files that describe a run when it starts: its configuration, its environment and its plan."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from steep.config.load import write_config
from steep.config.redact import redact_arguments
from steep.config.run import RunConfig
from steep.core import targets
from steep.core.say import Say
from steep.core.section import Target
from steep.estimate.automatic import likely_saves
from steep.estimate.disk import plan_checkpoints
from steep.estimate.hardware import find_hardware
from steep.estimate.run_plan import RunPlan, plan_opened
from steep.evaluation.forgetting import roles_of
from steep.evaluation.model_reference import config_of_run
from steep.runtime.environment import describe_environment
from steep.runtime.run_directory import RunDirectory
from steep.training.assemble import Job


def describe_start(run: RunDirectory, config: RunConfig, job: Job, say: Say) -> None:
    """Write config.yaml, environment.json and, where it is missing or of another length, plan.json; say when the run is saved.

    Remove what an earlier process wrote at its end. Raises ConfigError where the disk has no space for a checkpoint.
    """
    run.remove("summary.json")
    write_config(config, run.config)
    if isinstance(config.model, Target):
        targets.note_trained(config_of_run(run.path).model, say)
    run.write("environment.json", describe_environment(redact_arguments(sys.argv)))
    known = run.read("plan.json")
    if known is None or not _plan_is_current(known, config, job):
        known = _plan(config, job).to_mapping()
        run.write("plan.json", known)
    saves = likely_saves(config, job.sizes, known["seconds"])
    checkpoints = plan_checkpoints(config, known["checkpoints"]["bytes"], saves)
    checkpoints.check()
    say(f"checkpoints: {checkpoints.to_text()}")


def _plan(config: RunConfig, job: Job) -> RunPlan:
    """The plan that was made when the run started, or another one for a run that goes on with other settings."""
    if job.plan is not None:
        return job.plan
    hardware = find_hardware(str(job.engine.device), config.train.threads)
    planned = plan_opened(config, job.data, job.sizes, hardware, job.tokenizer.vocab_size, job.source)
    return replace(planned, process_bytes=0)  # this process holds the run already


def _plan_is_current(known: dict[str, Any], config: RunConfig, job: Job) -> bool:
    """Whether plan.json holds what the report of this run, as now configured, reads from it."""
    roles = roles_of(job.data.held_out_texts)
    return (
        job.plan is None
        and known.get("steps") == job.sizes.steps
        and known.get("forgetting_cap") == config.evaluate.forgetting_cap
        and "checkpoints" in known
        and {text["name"]: text.get("role") for text in known["data"]["held_out"]} == roles
    )
