"""What a run chooses at its start and keeps: `auto` in its configuration becomes a value, and stays that value at every resume.

In: the configuration as given, and what the run directory says of an earlier process. Out: the configuration to run and to save.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steep.checkpoint.compare import differences
from steep.config.redact import redact
from steep.config.run import RunConfig
from steep.config.settled import as_saved, keep_settled, parse_saved
from steep.core.files import read_text
from steep.core.say import Say
from steep.estimate.automatic import AUTO, with_values
from steep.runtime.device import choose_device
from steep.runtime.precision import choose_precision
from steep.runtime.run_directory import RunDirectory

CHOSEN_BY_THE_PLAN = {"train.micro_batch_size": None, "checkpoint.asynchronous": False, "evaluate.tokens": 200_000}
"""Keys whose `auto` the plan of a new run turns into a value (`estimate/automatic.py`), and what a run has that saved none."""


def settle(config: RunConfig, saved: Mapping[str, Any] | None, say: Say) -> RunConfig:
    """The configuration without `auto` in train.precision. Raises ConfigError for a device that is not there.

    saved: the configuration that the run directory holds, from `settled_before`; None for a new run. say: told what is chosen now
    and why. A resumed run chooses nothing.
    """
    train = config.train
    if train.precision != "auto":
        return config
    precision = (saved or {}).get("train", {}).get("precision", "auto")
    if precision == "auto":
        device = choose_device(train.device)
        precision = choose_precision("auto", device.type, threads=train.threads, say=say)
    return config.model_copy(update={"train": train.model_copy(update={"precision": precision})})


def keep_choices(config: RunConfig, saved: Mapping[str, Any]) -> RunConfig:
    """The configuration of a resumed run with what its plan chose when it started, wherever `config` leaves that to steep.

    saved: the configuration in its checkpoint. Earlier versions saved null for a micro-batch of the whole global batch.
    """
    values = {}
    for key, otherwise in CHOSEN_BY_THE_PLAN.items():
        section, _, name = key.partition(".")
        if getattr(getattr(config, section), name) == AUTO:
            value = (saved.get(section) or {}).get(name)
            values[key] = otherwise if value is None else value
    return with_values(config, values)


def as_resumed(config: RunConfig, saved: Mapping[str, Any], say: Say) -> RunConfig:
    """The configuration of a run that goes on from a checkpoint. saved: from `read_saved`. say: as for `settle`."""
    return keep_settled(keep_choices(settle(config, saved, say), saved), dict(saved), say)


def as_begun(config: RunConfig, say: Say) -> RunConfig:
    """The configuration to plan with: where the run's folder holds the same run, what that settled takes the place of `auto`.

    say: told what was taken, or why nothing was.
    """
    run = RunDirectory(Path(config.run.directory).expanduser() / config.run.name)
    if not run.config.is_file():
        return config
    saved = read_saved(run, read_text(run.config))
    lines: list[str] = []
    goes_on = run.has_checkpoint  # without one it starts anew, and chooses all but the precision anew
    begun = as_resumed(config, saved, lines.append) if goes_on else settle(config, saved, lines.append)
    if other := differences(saved, redact(begun.to_mapping()), "opened later", "opened later"):
        say(f"{run.path} holds a different run, so train would refuse this one ({other[0]}); planned as a new run")
        return config
    kept = []
    for key in ("train.precision", *CHOSEN_BY_THE_PLAN):
        section, _, name = key.partition(".")
        before, now = (getattr(getattr(each, section), name) for each in (config, begun))
        if before == AUTO and now != AUTO:
            kept.append(f"{key} {now}")
    if kept:
        lines.append(f"as chosen when the run in {run.path} began: {', '.join(kept)}")
    for line in lines:
        say(line)
    return begun


def read_saved(run: RunDirectory, text: str) -> dict[str, Any]:
    """A saved configuration of a run as plain values, with what the run settled. text: YAML."""
    return as_saved(settled_before(parse_saved(text, run.config), run.read("plan.json")))


def settled_before(saved: dict[str, Any], planned: Mapping[str, Any] | None) -> dict[str, Any]:
    """A saved configuration with what the run began with. Earlier versions saved `auto`, and wrote the precision to plan.json."""
    train = saved.get("train") or {}
    precision = (planned or {}).get("precision")
    if train.get("precision", "auto") != "auto" or precision is None:
        return saved
    return {**saved, "train": {**train, "precision": precision}}
