"""GaLore (Zhao et al. 2024, arXiv:2403.03507): Adam on gradients projected to a low rank.

The shorter side of an inner matrix's gradient is projected onto its leading singular vectors, which are computed again every
`projection_interval_steps`; Adam's moments live in that subspace, and its update is projected back. All other parameters, and
matrices whose shorter side is at most the rank, use plain AdamW. As in the paper, moments are kept when the projection changes.
State per m x n matrix, m <= n: m r + 2 n r numbers instead of 2 m n. Weakness: each singular value decomposition takes seconds
per large matrix, and updates never leave the current subspace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steep.optim.config import OptimizerConfig

OPTIONS = ("rank", "projection_interval_steps", "projection_scale", "betas", "eps")

NEEDS_INNER = True
"""Groups have the key `inner`: whether their tensors are matrices between embedding and head."""

RANK, INTERVAL_STEPS, SCALE = 128, 200, 0.25
"""The values in the README of the authors' code, https://github.com/jiaweizzhao/GaLore."""


class GaLore(torch.optim.Optimizer):
    """State per parameter: `step` (CPU fp32), `exp_avg`, `exp_avg_sq`; `projection` (shorter side, rank) where projected."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. No closure."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        is_projected = _is_projected(parameter, group["inner"], group["rank"])
        if not state:
            state["step"] = torch.zeros(())
        if is_projected:
            if int(state["step"]) % group["interval_steps"] == 0:
                state["projection"] = leading_vectors(gradient, group["rank"])
            gradient = project(gradient, state["projection"])
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = (
                torch.zeros_like(gradient, memory_format=torch.contiguous_format) for _ in range(2)
            )
        state["step"] += 1
        update = _adam_update(state, gradient, group["betas"], group["eps"])
        if is_projected:
            update = project_back(update, state["projection"], parameter.shape).mul_(group["scale"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def leading_vectors(gradient: Tensor, rank: int) -> Tensor:
    """(m, n) -> (min(m, n), rank): singular vectors of the shorter side, in the gradient's dtype.

    Their signs are arbitrary; each is turned so that its largest entry is positive, and the kept moments mean the same on every
    machine. Contiguous, as a checkpoint returns them: products of another layout differ in their last bits on a GPU.
    """
    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
    vectors = left[:, :rank] if gradient.shape[0] <= gradient.shape[1] else right[:rank].T
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).to(gradient.dtype).contiguous()


def project(gradient: Tensor, vectors: Tensor) -> Tensor:
    """(m, n) -> (rank, n) where m <= n, else (m, rank)."""
    return vectors.T @ gradient if gradient.shape[0] <= gradient.shape[1] else gradient @ vectors


def project_back(update: Tensor, vectors: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `project` on the subspace: -> `shape`."""
    return vectors @ update if shape[0] <= shape[1] else update @ vectors.T


def _adam_update(state: dict[str, Any], gradient: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
    beta1, beta2 = betas
    step = float(state["step"])
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = state["exp_avg_sq"].div(1 - beta2**step).sqrt_().add_(eps)
    return state["exp_avg"].div(1 - beta1**step).div_(denominator)


def _is_projected(tensor: Tensor, inner: bool, rank: int) -> bool:
    return inner and min(tensor.shape) > rank


def build(groups: list[dict[str, Any]], config: OptimizerConfig) -> GaLore:
    """GaLore over groups as `split_inner` makes them."""
    defaults = {
        "betas": config.betas,
        "eps": config.eps,
        "rank": config.rank or RANK,
        "interval_steps": config.projection_interval_steps or INTERVAL_STEPS,
        "scale": config.projection_scale or SCALE,
    }
    return GaLore(groups, defaults)


def state_bytes(groups: list[dict[str, Any]], config: OptimizerConfig) -> int:
    """Two low-rank moments and the projection per projected matrix, two full moments per other parameter."""
    rank = config.rank or RANK
    return sum(
        _numbers(tensor, group["inner"], rank) * tensor.element_size()
        for group in groups
        for _, tensor in group["params"]
    )


def _numbers(tensor: Tensor, inner: bool, rank: int) -> int:
    if not _is_projected(tensor, inner, rank):
        return 2 * tensor.numel()
    return rank * (min(tensor.shape) + 2 * max(tensor.shape))
