"""Who owns model and optimizer. An engine takes the micro-batches of a step and makes one update.

`TorchEngine` is the native one, for a single process. What it promises to the loop: the loss is the sum over all label
tokens of the global batch divided by their number, so micro-batches do not change it; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from steep.batch import Batch
from steep.optim.ema import update_ema

LossSums = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
"""From a batch to the fp32 scalar sum of its label losses, with gradients, and that of each sequence, (B,) fp32, without."""


ShouldUpdate = Callable[[float, float], bool]
"""From the loss and the gradient norm of a step to whether its update is to be made."""


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, still on the device."""

    loss: torch.Tensor
    """() fp64, nats per label token over the global batch: the sum of `sequence_losses` divided by the label tokens."""
    grad_norm: torch.Tensor
    """() fp32, before clipping."""
    sequence_losses: torch.Tensor
    """(sequences,) fp32, the summed nats of each sequence of the step, in the order of its micro-batches."""
    applied: bool = True
    """Whether the weights were updated."""


class Engine(Protocol):
    """What the loop needs of an engine."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def learning_rate(self) -> float:
        """Of the newest update, in the first parameter group."""

    def train_step(
        self, batches: list[Batch], multiplier: float, should_update: ShouldUpdate | None = None
    ) -> StepResult:
        """One update on the micro-batches of a step, every learning rate times `multiplier`; none where `should_update` says no."""


class TorchEngine:
    """One process, torch's own optimizer."""

    def __init__(
        self,
        model: torch.nn.Module,
        loss_sums: LossSums,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        max_grad_norm: float | None,
        ema_decay: float | None = None,
    ):
        self.model = model
        self.optimizer = optimizer
        self.loss_sums = loss_sums
        self._device = device
        self._max_grad_norm = max_grad_norm if max_grad_norm is not None else float("inf")
        self._ema_decay = ema_decay
        self._peak_rates = [group["lr"] for group in optimizer.param_groups]
        self._trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    @property
    def learning_rate(self) -> float:
        """Of the newest update, in the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def train_step(
        self, batches: list[Batch], multiplier: float, should_update: ShouldUpdate | None = None
    ) -> StepResult:
        """One update on the micro-batches of a step, every learning rate times `multiplier`; none where `should_update` says no."""
        num_label_tokens = max(1, sum(batch.num_label_tokens for batch in batches))
        if len(batches) > 1:
            self._keep_gradients()
        if prepare := getattr(self.optimizer, "prepare_step", None):
            prepare()  # an optimizer that takes gradients elsewhere than at the weights it leaves behind
        losses = []
        for batch in batches:
            total, losses_B = self.loss_sums(batch.to(self._device))
            (total / num_label_tokens).backward()
            losses.append(losses_B)
        grad_norm = torch.nn.utils.clip_grad_norm_(self._trained, self._max_grad_norm)
        sequence_losses = torch.cat(losses)
        loss = sequence_losses.double().sum() / num_label_tokens
        applied = should_update is None or should_update(float(loss), float(grad_norm))
        for group, peak in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * multiplier
        if applied:
            self.optimizer.step()
            if self._ema_decay is not None:
                update_ema(self.optimizer, self._ema_decay)
        self.optimizer.zero_grad(set_to_none=len(batches) == 1)
        return StepResult(loss, grad_norm.detach(), sequence_losses, applied)

    def _keep_gradients(self) -> None:
        """Give every gradient its memory before the first forward pass. Accumulated gradients live through the next forward pass
        anyway; made in the backward pass they would lie in the gaps that activations leave, and those grow by as much."""
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
