"""From step results to the numbers of a training line. In: what a step took and gave. Out: records for the trackers.

Results of a CUDA device are read one step late, so that nothing in a step waits for the device; those of a CPU at once.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steep.batch import Batch
from steep.core.errors import TrainingError
from steep.order.batches import Sizes
from steep.training.engine import StepResult
from steep.training.source_losses import StepSources, step_sources
from steep.training.state import TrainState

ETA_WINDOW_STEPS = 20
"""The time left is judged by so many of the newest steps."""


class _Values:
    """The numbers of a step, on their way to the host: reading them waits for their step and for no later one."""

    def __init__(self, result: StepResult):
        pair = torch.stack([result.loss.double(), result.grad_norm.double()])
        values = torch.cat([pair, result.sequence_losses.double()])
        self._event = torch.cuda.Event() if values.is_cuda else None
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._host.copy_(values, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> tuple[float, float, list[float]]:
        """Loss, gradient norm, and the summed loss of each sequence."""
        if self._event is not None:
            self._event.synchronize()
        loss, grad_norm, *sequence_losses = self._host.tolist()
        return loss, grad_norm, sequence_losses


@dataclass(frozen=True)
class _Pending:
    record: dict[str, Any]
    values: _Values
    sequences: range
    sources: StepSources | None


class Meter:
    """Times steps and turns their results into records.

    flops_per_token, peak_flops: for the MFU; None where unknown. memory_bytes: called at every step. source_names: of the
    training sources; with more than one, records say the loss of each.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        flops_per_token: float | None,
        peak_flops: float | None,
        memory_bytes: Callable[[], int],
        source_names: Sequence[str] = (),
        lag_steps: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._sizes = sizes
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._memory_bytes = memory_bytes
        self._source_names = source_names
        self._lag_steps = lag_steps
        self._clock = clock
        self._pending: deque[_Pending] = deque()
        self._step_seconds: deque[float] = deque(maxlen=ETA_WINDOW_STEPS)
        self._started = clock()
        self._data_wait_seconds = 0.0

    def start_step(self) -> None:
        """The loop asks for the next batch. Also called after an evaluation or save, whose time is no step's."""
        self._started = self._clock()

    def batch_arrived(self) -> None:
        """The batch is there."""
        self._data_wait_seconds = self._clock() - self._started

    def finish_step(
        self, state: TrainState, batches: list[Batch], result: StepResult, learning_rate: float
    ) -> list[dict[str, Any]]:
        """Take a step's result and return the records that have become known. Raises TrainingError for NaN or infinity.

        state: after the step.
        """
        step = state.step - 1
        older = self._read(
            until=max(0, self._lag_steps - 1)
        )  # on a GPU this waits for the step before, which is its time
        seconds = self._clock() - self._started
        self._step_seconds.append(seconds)
        rate = sum(int(batch.num_tokens.sum()) for batch in batches) / seconds
        record: dict[str, Any] = {
            "kind": "train",
            "step": step,
            "learning_rate": learning_rate,
            "tokens_per_second": rate,
            "tokens": state.tokens_seen,
            "sequences": state.sequences_seen,
            "mfu": self._mfu(rate),
            "memory_bytes": self._memory_bytes(),
            "data_wait_seconds": self._data_wait_seconds,
            "step_seconds": seconds,
            "eta_seconds": self._eta_seconds(step),
            "time": time.time(),
            **({} if result.applied else {"skipped": True}),
        }
        sources = step_sources(batches) if len(self._source_names) > 1 else None
        self._pending.append(_Pending(record, _Values(result), self._sizes.sequences_of_step(step), sources))
        self.start_step()
        # The first step's line does not wait: whoever started the run is looking.
        return older + self._read(until=0 if step == 0 else self._lag_steps)

    def flush(self) -> list[dict[str, Any]]:
        """The records of every step so far. Called before a save, so that no checkpoint follows an unseen NaN."""
        return self._read(until=0)

    def _read(self, until: int) -> list[dict[str, Any]]:
        records = []
        while len(self._pending) > until:
            pending = self._pending.popleft()
            loss, grad_norm, sequence_losses = pending.values.read()
            if not pending.record.get("skipped") and not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise TrainingError(not_finite_message(pending.record["step"], loss, grad_norm, pending.sequences))
            first = {"kind": "train", "step": pending.record["step"], "loss": loss, "grad_norm": grad_norm}
            by_source = pending.sources and pending.sources.losses(self._source_names, sequence_losses)
            records.append(first | pending.record | ({"loss_by_source": by_source} if by_source else {}))
        return records

    def _mfu(self, tokens_per_second: float) -> float | None:
        if self._flops_per_token is None or self._peak_flops is None:
            return None
        return tokens_per_second * self._flops_per_token / self._peak_flops

    def _eta_seconds(self, step: int) -> float:
        mean = sum(self._step_seconds) / len(self._step_seconds)
        return mean * (self._sizes.steps - step - 1)


def not_finite_message(step: int, loss: float, grad_norm: float, sequences: range) -> str:
    """What went wrong at which step on which data, and what to try."""
    return (
        f"step {step}: the loss is {loss} and the gradient norm {grad_norm}. The run stops here and saves nothing more; the "
        f"newest checkpoint is from before this step.\n  The step trained on sequences {sequences.start} to "
        f"{sequences.stop - 1} of the plan (steep inspect RUN --sequence {sequences.start} shows one).\n"
        "  What helps most often, in another run (--run.name): a lower optimizer.learning_rate, more schedule.warmup_steps, "
        "or train.precision fp32 to see whether bf16 is the cause."
    )
