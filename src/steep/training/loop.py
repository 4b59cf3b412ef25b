"""The run, top to bottom: what happens, and when. Everything that varies comes in as a value."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TextIO

from torch import nn

from steep.checkpoint.save import CheckpointWriter
from steep.config.load import ConfigLike, as_config
from steep.config.redact import redact
from steep.config.run import RunConfig
from steep.core import targets
from steep.core.lock import RunLock
from steep.core.public import public
from steep.core.say import Say
from steep.optim.schedule import multiplier
from steep.runtime.preemption import Interrupted, StopSignals
from steep.runtime.ranks import join_ranks
from steep.runtime.run_directory import RunDirectory
from steep.trackers.backends.jsonl import read_records
from steep.trackers.run_trackers import Trackers
from steep.training.assemble import Job, assemble, open_loader
from steep.training.failure import explained_errors
from steep.training.finish import already_finished, describe_end, is_complete, is_finished
from steep.training.forecast import Forecaster
from steep.training.meter import Meter
from steep.training.result import TrainResult
from steep.training.resume import (
    ResumePoint,
    checkpoint_state,
    find_resume_point,
    name_checkpoint,
    restore_job,
    restore_state,
)
from steep.training.spikes import RollBack, SpikeWatch
from steep.training.start import describe_start
from steep.training.state import TrainState
from steep.training.validation import due, validate


@public
def train(
    config: ConfigLike,
    *,
    resume: bool | None = None,
    accept_data_change: bool = False,
    allow_code: bool = True,
    stream: TextIO | None = None,
    model: nn.Module | None = None,
) -> TrainResult:
    """Train as configured, from the run's newest checkpoint if it has one. Raises SteepError.

    config: a RunConfig, its values as a mapping, or the path of a YAML file.
    resume: True demands a checkpoint, False refuses a folder that has one, None takes what is there.
    accept_data_change: continue with other data than the checkpoint was trained on, from its beginning, and record it.
    allow_code: whether `_target_` may run code outside steep, torch and transformers.
    stream: where the console writes; standard output by default.
    model: a model made from this configuration, adapter included, to train in place; such a run starts at step 0.
    """
    config = as_config(config)
    ranks = join_ranks()
    targets.check_run(config, lambda line: print(line, file=stream), allow_code)
    run = RunDirectory(Path(config.run.directory).expanduser() / config.run.name, ranks)
    with run.created():
        while True:
            try:
                return _process(config, run, resume, accept_data_change, allow_code, stream, model)
            except RollBack:
                resume, accept_data_change = None, False


def _process(
    config: RunConfig,
    run: RunDirectory,
    resume: bool | None,
    accept_data_change: bool,
    allow_code: bool,
    stream: TextIO | None,
    model: nn.Module | None,
) -> TrainResult:
    """From the newest checkpoint to the end of the run, an interruption, or a rollback (see spikes.py)."""
    ranks = run.ranks
    with ExitStack() as stack:
        stack.enter_context(ranks.first_only(RunLock(run.path)))
        run.remove_leftovers()
        notes: list[str] = []  # said once there is a console
        resume_point = ranks.from_first(
            lambda: find_resume_point(run, config, notes.append, resume, accept_data_change)
        )
        config = resume_point.config
        stack.enter_context(explained_errors(run))
        trackers = stack.enter_context(
            Trackers(
                run.path,
                redact(config.to_mapping()),
                config.trackers,
                config.console,
                stream=stream,
                build_target=lambda target: targets.build(target, allow_code=allow_code),
                ranks=ranks,
            )
        )
        stop = stack.enter_context(StopSignals())
        return _run(run, resume_point, notes, trackers, stop, model)


def _run(
    run: RunDirectory,
    resume_point: ResumePoint,
    notes: list[str],
    trackers: Trackers,
    stop: StopSignals,
    model: nn.Module | None,
) -> TrainResult:
    job = assemble(resume_point.config, trackers.line, ranks=run.ranks, model=model, **resume_point.taken_over)
    config = job.config
    for note in notes:
        trackers.line(note)
    state, job = restore_state(resume_point, job, trackers.line)
    if is_finished(run, job, state):
        return already_finished(run, job, state, trackers)
    if run.ranks.is_first:
        describe_start(run, config, job, trackers.line)
    trackers.start_configured(redact(config.to_mapping()))
    trackers.rewind(state.step if resume_point.checkpoint else -1)
    trackers.expect_steps(job.sizes.steps, state.step)
    restore_job(resume_point, job, run.ranks)  # after all that draws random numbers; evaluation and samples draw none
    validate(config, job, state, trackers, run)
    stop.may_save()
    _train_steps(config, run, job, state, trackers, stop)
    return describe_end(run, config, job, state, trackers, stop.exit_code)


def _train_steps(
    config: RunConfig,
    run: RunDirectory,
    job: Job,
    state: TrainState,
    trackers: Trackers,
    stop: StopSignals,
) -> None:
    """Every step from `state` to the end of the run, or to a signal or the time limit, with what happens between steps."""
    sizes, engine, say = job.sizes, job.engine, trackers.line
    started, elapsed_before, first_step = time.monotonic(), state.elapsed_seconds, state.step
    saved_step, saved_at = state.step, started
    check = engine.trainable_check(say)
    meter, loader = Meter(job), open_loader(config, job, state.step, run.ranks)
    forecaster = Forecaster(sizes.steps, config.schedule, read_records(run.metrics))
    with _writer(config, run, say) as writer:
        watch = SpikeWatch(config.train, state, job.data.order, job.data.names, sizes, run, say, writer.wait)
        for step in loader:
            meter.batch_arrived()
            factor = multiplier(state.step, sizes.steps, config.schedule)
            result = None if watch.is_skipped(state.step) else engine.train_step(step, factor, watch.should_update)
            updated = result is not None and result.applied
            state.advance(step.counts, job.data.names, updated)
            if result is not None:
                records = meter.finish_step(state, step.counts, result, engine.learning_rate)
                trackers.log_all(forecaster.observe(watch.observe(records)))
            check.after_step(factor * updated, last=state.step == sizes.steps)
            if state.step == first_step + 1 and saved_step == first_step:
                writer.reserve(checkpoint_state(config, job, state))  # the optimizer has its state now

            with suppress(Interrupted), stop.prompt():  # what is left out here is done when the run is resumed
                validate(config, job, state, trackers, run)
            leaving = stop.received is not None or state.step == sizes.steps or _past(config.train.max_seconds, started)
            wanted = due(config.checkpoint.every_steps, state.step) or _past(config.checkpoint.every_seconds, saved_at)
            leaving, wanted = run.ranks.agree(leaving, wanted)  # clocks and signals differ by rank
            if (leaving or wanted) and state.step > saved_step:
                # a NaN of the newest step is seen before anything is written
                trackers.log_all(forecaster.observe(watch.observe(meter.flush())))
                trackers.flush()
                state.elapsed_seconds = elapsed_before + time.monotonic() - started
                if stop.received is not None and not is_complete(job, state):
                    say(f"{stop.received.name} received: saving, then leaving")
                writer.save(name_checkpoint(job, state), checkpoint_state(config, job, state))
                saved_step, saved_at = state.step, time.monotonic()
            if leaving:
                return
            writer.raise_failure()
            meter.start_step()


def _writer(config: RunConfig, run: RunDirectory, say: Say) -> CheckpointWriter:
    settings = config.checkpoint
    return CheckpointWriter(
        run.checkpoints, settings.copies_state, ranks=run.ranks, keep_last=settings.keep_last, keep_best=settings.keep_best,
        on_event=say,
    )  # fmt: skip


def _past(seconds: float | None, since: float) -> bool:
    return seconds is not None and time.monotonic() - since >= seconds
