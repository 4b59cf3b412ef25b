"""Who owns model and optimizer: everything that knows whether a tensor is complete, on which device, in which dtype.

The loop, the checkpoints and the scores ask an engine and get plain numbers, or tensors by name. `TorchEngine` is the native one,
for a single process. What every engine promises: the loss is the sum over all label tokens of the global batch divided by their
number, so neither micro-batches nor ranks change it; nothing in a step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from steep.batch import Batch, StepBatches
from steep.checkpoint.load import Checkpoint
from steep.checkpoint.pieces import Pieces, model_tensors, restore, take_pieces
from steep.core.say import Say
from steep.evaluation.generate import generate_text
from steep.models.balance import Routing, sum_routings
from steep.models.runner import ModelRunner
from steep.optim.build import build_optimizer
from steep.optim.config import OptimizerConfig
from steep.optim.ema import update_ema
from steep.runtime.device import peak_memory_bytes
from steep.runtime.precision import autocast
from steep.tokenizer.encode import TextTokenizer
from steep.training.loss_scale import LossScale
from steep.training.trainable_check import TrainableCheck

LOSS_SCALE = "loss_scale"
"""Key of its state in a checkpoint's optim/state.json."""

ShouldUpdate = Callable[[float, float], bool]
"""Whether to apply the update of a step, from its loss and its gradient norm."""


@dataclass(frozen=True)
class StepNumbers:
    """What a step gave, over all ranks."""

    loss: float
    """Nats per label token over the global batch: the sum of `sequence_losses` divided by the step's label tokens."""
    grad_norm: float
    """Before clipping."""
    sequence_losses: list[float]
    """The summed nats of each sequence of the step, in the order of the sequences."""
    balance_losses: list[float] = field(default_factory=list)
    """The balancing loss of each layer of a mixture of experts, per token; without its coefficient."""
    expert_loads: list[list[float]] = field(default_factory=list)
    """For each of these layers, the share of the assignments of tokens that each expert got."""


