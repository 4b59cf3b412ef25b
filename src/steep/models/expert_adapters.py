"""Low-rank matrices on the experts of a mixture, which are stacked tensors and no layers: peft's `target_parameters`.

In: a model and `adapter.experts`. Out: the names that peft takes, and stand-ins for a plan. Weakness: peft adds the product of
the matrices to all experts of a layer at each forward pass, and keeps the sum for the backward pass, which takes the memory of
these weights once more; with a bf16 base the sum is rounded to bf16. Dropout and DoRA are not possible.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steep.core.errors import ConfigError
from steep.models.config import AdapterConfig
from steep.models.mixture import find_experts


def expert_targets(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Full names of the stacked weights that get an adapter; none without `adapter.experts`. Raises ConfigError."""
    if not config.experts:
        return []
    names = [f"{experts.name}.{name}" for experts in find_experts(model) for name, _ in experts.stacked()]
    if not names:
        raise ConfigError(f"adapter.experts: {type(model).__name__} has no stacked experts; remove it")
    if config.dropout or config.type == "dora":
        what = "adapter.dropout" if config.dropout else "adapter.type: dora"
        raise ConfigError(f"adapter.experts: not possible with {what}, which peft does not support for stacked weights")
    return names


class PlannedExpertAdapter(nn.Module):
    """The low-rank matrices of one stack of experts, as a memory plan sees them: rank numbers of each expert."""

    def __init__(self, weights: Tensor, rank: int):
        super().__init__()
        experts, rows, columns = weights.shape
        self.lora_A = nn.Parameter(torch.empty(experts * rank, columns, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(rows, experts * rank, dtype=torch.float32))
        self.experts = experts

    def added_to(self, weights: Tensor) -> Tensor:
        """(E, rows, columns): new weights of their size."""
        left = self.lora_B.view(self.lora_B.shape[0], self.experts, -1).transpose(0, 1).to(weights.dtype)
        right = self.lora_A.view(self.experts, -1, self.lora_A.shape[1]).to(weights.dtype)
        return torch.baddbmm(weights, left, right)


def plan_expert_adapters(model: nn.Module, config: AdapterConfig) -> None:
    """Stand-ins for the adapters of experts, in place; `planned_experts` uses them."""
    for name in expert_targets(model, config):
        parent, _, last = name.rpartition(".")
        module: Any = model.get_submodule(parent)
        if not hasattr(module, "planned_adapters"):
            module.planned_adapters = nn.ModuleDict()
        module.planned_adapters[last] = PlannedExpertAdapter(getattr(module, last), config.rank)
