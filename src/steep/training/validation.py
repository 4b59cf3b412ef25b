"""Held-out scores and samples while a run trains, and when they are due."""

from __future__ import annotations

from collections.abc import Callable

from steep.config.run import RunConfig
from steep.data.held_out_text import HeldOutText
from steep.estimate.automatic import AUTO
from steep.estimate.scoring import MOST_TOKENS, interval_steps
from steep.evaluation.end_of_text import measure_stops
from steep.evaluation.evaluate_model import score_base
from steep.evaluation.held_out import Beginnings, Score, choose_beginnings, score_text
from steep.runtime.run_directory import RunDirectory
from steep.trackers.run_trackers import Trackers
from steep.training.assemble import Job
from steep.training.state import TrainState


def validate(config: RunConfig, job: Job, state: TrainState, trackers: Trackers, run: RunDirectory) -> None:
    """Score and sample the weights as they are, if that is due at this step and not done yet.

    An interrupted process may leave it undone; the process that resumes does it before its first step.
    """
    always = state.step in (0, job.sizes.steps)
    every_steps = interval_steps(config.evaluate, job.sizes.steps)
    if state.scores_step != state.step and (always or due(every_steps, state.step)):
        evaluate(config, job, state, trackers, run)
    if state.samples_step != state.step and (always or due(config.evaluate.sample_every_steps, state.step)):
        write_samples(config, job, state, trackers, run)


def due(every_steps: int | None, step: int) -> bool:
    """Whether something that happens every `every_steps` steps happens after `step` updates."""
    return every_steps is not None and step % every_steps == 0


def evaluate(config: RunConfig, job: Job, state: TrainState, trackers: Trackers, run: RunDirectory) -> None:
    """Score every held-out text, note the scores in the state and log them."""
    texts, limit = job.data.held_out_texts, scored_tokens(config)
    chosen = [choose_beginnings(text, limit) for text in texts]
    total = sum(part.num_tokens for parts in chosen for part in parts)
    model = (
        "the base"
        if state.step == 0 and getattr(config.model, "pretrained", None) is not None
        else f"step {state.step}"
    )
    with trackers.progress(f"scoring {model}", total, "tokens") as progress:
        scores = [score(config, job, text, parts, progress.advance) for text, parts in zip(texts, chosen, strict=True)]
    for name in state.note_scores(scores):
        trackers.line(f"{name}: another part of it was scored at the start, so that score is dropped")
    if state.step == 0 and config.vocabulary is not None and scores:
        state.base_scores = _scores_before_new_tokens(config, job, trackers, run)
    if state.step in (0, job.sizes.steps):
        with job.engine.evaluating():
            stops = measure_stops(
                job.engine.logits_at,
                texts,
                job.tokenizer.eos_id,
                tokens=limit,
                sequence_length=job.sizes.sequence_length,
                batch_size=config.evaluate.batch_size or job.sizes.micro_batch_size,
            )
        state.note_stops(stops)
    for result in scores:
        trackers.log({"kind": "evaluate", "step": state.step, **result.to_mapping()})


def _scores_before_new_tokens(
    config: RunConfig, job: Job, trackers: Trackers, run: RunDirectory
) -> dict[str, dict[str, object]]:
    """The true base's scores by text, in its own tokens, which the report compares with."""
    found = score_base(
        run.path,
        job.data.held_out_texts,
        job.tokenizer,
        tokens=scored_tokens(config),
        batch_size=config.evaluate.batch_size or job.sizes.micro_batch_size,
        sequence_length=job.sizes.sequence_length,
        device=str(job.engine.device),
        precision=job.engine.precision,
        say=trackers.line,
    )
    return {result.text: result.to_mapping() for result in found}


def scored_tokens(config: RunConfig) -> int:
    """How much of each text is scored. config: of a run that has started, which has chosen."""
    return MOST_TOKENS if config.evaluate.tokens == AUTO else int(config.evaluate.tokens)


def score(
    config: RunConfig,
    job: Job,
    text: HeldOutText,
    chosen: list[Beginnings] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Score:
    """The score of one held-out text, dropout off. chosen, advance: see `score_text`."""
    with job.engine.evaluating():
        return score_text(
            job.engine.token_losses,
            text,
            tokens=scored_tokens(config),
            batch_size=config.evaluate.batch_size or job.sizes.micro_batch_size,
            sequence_length=job.sizes.sequence_length,
            eos_id=job.tokenizer.eos_id if job.tokenizer.append_eos else None,
            decode=job.tokenizer.decode_text,
            advance=advance,
            chosen=chosen,
        )


def write_samples(config: RunConfig, job: Job, state: TrainState, trackers: Trackers, run: RunDirectory) -> None:
    """Continue every prompt greedily (so that no random number is drawn), log it and write it to samples/."""
    samples = [
        (prompt, job.engine.generate(job.tokenizer, prompt, config.evaluate.sample_tokens))
        for prompt in config.evaluate.prompts
    ]
    state.samples_step = state.step
    for prompt, text in samples:
        trackers.log({"kind": "sample", "step": state.step, "prompt": prompt, "text": text})
    if samples:
        run.write_sample(state.step, samples)
