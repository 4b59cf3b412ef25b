"""Adafactor (Shazeer & Stern 2018, arXiv:1804.04235), torch's: the second moment of a matrix as a row and a column.

State: rows + columns numbers per matrix instead of twice its size, a full second moment per vector. Weakness: no
momentum. The learning rate is relative to the root mean square of the weights (at least 1e-3) and is limited to
1 / sqrt(step); a good value is 10 to 100 times AdamW's.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from steep.optim.config import OptimizerConfig

OPTIONS = ("beta2_decay", "clip_threshold")


def build(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Adafactor:
    """Adafactor over groups as `build_param_groups` makes them."""
    return torch.optim.Adafactor(
        groups,
        lr=config.learning_rate,
        beta2_decay=-0.8 if config.beta2_decay is None else config.beta2_decay,  # both as in algorithm 6 of the paper
        d=1.0 if config.clip_threshold is None else config.clip_threshold,
    )


def state_bytes(groups: list[dict[str, Any]], config: OptimizerConfig) -> int:
    """A row and a column per matrix (also of a stack of matrices), one tensor per vector."""
    return sum(_numbers(tensor.shape) * tensor.element_size() for group in groups for _, tensor in group["params"])


def _numbers(shape: torch.Size) -> int:
    if len(shape) < 2:
        return shape.numel()
    return math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1]
