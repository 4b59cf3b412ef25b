"""Loss spikes: detected against earlier losses, reported with their documents, and skipped if the user wishes.

In: the loss of each step. Out: lines, entries of the ledger, and which steps make no update. Main choice: a step keeps its number
and its sequences whether or not it updates the weights, so the order stays a function of the sequence number, and the
learning rate a function of the step. A rollback is a resume: the run continues from its newest checkpoint. The steps to skip are
first written to rollbacks.json, so a kill at any instant changes nothing. Weakness: a threshold from 16 to 64 losses does not
detect a slow divergence, and skipped tokens are not trained on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from steep.checkpoint.load import find_checkpoint, open_checkpoint
from steep.core.errors import CheckpointError, TrainingError
from steep.order.batches import Sizes
from steep.order.data_order import DataOrder
from steep.runtime.run_directory import RunDirectory
from steep.training.config import TrainConfig
from steep.training.state import TrainState

WINDOW_STEPS, FEWEST_STEPS = 64, 16
DEVIATIONS = 6.0
"""Scaled median absolute deviations above the median. Losses of small batches have heavy tails; false alarms cost tokens."""

MAD_TO_SIGMA = 1.4826
SMALLEST_RISE_RATIO = 0.1
"""A rise of less than a tenth of the median is never a spike, even after very stable losses."""

MOST_ROLLBACKS, MOST_SKIPPED_IN_A_ROW, DOCUMENTS_NAMED = 3, 10, 20

ROLLBACKS_FILE = "rollbacks.json"


class RollBack(Exception):
    """The run continues from its newest checkpoint; rollbacks.json holds the steps that it then skips."""


def spike_threshold(recent: Sequence[float]) -> float | None:
    """The loss above which the next one is a spike; None while there are too few to judge by."""
    if len(recent) < FEWEST_STEPS:
        return None
    median = statistics.median(recent)
    deviation = MAD_TO_SIGMA * statistics.median(abs(loss - median) for loss in recent)
    return median + max(DEVIATIONS * deviation, SMALLEST_RISE_RATIO * median)


@dataclass
class SpikeWatch:
    """Judges every step of a process. See the module."""

    config: TrainConfig
    state: TrainState
    order: DataOrder
    names: list[str]
    """Of the sources."""
    sizes: Sizes
    run: RunDirectory
    say: Callable[[str], None]
    wait_for_save: Callable[[], None]
    """Waits until no checkpoint is being written."""
    _skipped: set[int] = field(default_factory=set)
    _in_a_row: int = 0

    def __post_init__(self) -> None:
        for rollback in self.run.read_list(ROLLBACKS_FILE):
            self._skipped |= set(range(rollback["first_step"], rollback["last_step"] + 1))

    def is_skipped(self, step: int) -> bool:
        """Whether an earlier rollback decided that this step makes no update."""
        if step in self._skipped:
            self.say(f"step {step} is skipped, as the rollback decided: sequences {self._sequences(step)}")
        return step in self._skipped

    @property
    def should_update(self) -> Callable[[float, float], bool] | None:
        """What the engine asks before an update, with loss and gradient norm; None where nothing depends on the answer.

        Asking makes every step wait for the device.
        """
        return None if self.config.on_spike == "continue" else self._admit

    def _admit(self, loss: float, grad_norm: float) -> bool:
        spike = self._judge(self.state.step, loss, grad_norm)
        self._in_a_row = 0 if spike is None else self._in_a_row + 1
        if spike is None:
            return True
        if self.config.on_spike == "rollback":
            self._roll_back(spike)
        if self._in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{self._in_a_row} steps in a row were skipped because of their loss (the last: {loss:.3f}). This is not a "
                "spike: the model has diverged, or the data has changed. Look at the sequences above; lower "
                "optimizer.learning_rate, or set train.on_spike to continue."
            )
        return False

    def observe(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The records, after the losses in them were judged where `should_update` has not done so, and overflows said."""
        for record in records:
            if record.get("overflow"):
                self.state.overflowed_steps += 1
                step, scale = record["step"], record["loss_scale"]
                self.say(
                    f"step {step}: a gradient overflowed fp16 at a loss scale of {scale:,.0f}, which is halved. The step "
                    f"makes no update: sequences {self._sequences(step)} are not trained on"
                )
            elif self.config.on_spike == "continue":
                self._judge(record["step"], record["loss"], record["grad_norm"])
        return records

    def _judge(self, step: int, loss: float, grad_norm: float) -> dict[str, Any] | None:
        """The entry of a spike, said and noted in the state; None for a loss like those before it, which it joins."""
        limit = spike_threshold(self.state.recent_losses)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite and (limit is None or loss <= limit):
            self.state.recent_losses = [*self.state.recent_losses, loss][-WINDOW_STEPS:]
            return None
        action = {"continue": "logged", "skip": "skipped", "rollback": "rolled back"}[self.config.on_spike]
        numbers = self.sizes.sequences_of_step(step)
        spike: dict[str, Any] = {
            "step": step, "loss": loss if finite else None, "threshold": limit, "action": action,
            "sequences": [numbers.start, numbers.stop - 1], "documents": self._documents(numbers),
        }  # fmt: skip
        self.state.spikes.append(spike)
        what = f"the loss is {loss:.3f}" + ("" if limit is None else f" and {limit:.3f} was the most to expect")
        documents = "; ".join(
            f"{name}: documents {', '.join(map(str, ids))}" for name, ids in spike["documents"].items()
        )
        self.say(f"loss spike at step {step} ({action}): {what}. Sequences {self._sequences(step)}; {documents}")
        return spike

    def _roll_back(self, spike: dict[str, Any]) -> None:
        """Write down which steps are skipped and give up the current state. Raises RollBack; TrainingError after too many."""
        done = self.run.read_list(ROLLBACKS_FILE)
        if len(done) >= MOST_ROLLBACKS:
            raise TrainingError(
                f"the run was rolled back {len(done)} times, and the loss spikes again at step {spike['step']}. Every rollback "
                f"stands in {self.run.path / ROLLBACKS_FILE}. Look at the documents named there, or lower "
                "optimizer.learning_rate in another run."
            )
        self.wait_for_save()
        try:
            from_step = open_checkpoint(find_checkpoint(self.run.path)).manifest.step
        except CheckpointError:  # none yet
            from_step = 0
        first = max(from_step, spike["step"] - self.config.spike_window_steps + 1)
        entry = {**spike, "from_step": from_step, "first_step": first, "last_step": spike["step"]}
        self.run.write(ROLLBACKS_FILE, [*done, entry])
        self.say(
            f"rolling back to step {from_step}, the newest checkpoint; steps {first} to {spike['step']} will make no update "
            f"(sequences {self.sizes.sequences_of_step(first).start} to {spike['sequences'][1]})"
        )
        raise RollBack

    def _sequences(self, step: int) -> str:
        numbers = self.sizes.sequences_of_step(step)
        return f"{numbers.start} to {numbers.stop - 1}"

    def _documents(self, sequences: range) -> dict[str, list[int]]:
        """Documents of each source in these sequences, by their number in its store; the first few."""
        found: dict[str, list[int]] = {}
        for number in sequences:
            ordered = self.order.sequence(number)
            known = found.setdefault(self.names[ordered.source], [])
            whole = map(self.order.sources[ordered.source].whole_document, (r.document for r in ordered.ranges))
            known += [document for document in dict.fromkeys(whole) if document not in known]
        return {name: ids[:DOCUMENTS_NAMED] for name, ids in found.items()}
