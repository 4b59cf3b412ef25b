"""From step results to the numbers of a training line. In: what a step took and gave. Out: records for the trackers.

Results of a CUDA device are read one step late, so that nothing in a step waits for the device; those of a CPU at once.
Weakness: of a source with few label tokens in a step the mean loss is noise; read it over many steps, as console and report do.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from steep.core.errors import TrainingError
from steep.order.batches import StepCounts
from steep.training.assemble import Job
from steep.training.engine import StepResult
from steep.training.state import TrainState

ETA_WINDOW_STEPS = 20
"""The time left is estimated from this many of the newest steps."""


@dataclass(frozen=True)
class _Pending:
    record: dict[str, Any]
    result: StepResult
    sequences: range
    counts: StepCounts


class Meter:
    """Times the steps of a job and turns their results into records; with several sources, records hold the loss of each."""

    def __init__(self, job: Job, clock: Callable[[], float] = time.perf_counter):
        self._job, self._sizes = job, job.sizes
        self._lag_steps = 1 if job.engine.device.type == "cuda" else 0
        self._clock = clock
        self._pending: deque[_Pending] = deque()
        self._step_seconds: deque[float] = deque(maxlen=ETA_WINDOW_STEPS)
        self._started = clock()
        self._data_wait_seconds = 0.0

    def start_step(self) -> None:
        """The loop asks for the next batch. Also called after an evaluation or a save, whose time belongs to no step."""
        self._started = self._clock()

    def batch_arrived(self) -> None:
        """The batch is there."""
        self._data_wait_seconds = self._clock() - self._started

    def finish_step(
        self, state: TrainState, counts: StepCounts, result: StepResult, learning_rate: float
    ) -> list[dict[str, Any]]:
        """Take a step's result and return the records that have become known. Raises TrainingError for NaN or infinity.

        state: after the step.
        """
        step = state.step - 1
        # on a GPU this waits for the step before, which is its time
        older = self._read(until=max(0, self._lag_steps - 1))
        seconds = self._clock() - self._started
        self._step_seconds.append(seconds)
        rate, flops, peak_flops = counts.num_tokens / seconds, self._job.flops_per_token, self._job.peak_flops
        mean_seconds = sum(self._step_seconds) / len(self._step_seconds)
        record: dict[str, Any] = {
            "kind": "train",
            "step": step,
            "learning_rate": learning_rate,
            "tokens_per_second": rate,
            "tokens": state.tokens_seen,
            "sequences": state.sequences_seen,
            "mfu": None if flops is None or peak_flops is None else rate * flops / peak_flops,
            "memory_bytes": self._job.engine.peak_memory_bytes(),
            "data_wait_seconds": self._data_wait_seconds,
            "step_seconds": seconds,
            "eta_seconds": mean_seconds * (self._sizes.steps - step - 1),
            "time": time.time(),
            **({} if result.applied else {"skipped": True}),
            **({} if result.loss_scale is None else {"loss_scale": result.loss_scale, "overflow": result.overflowed}),
        }
        self._pending.append(_Pending(record, result, self._sizes.sequences_of_step(step), counts))
        self.start_step()
        # The line of the first step does not wait: the person is looking at the terminal.
        return older + self._read(until=0 if step == 0 else self._lag_steps)

    def flush(self) -> list[dict[str, Any]]:
        """The records of every step so far. Called before a save, so that no checkpoint follows an unseen NaN."""
        return self._read(until=0)

    def _read(self, until: int) -> list[dict[str, Any]]:
        records = []
        while len(self._pending) > until:
            pending = self._pending.popleft()
            step, numbers = pending.record["step"], pending.result.numbers()
            loss, grad_norm = numbers.loss, numbers.grad_norm
            if pending.result.applied and not (math.isfinite(loss) and math.isfinite(grad_norm)):
                first, last = pending.sequences.start, pending.sequences.stop - 1
                raise TrainingError(
                    f"step {step}: the loss is {loss} and the gradient norm {grad_norm}. The run stops here and saves nothing "
                    "more; the newest checkpoint is from before this step.\n"
                    f"  The step trained on sequences {first} to {last} of the sample order (steep inspect RUN --sequence "
                    f"{first} shows one).\n  What helps most often, in another run (--run.name): a lower "
                    "optimizer.learning_rate, more schedule.warmup_steps, or train.precision fp32 to see whether 16 bits are "
                    "the cause."
                )
            record = {"kind": "train", "step": step, "loss": loss, "grad_norm": grad_norm, **pending.record}
            names = self._job.data.names
            if len(names) > 1 and (by_source := losses_by_source(names, pending.counts, numbers.sequence_losses)):
                record["loss_by_source"] = by_source
            record |= expert_metrics(numbers.balance_losses, numbers.expert_loads, step)
            records.append(record)
        return records


TABLE_VALUES_PER_STEP = 256
"""Shares of experts that metrics.jsonl gets for each step on average; a larger model has its table in every n-th line."""


def expert_metrics(balance_losses: Sequence[float], loads: Sequence[Sequence[float]], step: int) -> dict[str, Any]:
    """The metrics of a mixture of experts, empty for other models.

    loads: for each layer the share of the assignments that each expert got. An expert's load is that share over an even one.
    """
    if not loads:
        return {}
    even = [[share * len(layer) for share in layer] for layer in loads]
    entropies = [
        -sum(share * math.log(share) for share in layer if share > 0) / math.log(len(layer)) if len(layer) > 1 else 1.0
        for layer in loads
    ]
    metrics: dict[str, Any] = {
        "balance_loss": sum(balance_losses) / len(balance_losses),
        "expert_load_max": max(map(max, even)),
        "expert_load_min": min(map(min, even)),
        "expert_entropy": sum(entropies) / len(entropies),
        "experts_by_layer": {
            "balance_loss": [round(loss, 4) for loss in balance_losses],
            "load_max": [round(max(layer), 3) for layer in even],
            "load_min": [round(min(layer), 3) for layer in even],
            "entropy": [round(entropy, 4) for entropy in entropies],
        },
    }
    if step % max(1, sum(map(len, loads)) // TABLE_VALUES_PER_STEP) == 0:
        metrics["expert_load"] = [[round(load, 3) for load in layer] for layer in even]
    return metrics


def losses_by_source(
    names: Sequence[str], counts: StepCounts, sequence_losses: Sequence[float]
) -> dict[str, dict[str, float]]:
    """{source: {"nats_per_token": mean over its label tokens, "label_tokens": their number}}, without sources that have none.

    names: of the sources. sequence_losses: summed nats of each sequence of the step, in the order of `counts`. A sequence holds
    documents of one source, packed or not, so its sum belongs to that source whole. The mean over all label tokens of a step is
    the mean of its sources weighted by their label tokens.
    """
    nats, tokens = [0.0] * len(names), [0] * len(names)
    for source, count, loss in zip(counts.sources, counts.label_tokens, sequence_losses, strict=True):
        nats[source] += loss
        tokens[source] += count
    return {
        name: {"nats_per_token": total / count, "label_tokens": count}
        for name, total, count in zip(names, nats, tokens, strict=True)
        if count
    }
