"""How the experts of a mixture are computed, through transformers' ExpertsInterface: grouped products in the dtype of autocast.

In: an experts module of transformers, its tokens and their experts. Out: their weighted sum. transformers casts tokens to the
dtype of the weights, so with fp32 weights and bf16 autocast the largest products of the model ran in fp32; here the weights are
cast, as autocast does for other layers. `plan_experts` is the same on fake tensors, which know neither torch's grouped product
in fp32 nor which expert a token goes to. Importing this changes nothing: transformers' registry is added to on first use.

Suffixes: N tokens, D width, C experts of a token, S = N * C.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steep.models.autocast import to_autocast_dtype

GROUPED, PLANNED = "steep_grouped", "steep_planned"


def use_grouped_experts(model: nn.Module) -> None:
    """Compute the experts in the dtype of autocast where transformers would use grouped products; else change nothing."""
    _use(model, GROUPED, grouped_experts)


def plan_experts(model: nn.Module) -> None:
    """Let the experts of a model of fake tensors run, where transformers would use grouped products; else change nothing."""
    _use(model, PLANNED, planned_experts)


def _use(model: Any, name: str, function: Any) -> None:
    if getattr(getattr(model, "config", None), "_experts_implementation", None) != "grouped_mm":
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # not needed for models without experts

    ALL_EXPERTS_FUNCTIONS.register(name, function)
    model.set_experts_implementation(name)


class _InAutocastDtype:
    """A module whose tensors are read in the dtype of autocast."""

    def __init__(self, module: nn.Module):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return to_autocast_dtype(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    def adapted(self, name: str) -> Tensor:
        """The weights `name` with the adapter that a plan put beside them."""
        weights: Tensor = getattr(self._module, name)
        adapters = getattr(self._module, "planned_adapters", {})
        return to_autocast_dtype(adapters[name].added_to(weights) if name in adapters else weights)


def grouped_experts(module: nn.Module, hidden_ND: Tensor, chosen_NC: Tensor, weights_NC: Tensor) -> Tensor:
    """(N, D): transformers' grouped products, in the dtype of autocast where it is on."""
    from transformers.integrations.moe import grouped_mm_experts_forward  # as above

    view: Any = _InAutocastDtype(module)
    return grouped_mm_experts_forward(view, hidden_ND, chosen_NC, weights_NC)


def planned_experts(module: Any, hidden_ND: Tensor, chosen_NC: Tensor, weights_NC: Tensor) -> Tensor:
    """(N, D): the steps of transformers' grouped products with their shapes; the values mean nothing."""
    view: Any = _InAutocastDtype(module)
    order_S = chosen_NC.reshape(-1).argsort()
    first = "gate_up_proj" if module.has_gate else "up_proj"
    expanded = _planned_product(view, first, hidden_ND[order_S // chosen_NC.shape[-1]])
    expanded = module._apply_gate(expanded) if module.has_gate else module.act_fn(expanded)
    result_SD = _planned_product(view, "down_proj", expanded)
    if module.has_post_expert_norm:
        result_SD = module.post_expert_norm(result_SD)
    weighted_SD = (result_SD * weights_NC.reshape(-1)[order_S].unsqueeze(-1))[order_S.argsort()]
    return weighted_SD.view(*chosen_NC.shape, -1).sum(1).to(hidden_ND.dtype)


def _planned_product(view: Any, name: str, input_SI: Tensor) -> Tensor:
    weights = view.adapted(name)
    width = weights.shape[2] if view.is_transposed else weights.shape[1]
    output: Tensor = _GroupedShape.apply(input_SI.to(weights.dtype), weights, width)
    return output + getattr(view, f"{name}_bias")[:1] if view.has_bias else output


class _GroupedShape(torch.autograd.Function):
    """Shapes of a grouped product: input and weights are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, input_SI: Tensor, weights: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(input_SI, weights)
        return input_SI.new_empty(input_SI.shape[0], width)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("a plan makes no backward pass")
