"""Batch: what a model is trained on, with the shapes and dtypes that every stage agrees on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steep.order.batches import StepCounts

IGNORE_INDEX = -100
"""The label of a position without a target, as in torch and transformers."""


@dataclass(frozen=True)
class Batch:
    """B sequences of T tokens, documents packed."""

    input_ids: Tensor
    """(B, T) int64."""
    labels: Tensor
    """(B, T) int64, already shifted: the target at position t, IGNORE_INDEX where there is none."""
    position_ids: Tensor
    """(B, T) int64, from 0 in every document."""
    cu_seqlens: Tensor
    """(segments + 1,) int32: where attention starts anew, over the B*T flattened tokens; every row start is one."""
    max_seqlen: int
    """Tokens of the longest segment."""
    source_ids: Tensor
    """(sequences,) int32: the source of each sequence; fewer than B in a batch that only keeps step with the other ranks."""
    row_tokens: Tensor | None = None
    """(B,) int64: tokens of each row before its padding; None without padding."""

    def tokens_mask(self) -> Tensor:
        """(B, T) bool: False for padding."""
        if self.row_tokens is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device) < self.row_tokens.unsqueeze(1)

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; copies from pinned memory do not wait. What is counted on the host stays there."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which a GPU copies without waiting."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """`change` applied to every tensor that a device needs."""
        names = ("input_ids", "labels", "position_ids", "cu_seqlens", "row_tokens")
        changed: dict[str, Any] = {name: change(value) for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **changed)


@dataclass(frozen=True)
class StepBatches:
    """One step of a run: this rank's micro-batches, and what the step holds over all ranks."""

    batches: list[Batch]
    """As many on every rank."""
    counts: StepCounts
