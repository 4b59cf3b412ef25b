"""Builds the optimizer that the configuration names: a file of `optimizers/`, or any callable."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from steep.core import targets
from steep.core.plugins import load_plugin
from steep.core.section import Target
from steep.optim.config import PACKAGE, OptimizerConfig
from steep.optim.param_groups import build_param_groups, embedding_tensors
from steep.runtime.optional_packages import quiet_imports


class OptimizerPlugin(Protocol):
    """What a file of `optimizers/` defines: these two functions.

    groups: as `build_param_groups` makes them: `params` are (name, tensor) pairs, and each group has its own `lr` and
    `weight_decay`. A file with `NEEDS_INNER = True` gets them from `split_inner`, with the key `inner`.
    `OPTIONS`: the keys of the configuration that it reads besides the rates and the decay; others are refused.

    The optimizer keeps all of its state in `state`, as tensors and numbers by name, or a run cannot resume exactly. One that
    takes gradients elsewhere than at the weights has `prepare_step()`, which is called before the forward pass of a step;
    `step()` puts the weights back.
    """

    def build(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
        """The optimizer. Raises MissingExtraError where its package is not installed."""

    def state_bytes(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> int:
        """Bytes of state that it will keep on the device, from shapes and dtypes alone: the tensors may be fake."""


def load_optimizer(config: OptimizerConfig) -> OptimizerPlugin:
    """The file of the optimizer `config.name`. Raises ConfigError for an unknown name or an incomplete file."""
    return cast(OptimizerPlugin, load_plugin(PACKAGE, config.name, ("build", "state_bytes"), "optimizer.name"))


def build_optimizer(model: nn.Module, config: OptimizerConfig | Target) -> torch.optim.Optimizer:
    """The optimizer over the model's trainable parameters.

    A `_target_` is called with `params=` (parameter groups whose decay is its own `weight_decay` argument, 0 where it has
    none) and its other arguments.
    """
    if isinstance(config, OptimizerConfig):
        plugin = load_optimizer(config)
        with quiet_imports():
            return plugin.build(_groups(model, plugin, config), config)
    rate = config.arguments.get("lr", config.arguments.get("learning_rate", OptimizerConfig().learning_rate))
    weight_decay = config.arguments.get("weight_decay", 0.0)
    groups = build_param_groups(model, OptimizerConfig(learning_rate=rate, weight_decay=weight_decay))
    optimizer: torch.optim.Optimizer = targets.build(config, params=groups)
    return optimizer


def optimizer_state_bytes(model: nn.Module, config: OptimizerConfig | Target) -> int:
    """Bytes of state that the optimizer will keep for `model`, whose tensors may be fake.

    The state of a `_target_` is not known: two tensors per trainable parameter are assumed, as AdamW has.
    """
    if isinstance(config, OptimizerConfig):
        plugin = load_optimizer(config)
        return plugin.state_bytes(_groups(model, plugin, config), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(2 * parameter.numel() * parameter.element_size() for parameter in trained)


def _groups(model: nn.Module, plugin: OptimizerPlugin, config: OptimizerConfig) -> list[dict[str, Any]]:
    groups = build_param_groups(model, config)
    return split_inner(model, groups) if getattr(plugin, "NEEDS_INNER", False) else groups


def split_inner(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with the key `inner`: True for groups of matrices between embedding and head, which come first.

    Not inner: embeddings of every kind (of positions too), the output head, and tensors that do not have exactly two dimensions.
    """
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
