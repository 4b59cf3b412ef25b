"""Continue a run or start one. In: a run directory and a configuration. Out: where to resume, or why that is not possible."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steep.checkpoint.compare import SCORES_CHANGE, differences, warnings
from steep.checkpoint.folder import CheckpointState
from steep.checkpoint.load import Checkpoint, find_checkpoint, open_checkpoint
from steep.checkpoint.manifest import checkpoint_name
from steep.checkpoint.pieces import capture_rng, restore_rng
from steep.config.load import dump_yaml
from steep.config.redact import redact
from steep.config.run import RunConfig
from steep.core.errors import CheckpointError
from steep.core.files import read_text
from steep.core.say import Say
from steep.estimate.settle import as_resumed, read_saved, settle
from steep.order.data_order import DataOrder, same_past
from steep.runtime.ranks import Ranks
from steep.runtime.run_directory import RunDirectory
from steep.training.assemble import Job
from steep.training.state import TrainState


@dataclass(frozen=True)
class ResumePoint:
    """Where a process takes up the run: at a checkpoint, or at step 0 without one."""

    config: RunConfig
    """As it was given, with what the run chose at its start in place of `auto`."""
    checkpoint: Checkpoint | None = None
    accept_data_change: bool = False
    """Whether to go on with other data than was trained on."""
    scores_change: bool = False
    """Whether other text is scored than before, so that old scores say nothing about new ones."""
    same_tokenizer: bool = False
    """Whether the configuration names the tokenizer that the checkpoint was trained with."""

    @property
    def tokenizer(self) -> Path | None:
        """A folder with the run's tokenizer; reading it takes half a second, reading one from a .gguf ten."""
        folder = self.weights
        return folder if self.same_tokenizer and folder and (folder / "tokenizer.json").is_file() else None

    @property
    def taken_over(self) -> dict[str, Any]:
        """What `assemble` takes from the checkpoint. `recorded` is None for checkpoints of versions that did not record it."""
        recorded = self.checkpoint.train_state.get("model_choice") if self.checkpoint else None
        return {"weights": self.weights, "tokenizer_folder": self.tokenizer, "recorded": recorded}

    @property
    def weights(self) -> Path | None:
        """A folder that transformers loads the weights from, faster than the base was made (a .gguf is dequantized)."""
        return self.checkpoint.path / "model" / "consolidated" if self.checkpoint else None


def find_resume_point(
    run: RunDirectory, config: RunConfig, say: Say, resume: bool | None, accept_data_change: bool = False
) -> ResumePoint:
    """The newest good checkpoint of the run directory, if there is one and it is of the same run.

    resume: True demands a checkpoint, False refuses a folder that has one, None takes what is there.
    Raises CheckpointError, naming what differs if the directory holds another run.
    """
    if not run.has_checkpoint:
        if resume:
            raise CheckpointError(f"--resume: {run.path} holds no checkpoint. Start the run without --resume.")
        saved = read_saved(run, read_text(run.config)) if run.config.exists() else None
        config = settle(config, saved, say)
        if saved is not None:  # a run that stopped before its first checkpoint starts anew, if it is the same
            what = (
                "belongs to a different run, which stopped before its first checkpoint (so the folder can be deleted)"
            )
            _refuse(run, saved, redact(config.to_mapping()), what)
        return ResumePoint(config)
    if resume is False:
        raise CheckpointError(
            f"{run.path} already holds a run. Choose another --run.name, delete the folder, or remove --no-resume."
        )
    checkpoint = open_checkpoint(find_checkpoint(run.path, say))
    saved = read_saved(run, checkpoint.config_yaml)
    config = as_resumed(config, saved, say)
    current = redact(config.to_mapping())
    _refuse(run, saved, current, "holds a different run")
    warned = warnings(saved, current)
    for line in (*warned, f"resuming from {checkpoint.path.name}"):
        say(line)
    return ResumePoint(
        config,
        checkpoint,
        accept_data_change,
        scores_change=any(line.endswith(SCORES_CHANGE) for line in warned),
        same_tokenizer=all(saved.get(key) == current.get(key) for key in ("tokenizer", "vocabulary")),
    )


def _refuse(run: RunDirectory, saved: dict[str, Any], current: dict[str, Any], what: str) -> None:
    # The paths of the data may change: whether it is the same data is known once it is open.
    changed = differences(saved, current, "opened later", "opened later")
    if changed:
        lines = "\n  ".join(changed)
        raise CheckpointError(
            f"{run.path} {what}:\n  {lines}\n"
            "Give this run another --run.name, or use the saved values to continue that one."
        )


