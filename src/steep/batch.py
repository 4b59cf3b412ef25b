"""Batch: what a model is trained on, with the shapes and dtypes that every stage agrees on."""

from __future__ import annotations

from dataclasses import dataclass, replace

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

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; copies from pinned memory do not wait. What is counted on the host stays there."""
        names = ("input_ids", "labels", "position_ids", "cu_seqlens")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


@dataclass(frozen=True)
class StepBatches:
    """One step of a run: this rank's micro-batches, and what the step holds over all ranks."""

    batches: list[Batch]
    """As many on every rank."""
    counts: StepCounts
