"""Which parameters are updated, at which rate, and which of them decay.

In: a model and an OptimizerConfig. Out: parameter groups for a torch optimizer, with the parameters' names. Main
choice, nanoGPT's: every trainable tensor of two or more dimensions decays, embeddings included; norms, biases and other
vectors do not. A tied tensor appears once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steep.core.errors import ModelError
from steep.core.units import format_count
from steep.optim.config import OptimizerConfig

if TYPE_CHECKING:
    from torch import nn


def build_param_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups `decay` and `no_decay` (empty ones left out), parameters as (name, tensor) in the model's order.

    Each group has name, lr and weight_decay. Frozen parameters are left out. Raises ModelError if nothing is trainable.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ModelError("no parameter of the model is trainable: each has requires_grad=False")
    members = {
        "decay": [(name, parameter) for name, parameter in trainable if parameter.ndim >= 2],
        "no_decay": [(name, parameter) for name, parameter in trainable if parameter.ndim < 2],
    }
    decay = {"decay": config.weight_decay, "no_decay": 0.0}
    return [
        {"name": name, "params": parameters, "lr": config.learning_rate, "weight_decay": decay[name]}
        for name, parameters in members.items()
        if parameters
    ]


@dataclass(frozen=True)
class GroupRow:
    """One line of the table of parameter groups."""

    name: str
    tensors: int
    parameters: int
    learning_rate: float
    weight_decay: float

    def __str__(self) -> str:
        return (
            f"{self.name:<10} {self.tensors:>5} tensors {format_count(self.parameters):>8} parameters  "
            f"learning rate {self.learning_rate:.3g}  weight decay {self.weight_decay:g}"
        )


def describe_param_groups(groups: list[dict[str, Any]]) -> list[GroupRow]:
    """The table of `build_param_groups`' result, or of an optimizer's param_groups."""
    return [_row(group) for group in groups]


def _row(group: dict[str, Any]) -> GroupRow:
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
    numbers = sum(tensor.numel() for tensor in tensors)
    return GroupRow(group["name"], len(tensors), numbers, group["lr"], group["weight_decay"])
