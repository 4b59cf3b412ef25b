"""A model at work in evaluation: losses and logits. In: batches on any device. Out: tensors without gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steep.batch import Batch
from steep.models.layers import evaluating
from steep.models.lm_loss import LMLoss
from steep.runtime.precision import autocast


@dataclass(frozen=True)
class ModelRunner:
    """A language model with its loss, device and precision."""

    lm_loss: LMLoss
    device: torch.device
    precision: str

    @property
    def model(self) -> nn.Module:
        """The language model itself, under its own parameter names."""
        return self.lm_loss.model

    def token_losses(self, batch: Batch) -> Tensor:
        """(B, T) fp32: -log p of each label token, 0 where the label is -100."""
        with torch.no_grad(), autocast(self.device, self.precision):
            return self.lm_loss.token_losses(batch.to(self.device))

    def logits_at(self, batch: Batch, positions_K: Tensor) -> Tensor:
        """(K, V): logits at some of the batch's B * T flattened positions."""
        with torch.no_grad(), autocast(self.device, self.precision):
            return self.lm_loss.logits_at(batch.to(self.device), positions_K)

    def evaluating(self) -> AbstractContextManager[None]:
        """No dropout and no gradients inside; each module's own mode is restored after."""
        return evaluating(self.model)
