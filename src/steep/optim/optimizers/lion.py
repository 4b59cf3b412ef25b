"""Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2): the sign of an interpolated momentum.

Our own few lines, since torch has none. State: one tensor per parameter, half of AdamW's. Weakness: every weight moves by
the learning rate at every step, so it needs a learning rate 3 to 10 times lower than AdamW's and a weight decay higher by the
same factor (section 5 of the paper), and gains little at small batch sizes.
"""

from __future__ import annotations

from typing import Any

import torch

from steep.optim.config import OptimizerConfig

OPTIONS = ("betas",)


class Lion(torch.optim.Optimizer):
    """State per parameter: `exp_avg`, of its shape and dtype."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. No closure."""
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                update = torch.lerp(parameter.grad, state["exp_avg"], beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                state["exp_avg"].lerp_(parameter.grad, 1 - beta2)


def build(groups: list[dict[str, Any]], config: OptimizerConfig) -> Lion:
    """Lion over groups as `build_param_groups` makes them."""
    return Lion(groups, {"betas": config.betas})


def state_bytes(groups: list[dict[str, Any]], config: OptimizerConfig) -> int:
    """One tensor per parameter."""
    return sum(tensor.numel() * tensor.element_size() for group in groups for _, tensor in group["params"])