class StepResult:
    """The numbers of a step, on their way to the host: `numbers` waits for their step and for no later one.

    loss: () fp64. grad_norm: (). sequence_losses: (sequences,) fp32. applied: whether the weights were updated. routing: of the
    step, the losses per token. loss_scale: of mixed_fp16 in this step. overflowed: whether a gradient did not fit fp16 at that
    scale, so that nothing was updated.
    """

    def __init__(
        self,
        loss: Tensor,
        grad_norm: Tensor,
        sequence_losses: Tensor,
        applied: bool,
        routing: Routing | None = None,
        loss_scale: float | None = None,
        overflowed: bool = False,
    ):
        self.applied, self.loss_scale, self.overflowed = applied, loss_scale, overflowed
        parts = [torch.stack([loss.double(), grad_norm.double()]), sequence_losses.double()]
        if routing is not None:
            parts += [routing.losses.double(), *(counts.double() / counts.sum() for counts in routing.counts)]
        self._sizes = [len(part) for part in parts[1:]]
        values = torch.cat(parts)
        self._arrived = torch.cuda.Event() if values.is_cuda else None
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._host.copy_(values, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def numbers(self) -> StepNumbers:
        """The numbers of the step, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        (loss, grad_norm), *parts = (part.tolist() for part in self._host.split([2, *self._sizes]))
        sequence_losses, *routing = parts
        return StepNumbers(loss, grad_norm, sequence_losses, routing[0] if routing else [], routing[1:])


class Engine(Protocol):
    """What a run asks of its engine. Every rank calls it alike and gets the same numbers."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""

    @property
    def precision(self) -> str:
        """As in train.precision, `auto` resolved."""

    @property
    def learning_rate(self) -> float:
        """Of the newest update, in the first parameter group."""

    @property
    def peak_rates(self) -> dict[str, float]:
        """The learning rate at the peak of the schedule, by the name of the parameter group."""

    def train_step(self, step: StepBatches, multiplier: float, should_update: ShouldUpdate | None = None) -> StepResult:
        """One update on the micro-batches of a step, every learning rate times `multiplier`; none if `should_update` says no."""

    def rehearse(self, step: StepBatches, held_bytes: int) -> bool:
        """Whether the memory of the device is enough for a step while `held_bytes` more are taken. Updates nothing."""

    def evaluating(self) -> AbstractContextManager[None]:
        """No dropout and no gradients inside the block; each module has its own mode again afterwards."""

    def token_losses(self, batch: Batch) -> Tensor:
        """(B, T) fp32: -log p of each label token, 0 where there is none; without gradients."""

    def logits_at(self, batch: Batch, positions_K: Tensor) -> Tensor:
        """(K, V): logits at some of the batch's B*T positions, without gradients."""

    def generate(self, tokenizer: TextTokenizer, prompt: str, max_new_tokens: int) -> str:
        """The greedy continuation of a prompt. Draws no random number."""

    def trainable_check(self, say: Say) -> TrainableCheck:
        """A check that watches the updates from here on: does everything train that should?"""

    def pieces(self) -> Pieces:
        """This rank's part of the state, by name, global shape and offset. The tensors are the live ones."""

    def load(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint's weights and optimizer state in place, bit for bit. Raises CheckpointError."""

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """The complete tensors of the model under their names in checkpoints, one at a time."""

    def restart(self, weights: list[Tensor], optimizer: OptimizerConfig) -> None:
        """Start again from weights that `trained_weights` copied, with a new optimizer."""

    def trained_weights(self) -> list[Tensor]:
        """Copies in host memory of what is trained."""

    def peak_memory_bytes(self) -> int:
        """The most memory used so far: on the device, or by the process on a CPU."""


class TorchEngine(Engine):
    """One process, torch's own optimizer."""

    def __init__(
        self,
        runner: ModelRunner,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float | None,
        ema_decay: float | None = None,
    ):
        self._runner = runner
        self._max_grad_norm = max_grad_norm if max_grad_norm is not None else float("inf")
        self._ema_decay = ema_decay
        self._scale = LossScale(runner.device.type) if runner.precision == "mixed_fp16" else None
        self._take(optimizer)
        runner.model.train()

    def _take(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._peak_rates = [group["lr"] for group in optimizer.param_groups]
        self._trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    @property
    def device(self) -> torch.device:
        return self._runner.device

    @property
    def precision(self) -> str:
        return self._runner.precision

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def peak_rates(self) -> dict[str, float]:
        groups = zip(self.optimizer.param_groups, self._peak_rates, strict=True)
        return {group.get("name", str(number)): float(rate) for number, (group, rate) in enumerate(groups)}

    def train_step(self, step: StepBatches, multiplier: float, should_update: ShouldUpdate | None = None) -> StepResult:
        num_label_tokens = max(1, step.counts.num_label_tokens)
        if len(step.batches) > 1:
            # Gradients that accumulate live through the next forward pass anyway, so they get their memory before the first one:
            # made in the backward pass they would lie in the gaps that activations leave, and those grow by as much.
            for parameter in self._trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        if prepare := getattr(self.optimizer, "prepare_step", None):
            prepare()  # an optimizer that takes gradients elsewhere than at the weights it leaves behind
        losses, routings = [], []
        for batch in step.batches:
            on_device = batch.to(self.device)
            with autocast(self.device, self.precision):
                result = self._runner.lm_loss(on_device)
            total = result.total / num_label_tokens
            if result.routing is not None:
                if coefficient := self._runner.lm_loss.balance_coefficient:
                    total = total + coefficient * result.routing.losses.sum() / max(1, step.counts.num_tokens)
                routings.append(result.routing.detached())
            (total if self._scale is None else self._scale.scaled(total)).backward()
            losses.append(
                result.sequences[: len(batch.source_ids)]
            )  # none of a batch that only keeps step with other ranks
        if self._scale is not None:
            self._scale.unscale(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self._trained, self._max_grad_norm)
        sequence_losses = torch.cat(losses)
        loss = sequence_losses.double().sum() / num_label_tokens  # mean over labels = sum over sequences / their labels
        fits = self._scale is None or bool(grad_norm.isfinite())  # an overflow is not a spike
        applied = fits and (should_update is None or should_update(float(loss), float(grad_norm)))
        for group, peak in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * multiplier
        scale, overflowed = (None, False) if self._scale is None else self._scale.step(self.optimizer, applied)
        if applied:
            if self._scale is None:
                self.optimizer.step()
            if self._ema_decay is not None:
                update_ema(self.optimizer, self._ema_decay)
        self.optimizer.zero_grad(set_to_none=len(step.batches) == 1)
        routing = sum_routings(routings, step.counts.num_tokens)
        return StepResult(loss, grad_norm.detach(), sequence_losses, applied, routing, scale, overflowed)

    def rehearse(self, step: StepBatches, held_bytes: int) -> bool:
        scale = None if self._scale is None else self._scale.state()
        try:
            held = torch.empty(held_bytes, dtype=torch.uint8, device=self.device)
            self.train_step(step, 1.0, lambda loss, grad_norm: False)
            del held
        except torch.OutOfMemoryError:
            return False
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            if self._scale is not None:
                self._scale.load(scale)
        return True

    def evaluating(self) -> AbstractContextManager[None]:
        return self._runner.evaluating()

    def token_losses(self, batch: Batch) -> Tensor:
        return self._runner.token_losses(batch)

    def logits_at(self, batch: Batch, positions_K: Tensor) -> Tensor:
        return self._runner.logits_at(batch, positions_K)

    def generate(self, tokenizer: TextTokenizer, prompt: str, max_new_tokens: int) -> str:
        with autocast(self.device, self.precision):
            return generate_text(self._runner.model, tokenizer, prompt, max_new_tokens=max_new_tokens)

    def trainable_check(self, say: Say) -> TrainableCheck:
        return TrainableCheck(self._runner.model, self.optimizer, say)

    def pieces(self) -> Pieces:
        pieces = take_pieces(self._runner.model, self.optimizer)
        if self._scale is None:
            return pieces
        return replace(pieces, optimizer_state={**pieces.optimizer_state, LOSS_SCALE: self._scale.state()})

    def load(self, checkpoint: Checkpoint) -> None:
        restore(self._runner.model, self.optimizer, checkpoint)
        if self._scale is not None:
            self._scale.load(checkpoint.optimizer_state.get(LOSS_SCALE))

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        yield from model_tensors(self._runner.model).items()

    def trained_weights(self) -> list[Tensor]:
        return [parameter.detach().to("cpu", copy=True) for parameter in self._trained_parameters()]

    def restart(self, weights: list[Tensor], optimizer: OptimizerConfig) -> None:
        with torch.no_grad():
            for parameter, weight in zip(self._trained_parameters(), weights, strict=True):
                parameter.copy_(weight)
                parameter.grad = None
        self._take(build_optimizer(self._runner.model, optimizer))
        self._scale = LossScale(self.device.type) if self._scale is not None else None
        self._runner.model.train()

    def _trained_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self._runner.model.parameters() if parameter.requires_grad]

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes(self.device)
