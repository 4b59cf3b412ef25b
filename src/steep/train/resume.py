"""Continue a run or start one. In: a run directory and a configuration. Out: where to begin, or why not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steep.checkpoint.capture import capture, capture_rng, restore, restore_rng
from steep.checkpoint.compare import SCORES_CHANGE, differences, warnings
from steep.checkpoint.load import Checkpoint, find_checkpoint, open_checkpoint
from steep.checkpoint.save import CheckpointState
from steep.config.load import dump_yaml
from steep.config.redact import redact
from steep.config.run import RunConfig
from steep.config.yaml_file import parse_yaml
from steep.core.errors import CheckpointError
from steep.train.assemble import Job, Say
from steep.train.run_directory import RunDirectory
from steep.train.state import TrainState


@dataclass(frozen=True)
class Beginning:
    """Where a run begins: at a checkpoint, or at step 0 without one."""

    checkpoint: Checkpoint | None
    messages: list[str]
    scores_change: bool = False
    """Whether other text is scored than before, so that old scores say nothing about new ones."""

    @property
    def step(self) -> int:
        """Updates that are already made."""
        return self.checkpoint.manifest.step if self.checkpoint else 0

    @property
    def weights(self) -> Path | None:
        """A folder that transformers loads the weights from, faster than the base was made (a .gguf is dequantized)."""
        return self.checkpoint.path / "model" / "consolidated" if self.checkpoint else None


def find_beginning(run: RunDirectory, config: RunConfig, resume: bool | None) -> Beginning:
    """The newest good checkpoint of the run directory, if there is one and it is of the same run.

    resume: True demands a checkpoint, False refuses a folder that has one, None takes what is there.
    Raises CheckpointError, naming what differs if the directory holds another run.
    """
    holds_checkpoints = any(run.checkpoints.glob("epoch_*_step_*"))
    if not holds_checkpoints:
        if resume:
            raise CheckpointError(f"--resume: {run.path} holds no checkpoint. Leave --resume away to start the run.")
        _refuse_another_run(run, config)
        return Beginning(None, [])
    if resume is False:
        raise CheckpointError(
            f"{run.path} already holds a run. Choose another --run.name, delete the folder, or leave --no-resume away."
        )
    path, messages = find_checkpoint(run.path)
    checkpoint = open_checkpoint(path)
    saved, current = parse_yaml(checkpoint.config_yaml).data, redact(config.to_mapping())
    _refuse(run, saved, current, "holds a different run")
    warned = warnings(saved, current)
    return Beginning(
        checkpoint,
        [*messages, *warned, f"resuming from {path.name}"],
        scores_change=any(line.endswith(SCORES_CHANGE) for line in warned),
    )


def _refuse_another_run(run: RunDirectory, config: RunConfig) -> None:
    """A run that stopped before its first checkpoint starts anew; if it was another run, say so instead."""
    if not run.config.exists():
        return
    saved = parse_yaml(run.config.read_text(encoding="utf-8")).data
    _refuse(
        run,
        saved,
        redact(config.to_mapping()),
        "belongs to a different run, which stopped before its first checkpoint (so "
        "that the folder may as well be deleted)",
    )


def _refuse(run: RunDirectory, saved: dict[str, Any], current: dict[str, Any], what: str) -> None:
    # Where the data lies may change: whether it is the same data is seen from the plan, once it is open.
    changed = differences(saved, current, "opened later", "opened later")
    if changed:
        lines = "\n  ".join(changed)
        raise CheckpointError(
            f"{run.path} {what}:\n  {lines}\n"
            "Give this run another --run.name, or use the saved values to continue that one."
        )


def begin_state(beginning: Beginning, job: Job, say: Say) -> TrainState:
    """The state to begin with. Raises CheckpointError where the data is not what the checkpoint was trained on."""
    for message in beginning.messages:
        say(message)
    plan_fingerprint = job.data.plan.fingerprint
    if beginning.checkpoint is None:
        return TrainState(plan_fingerprint=plan_fingerprint, tokens_by_source=[0] * len(job.data.stores))
    state = TrainState.from_mapping(beginning.checkpoint.train_state)
    if state.plan_fingerprint != plan_fingerprint:
        raise CheckpointError(
            f"the data has changed since {beginning.checkpoint.path.name} was saved: the plan was {state.plan_fingerprint} "
            f"and is now {plan_fingerprint}. A source's content, the sequence length, the seed or the held-out share differs. "
            "Restore them to continue, or start another run with --run.name."
        )
    if beginning.scores_change:
        state.base_scores, state.scores, state.best_loss, state.best_step = {}, {}, None, None
    return state


def restore_job(beginning: Beginning, job: Job) -> None:
    """Weights, optimizer and random state as they were; the random state last, after all that could draw from it."""
    if beginning.checkpoint is not None:
        restore(job.model, job.engine.optimizer, beginning.checkpoint)
        restore_rng(beginning.checkpoint.rng())


def checkpoint_name(job: Job, state: TrainState) -> str:
    """epoch_<of the newest sequence>_step_<updates made>."""
    return f"epoch_{max(0, state.sequences_seen - 1) // job.data.plan.sequences_per_epoch}_step_{state.step}"


def checkpoint_state(config: RunConfig, job: Job, state: TrainState) -> CheckpointState:
    """Everything that `restore_job` and `begin_state` want back."""
    captured = capture(job.model, job.engine.optimizer)
    fresh_score = state.scores_step == state.step and state.scores
    return CheckpointState(
        model_tensors=captured.model_tensors,
        optimizer_tensors=captured.optimizer_tensors,
        optimizer_state=captured.optimizer_state,
        rng=capture_rng(),
        config_yaml=dump_yaml(redact(config.to_mapping())),
        step=state.step,
        tokens=state.tokens_seen,
        sequences_seen=state.sequences_seen,
        plan_fingerprint=state.plan_fingerprint,
        train_state=state.to_mapping(),
        hf_files=job.hf_files,
        score=next(iter(state.scores.values()))["nats_per_token"] if fresh_score else None,
    )
