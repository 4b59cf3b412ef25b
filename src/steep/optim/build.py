"""Finds the optimizer that the configuration names: a file of `optimizers/`, or any callable."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from steep.core.plugins import load_plugin
from steep.core.section import Target
from steep.optim.config import OptimizerConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PACKAGE = "steep.optim.optimizers"


def load_optimizer(config: OptimizerConfig) -> ModuleType:
    """The module of the optimizer `config.name`, whose `build(groups, config)` makes it. Raises ConfigError."""
    return load_plugin(PACKAGE, config.name)


def build_optimizer(model: nn.Module, config: OptimizerConfig | Target) -> torch.optim.Optimizer:
    """The optimizer over the model's trainable parameters.

    A `_target_` is called with `params=` (parameter groups with decay from its own `weight_decay` argument, 0 where it
    has none) and its other arguments.
    """
    if isinstance(config, OptimizerConfig):
        plugin = load_optimizer(config)
        return plugin.build(_groups(model, plugin, config), config)
    return _build_target(model, config)


def optimizer_state_bytes(model: nn.Module, config: OptimizerConfig | Target) -> int:
    """Bytes of state that the optimizer will keep for `model`, which may be on fake tensors.

    Of a `_target_`, whose state is not known, two tensors per trainable parameter are assumed, as AdamW has.
    """
    if isinstance(config, OptimizerConfig):
        plugin = load_optimizer(config)
        return int(plugin.state_bytes(_groups(model, plugin, config), config))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(2 * parameter.numel() * parameter.element_size() for parameter in trained)


def _groups(model: nn.Module, plugin: ModuleType, config: OptimizerConfig) -> list[dict[str, Any]]:
    from steep.optim.param_groups import build_param_groups

    groups = build_param_groups(model, config)
    return split_inner(model, groups) if getattr(plugin, "NEEDS_INNER", False) else groups


def split_inner(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with the key `inner`: matrices between embedding and head in groups called `inner` that come first.

    Outer are embeddings of every kind (of positions too), the output head, and all that has not exactly two dimensions.
    """
    from torch import nn

    from steep.optim.param_groups import embedding_tensors

    lookups = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    outer = embedding_tensors(model) | lookups

    def is_inner(pair: tuple[str, Tensor]) -> bool:
        return pair[1].ndim == 2 and pair[1] not in outer

    return [
        {**group, "name": "inner" if inner else group["name"], "inner": inner, "params": members}
        for inner in (True, False)
        for group in groups
        if (members := [pair for pair in group["params"] if is_inner(pair) is inner])
    ]


def _build_target(model: nn.Module, target: Target) -> torch.optim.Optimizer:
    from steep.core.targets import build
    from steep.optim.param_groups import build_param_groups

    arguments: dict[str, Any] = target.arguments
    rate = arguments.get("lr", arguments.get("learning_rate", OptimizerConfig().learning_rate))
    sizes = OptimizerConfig(learning_rate=rate, weight_decay=arguments.get("weight_decay", 0.0))
    return build(target, params=build_param_groups(model, sizes))
