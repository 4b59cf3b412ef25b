"""The small files that describe a run when it starts: its configuration, its environment and its plan."""

from __future__ import annotations

import sys
from typing import Any

from steep.config.load import write_config
from steep.config.redact import redact_arguments
from steep.config.run import RunConfig
from steep.estimate.hardware import find_hardware
from steep.estimate.run_plan import plan_opened
from steep.evaluation.forgetting import configured_roles
from steep.runtime.environment import describe_environment
from steep.runtime.run_directory import RunDirectory
from steep.training.assemble import Job


def describe_start(run: RunDirectory, config: RunConfig, job: Job) -> None:
    """Write config.yaml, environment.json and, where it is missing or of another length, plan.json.

    Remove what an earlier process wrote at its end.
    """
    run.remove("summary.json")
    write_config(config, run.config)
    run.write("environment.json", describe_environment(redact_arguments(sys.argv)))
    known = run.read("plan.json")
    if known is None or not _plan_is_current(known, config, job):
        hardware = find_hardware(str(job.engine.device), config.train.threads)
        planned = plan_opened(config, job.data, job.sizes, hardware, job.tokenizer.vocab_size, job.source)
        run.write("plan.json", planned.to_mapping())


def _plan_is_current(known: dict[str, Any], config: RunConfig, job: Job) -> bool:
    """Whether plan.json holds what the report of this run, as now configured, reads from it."""
    roles = configured_roles(config.data.validation)
    return (
        known.get("steps") == job.sizes.steps
        and known.get("forgetting_cap") == config.evaluate.forgetting_cap
        and all(text.get("role") == roles.get(text["name"]) for text in known["data"]["held_out"])
    )
