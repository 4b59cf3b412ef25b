"""The loss scale of mixed_fp16: gradients that would be zero in fp16 are multiplied into its range, and divided back in fp32.

In: the loss of a micro-batch, then the gradients of a step. Out: gradients as fp32 would have them, or the news that one of them
overflowed. The scale is torch.amp.GradScaler's: it doubles after 2,000 steps without an overflow and halves at each. A step that
overflows makes no update: it keeps its number and its sequences, its tokens are named as not trained on, and the learning rate
follows the number of the step. Weakness: each step waits for the device to learn whether a gradient overflowed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steep.core.errors import CheckpointError, TrainingError

FIRST_SCALE = 2.0**16
"""GradScaler's default."""

SMALLEST_SCALE = 1.0
"""Below it the numbers themselves do not fit fp16, and a smaller scale does not help."""


class LossScale:
    """The scale of one run, with its state."""

    def __init__(self, device_type: str):
        self._scaler = torch.amp.GradScaler(device_type, init_scale=FIRST_SCALE)

    @property
    def value(self) -> float:
        """What the next loss is multiplied by. Waits for the device."""
        return float(self._scaler.get_scale())

    def scaled(self, loss: Tensor) -> Tensor:
        """(): the loss to go backward from."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the optimizer's gradients by the scale, once per step and before they are clipped."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, wanted: bool) -> tuple[float, bool]:
        """Update the weights unless a gradient overflowed or the update is not wanted, then adapt the scale.

        Returns the scale of this step and whether a gradient overflowed at it. Raises TrainingError where no scale helps.
        """
        before = self.value
        if wanted:
            self._scaler.step(optimizer)
        self._scaler.update()
        overflowed = self.value < before
        if overflowed and before <= SMALLEST_SCALE:
            raise TrainingError(
                f"gradients overflow fp16 even at a loss scale of {before:g} (the largest fp16 number is 65,504). "
                "Models that were trained in bf16 often cannot be trained in fp16. Use train.precision fp32 in another run "
                "(--run.name), or mixed_bf16 on a device that has it."
            )
        return before, overflowed

    def state(self) -> dict[str, Any]:
        """JSON: the scale, and how long it has fitted."""
        return dict(self._scaler.state_dict())

    def load(self, state: dict[str, Any] | None) -> None:
        """Take the state that `state` gave. Raises CheckpointError if there is none."""
        if not state:
            raise CheckpointError("the checkpoint has no loss scale, so it is not of a run in mixed_fp16")
        self._scaler.load_state_dict(state)
