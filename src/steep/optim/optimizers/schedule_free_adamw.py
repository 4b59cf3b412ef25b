"""Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682, algorithm 1): an average of the iterates instead of a decay.

Three sequences: z takes Adam's steps, x is the running average of z weighted by the square of the largest learning rate so far,
and gradients are taken at y = (1 - beta1) z + beta1 x. Between two steps the model holds x, so the averaged weights are what is
evaluated, saved and exported; `prepare_step` replaces them by y until `step`. Use it with `schedule: {name: constant}` and
a warmup. State: z and the second moment, and during a step a copy of x: 12 bytes per fp32 parameter. Weakness: that copy
(the authors' code recomputes x from y instead, with rounding errors); bf16 weights round late steps of the average away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steep.optim.config import OptimizerConfig

OPTIONS = ("betas", "eps")


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """State per parameter: `z`, `exp_avg_sq` of its shape and dtype; numbers `step`, `weight_sum`, `lr_max`."""

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any]):
        super().__init__(groups, defaults)
        self._averages: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def prepare_step(self) -> None:
        """Replace x by y, where gradients are taken. Calling it again before `step` changes nothing."""
        if self._averages:
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                self._averages[parameter] = parameter.clone()
                if "z" in self.state[parameter]:
                    parameter.lerp_(self.state[parameter]["z"], 1 - group["betas"][0])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; leaves x in all parameters. No closure."""
        assert closure is None
        self.prepare_step()  # where nothing called it, gradients were taken at x
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self._averages[parameter]
                if parameter.grad is not None:
                    self._update(parameter, average, group)
                parameter.copy_(average)
        self._averages.clear()

    def _update(self, parameter: Tensor, average: Tensor, group: dict[str, Any]) -> None:
        state, gradient, rate, beta2 = self.state[parameter], parameter.grad, group["lr"], group["betas"][1]
        assert gradient is not None
        if not state:
            state.update(z=average.clone(), exp_avg_sq=torch.zeros_like(parameter), step=0, weight_sum=0.0, lr_max=0.0)
        state["step"] += 1
        state["lr_max"] = max(state["lr_max"], rate)
        state["weight_sum"] += state["lr_max"] ** 2
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = state["exp_avg_sq"].div(1 - beta2 ** state["step"]).sqrt_().add_(group["eps"])
        update = (gradient / denominator).add_(parameter, alpha=group["weight_decay"])
        state["z"].add_(update, alpha=-rate)
        average.lerp_(state["z"], state["lr_max"] ** 2 / state["weight_sum"] if state["weight_sum"] else 0.0)


def build(groups: list[dict[str, Any]], config: OptimizerConfig) -> ScheduleFreeAdamW:
    """Schedule-free AdamW over groups as `build_param_groups` makes them."""
    return ScheduleFreeAdamW(groups, {"betas": config.betas, "eps": config.eps})


def state_bytes(groups: list[dict[str, Any]], config: OptimizerConfig) -> int:
    """Two tensors per parameter, and the copy that exists during a step."""
    return sum(3 * tensor.numel() * tensor.element_size() for group in groups for _, tensor in group["params"])
