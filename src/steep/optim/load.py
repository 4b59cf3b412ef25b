"""Finds the optimizer that the configuration names: a file of this folder, or any callable."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from steep.core.plugins import load_plugin
from steep.core.section import Target
from steep.optim.config import OptimizerConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

NOT_OPTIMIZERS = ("config", "load", "param_groups", "schedule")


def load_optimizer(config: OptimizerConfig) -> ModuleType:
    """The module of the optimizer `config.name`, whose `build(groups, config)` makes it. Raises ConfigError."""
    return load_plugin("steep.optim", config.name, NOT_OPTIMIZERS)


def build_optimizer(model: nn.Module, config: OptimizerConfig | Target) -> torch.optim.Optimizer:
    """The optimizer over the model's trainable parameters.

    A `_target_` is called with `params=` (parameter groups with decay from its own `weight_decay` argument, 0 where it
    has none) and its other arguments.
    """
    from steep.optim.param_groups import build_param_groups

    if isinstance(config, OptimizerConfig):
        return load_optimizer(config).build(build_param_groups(model, config), config)
    return _build_target(model, config)


def _build_target(model: nn.Module, target: Target) -> torch.optim.Optimizer:
    from steep.config.targets import build
    from steep.optim.param_groups import build_param_groups

    arguments: dict[str, Any] = target.arguments
    rate = arguments.get("lr", arguments.get("learning_rate", OptimizerConfig().learning_rate))
    sizes = OptimizerConfig(learning_rate=rate, weight_decay=arguments.get("weight_decay", 0.0))
    return build(target, params=build_param_groups(model, sizes))
