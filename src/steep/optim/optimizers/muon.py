"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) on inner matrices, AdamW elsewhere.

Torch's Muon, which orthogonalizes the momentum by a Newton-Schulz iteration, updates the matrices between the
embedding and the head; embeddings, head, norms, biases and stacked expert weights (3 dimensions) use AdamW. Updates of
matrices are scaled to the size of AdamW's (0.2 sqrt(max(rows, columns)), arXiv:2502.16982), so that one learning rate
fits both. State: one tensor per inner matrix, two per other parameter. Weakness: the iteration runs in bfloat16 and costs
about 15 products of each matrix with itself per step, a large share of a small batch's time on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch

from steep.optim.config import OptimizerConfig
from steep.optim.optimizers import adamw

OPTIONS = ("momentum", "newton_schulz_steps", "betas", "eps")

NEEDS_INNER = True
"""Groups have the key `inner`: whether their tensors are matrices between embedding and head."""


class Muon(torch.optim.Optimizer):
    """Two torch optimizers that share this one's parameter groups and state.

    State per parameter: `momentum_buffer` in inner groups; `exp_avg`, `exp_avg_sq` and `step` in the others.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig):
        super().__init__(groups, {})
        self._parts: list[tuple[bool, torch.optim.Optimizer]] = []
        bare = {is_inner: [{"params": g["params"]} for g in self._groups(is_inner)] for is_inner in (True, False)}
        if inner := bare[True]:
            muon = torch.optim.Muon(
                inner,
                momentum=0.95 if config.momentum is None else config.momentum,  # both defaults as in Jordan et al.
                ns_steps=5 if config.newton_schulz_steps is None else config.newton_schulz_steps,
                adjust_lr_fn="match_rms_adamw",
            )
            self._parts.append((True, muon))
        if rest := bare[False]:
            self._parts.append((False, adamw.build(rest, config)))
        for is_inner, part in self._parts:
            for group in self._groups(is_inner):
                group.update({key: value for key, value in part.defaults.items() if key not in group})

    def _groups(self, inner: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["inner"] is inner]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. No closure."""
        assert closure is None
        for inner, part in self._parts:
            part.param_groups, part.state = self._groups(inner), self.state  # again: load_state_dict replaces both
            part.step()


def build(groups: list[dict[str, Any]], config: OptimizerConfig) -> Muon:
    """Muon over groups as `split_inner` makes them."""
    return Muon(groups, config)


def state_bytes(groups: list[dict[str, Any]], config: OptimizerConfig) -> int:
    """One tensor per inner matrix, two per other parameter."""
    tensors = [(1 if group["inner"] else 2, tensor) for group in groups for _, tensor in group["params"]]
    return sum(count * tensor.numel() * tensor.element_size() for count, tensor in tensors)