def restore_state(resume_point: ResumePoint, job: Job, say: Say) -> tuple[TrainState, Job]:
    """The state to begin with, and the job with its sizes and order as they follow from it.

    Raises CheckpointError where the data is not what the checkpoint was trained on.
    """
    order, files = job.data.order, job.data.files()
    if resume_point.checkpoint is None:
        seen = [0] * len(job.data.stores)
        return TrainState(
            order_fingerprint=order.fingerprint, order=order.describe(), files=files, tokens_by_source=seen
        ), job
    state = TrainState.from_mapping(resume_point.checkpoint.train_state)
    if state.order.get("first_sequence"):
        order = order.beginning_at(state.order["first_sequence"])
    if state.order_fingerprint != order.fingerprint:
        past = same_past(state.order, order.describe(), state.sequences_seen)
        order = _other_order(resume_point, state, order, [*past, *_changed_files(state.files, files)], say)
    state.order_fingerprint, state.order, state.files = order.fingerprint, order.describe(), files
    state.tokens_by_source += [0] * (len(job.data.stores) - len(state.tokens_by_source))
    if resume_point.scores_change:
        state.base_scores, state.scores, state.best_loss = {}, {}, None
    job.data.begin_streams(state.streams, order.counts(state.sequences_seen), say)
    sizes = job.sizes.resumed(state.step, state.sequences_seen)
    return state, replace(job, sizes=sizes, data=replace(job.data, order=order))


def _other_order(
    resume_point: ResumePoint, state: TrainState, order: DataOrder, changed: list[str], say: Say
) -> DataOrder:
    """The order to go on with where it is not the one that was trained with: itself if the past is the same, one that begins
    here if that was asked for. Raises CheckpointError."""
    assert resume_point.checkpoint is not None
    if not changed:
        say(f"the order changes from sequence {state.sequences_seen:,} on; earlier sequences stay the same")
        return order
    lines = "".join(f"  {line}\n" for line in changed)
    if not resume_point.accept_data_change:
        raise CheckpointError(
            f"the data has changed since {resume_point.checkpoint.path.name} was saved:\n{lines}"
            "Restore it to continue exactly, start another run with --run.name, or give --accept-data-change to continue with "
            "the current data from its beginning."
        )
    say(f"the data has changed; the current data is used from sequence {state.sequences_seen:,} on:\n{lines.rstrip()}")
    state.streams = []
    state.data_changes.append({
        "step": state.step, "first_sequence": state.sequences_seen, "changed": changed,
        "tokens_by_source": state.tokens_by_source,
    })  # fmt: skip
    state.tokens_by_source = _carried(state.tokens_by_source, state.order["sources"], order.describe()["sources"])
    return order.beginning_at(state.sequences_seen)


def _carried(tokens: list[int], then: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[int]:
    """Tokens trained of each source of now: those of the same content keep theirs, wherever they stand; others begin at 0."""
    left: dict[str, list[int]] = {}
    for source, count in zip(then, tokens, strict=False):
        left.setdefault(source["fingerprint"], []).append(count)
    counts = (left.get(source["fingerprint"]) for source in now)
    return [waiting.pop(0) if waiting else 0 for waiting in counts]


def _changed_files(then: list[dict[str, str]], now: list[dict[str, str]]) -> list[str]:
    """Which files are missing, new, changed or in another order, source by source."""
    found = []
    for number, (before, after) in enumerate(zip(then, now, strict=False), start=1):
        if set(before.values()) == set(after.values()) and list(before.values()) != list(after.values()):
            found.append(f"source {number}: its files are in another order")
            continue
        if list(before.values()) == list(after.values()) or not before or not after:
            continue  # the same content, perhaps elsewhere; or too many files to be listed
        found += [f"source {number}: missing {path}" for path in before if path not in after]
        found += [f"source {number}: new {path}" for path in after if path not in before]
        found += [
            f"source {number}: changed {path}" for path in before if after.get(path, before[path]) != before[path]
        ]
    return found


def restore_job(resume_point: ResumePoint, job: Job, ranks: Ranks) -> None:
    """Weights, optimizer and random state as they were; the random state last, after all that could draw from it."""
    if resume_point.checkpoint is not None:
        job.engine.load(resume_point.checkpoint)
        restore_rng(resume_point.checkpoint.rng(ranks.rank))


def name_checkpoint(job: Job, state: TrainState) -> str:
    """The name of a checkpoint of this state: its epoch is that of the newest sequence."""
    return checkpoint_name(max(0, state.sequences_seen - 1) // job.data.order.sequences_per_epoch, state.step)


def checkpoint_state(config: RunConfig, job: Job, state: TrainState) -> CheckpointState:
    """Everything that `restore_job` and `restore_state` want back."""
    pieces = job.engine.pieces()
    state.streams = job.data.stream_cursors(state.sequences_seen)
    state.model_choice = job.model_choice
    fresh_score = state.scores_step == state.step and state.scores
    return CheckpointState(
        model=pieces.model,
        optimizer=pieces.optimizer,
        optimizer_state=pieces.optimizer_state,
        rng=capture_rng(),
        config_yaml=dump_yaml(redact(config.to_mapping())),
        step=state.step,
        tokens=state.tokens_seen,
        sequences_seen=state.sequences_seen,
        plan_fingerprint=state.order_fingerprint,
        train_state=state.to_mapping(),
        hf_files=job.hf_files,
        weights_file=job.weights_file,
        score=next(iter(state.scores.values()))["nats_per_token"] if fresh_score else None,
    )
