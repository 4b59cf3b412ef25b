"""Facts about a mixture of experts: its layers of experts, their routers, and how many experts a token uses.

In: a model, on any device. Out: what is found. Main choice: experts are known by their tensors (stacked in three dimensions, one
expert after the other) and routers by what the model declares that it can record, else by their place beside the experts. No
family's name is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from steep.models.layers import text_config

CHOSEN_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k",
)
"""What configurations of transformers call the number of experts of a token."""

COEFFICIENT_KEYS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
"""What configurations of transformers call the coefficient of the balancing loss."""


@dataclass(frozen=True)
class Experts:
    """The experts of one layer, stacked in tensors whose first dimension counts them."""

    name: str
    module: nn.Module
    parent: nn.Module
    count: int

    def stacked(self) -> list[tuple[str, nn.Parameter]]:
        """Their weights, with three dimensions, by name within the module."""
        return [(name, tensor) for name, tensor in self.module.named_parameters(recurse=False) if tensor.ndim == 3]

    def biases(self) -> list[nn.Parameter]:
        """Their biases, a row for each expert."""
        return [tensor for tensor in self.module.parameters(recurse=False) if tensor.ndim == 2]


@dataclass(frozen=True)
class Router:
    """What sends the tokens of one layer to experts."""

    name: str
    module: nn.Module
    index: int | None
    """Which of the values that it returns the logits are; None where the model does not declare it."""


def find_experts(model: nn.Module) -> list[Experts]:
    """The layers of experts, in the model's order."""
    found = []
    for name, module in model.named_modules():
        stacks = [tensor for _, tensor in module.named_parameters(recurse=False) if tensor.ndim == 3]
        if isinstance(module, _ConvNd) or not stacks or len({tensor.shape[0] for tensor in stacks}) != 1:
            continue
        count = stacks[0].shape[0]
        if count > 1 and (len(stacks) > 1 or getattr(module, "num_experts", None) == count):
            found.append(Experts(name, module, model.get_submodule(name.rpartition(".")[0]), count))
    return found


def find_routers(model: nn.Module) -> list[Router]:
    """The routers, in the model's order; those that it declares for `router_logits`, else the modules beside its experts."""
    declared = [
        recorder
        for module in model.modules()
        for recorder in _recorders((getattr(module, "_can_record_outputs", None) or {}).get("router_logits"))
    ]
    routers: list[Router] = []
    for name, module in model.named_modules():
        indices = [index for kind, index in declared if isinstance(module, kind)]
        routers += [Router(name, module, index) for index in indices[:1]]
    holders = {router.name for router in routers if any(o.name.startswith(f"{router.name}.") for o in routers)}
    routers = [router for router in routers if router.name not in holders]
    return routers or [router for experts in find_experts(model) for router in _beside(experts)]


def _recorders(declared: Any) -> list[tuple[type, int]]:
    """(class, index of its output) of what a transformers model declares under one name."""
    entries = declared if isinstance(declared, (list, tuple)) else [declared]
    pairs = [(getattr(entry, "target_class", entry), getattr(entry, "index", 0)) for entry in entries]
    return [(kind, index) for kind, index in pairs if isinstance(kind, type)]


def _beside(experts: Experts) -> list[Router]:
    """The module beside the experts that has one row of weights for each of them."""
    prefix = experts.name.rpartition(".")[0]
    for name, module in experts.parent.named_children():
        rows = [tensor.shape[0] for tensor in module.parameters() if tensor.ndim == 2]
        if module is not experts.module and rows == [experts.count]:
            return [Router(f"{prefix}.{name}", module, None)]
    return []


def experts_per_token(model: nn.Module) -> int | None:
    """How many experts a token uses, by its routers, else by the configuration; None if neither says."""
    for router in find_routers(model):
        if isinstance(chosen := getattr(router.module, "top_k", None), int):
            return chosen
    return _number(model, CHOSEN_KEYS)  # type: ignore[return-value]


def balance_coefficient(model: nn.Module) -> tuple[str, float] | None:
    """(key, value) of the coefficient of the balancing loss that the model's configuration gives; None without one."""
    for key in COEFFICIENT_KEYS:
        if (value := _number(model, (key,))) is not None:
            return key, float(value)
    return None


def _number(model: nn.Module, keys: tuple[str, ...]) -> int | float | None:
    config = text_config(model)
    places = [config, getattr(config, "ffn_config", None)]  # DBRX keeps them apart
    values = [getattr(place, key, None) for key in keys for place in places]
    return next((value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)), None)


def unused_ratios(model: nn.Module) -> dict[int, float]:
    """{id of a tensor of experts: the share of it that a token does not use}; empty for a model without experts."""
    experts, chosen = find_experts(model), experts_per_token(model)
    if chosen is None:
        return {}
    unused: dict[int, float] = {}
    for layer in experts:
        outer = model.get_submodule(
            layer.name.removesuffix(".base_layer").removesuffix(".base_layer")
        )  # with its adapters
        for name, tensor in outer.named_parameters():
            if "lora_" in name or tensor.shape[:1] == (layer.count,):
                unused[id(tensor)] = max(0.0, 1 - chosen / layer.count)
    return unused
