"""Quantized bases: the linear layers of a frozen model in 4 or 8 bits, through bitsandbytes or torchao.

In: a model in its own dtype on the CPU. Out: the same model with its linear layers replaced, on the device. Main choice: layers
are converted one at a time, whatever the model was loaded from (a folder, a hub id, a dequantized .gguf), so that a GPU never
holds the unquantized model; host memory does. The output head is not quantized, as in transformers.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steep.core.errors import MissingExtraError, ModelError
from steep.core.units import counted
from steep.models.autocast import to_autocast_dtype
from steep.models.config import QUANTIZING_PACKAGES
from steep.models.coverage import left_out
from steep.models.layers import output_layer
from steep.models.mixture import find_routers
from steep.runtime.optional_packages import quiet_imports

NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256
"""Weights per scale, and scales per second-level scale (double quantization): Dettmers et al. 2023, arXiv:2305.14314."""

NF4_TABLE_BYTES = (16 + 256) * 4
"""fp32 tables that every layer holds: the values of the 16 codes of weights and of the 256 codes of scales."""


def quantize(model: nn.Module, method: str, compute_dtype: torch.dtype, device: torch.device | str) -> None:
    """Replace the linear layers by ones of `method`, in place, and move the model to `device`.

    method: `nf4`, `int8` or `torchao_int8`. compute_dtype: of their products. Raises MissingExtraError without the package.
    """
    package = QUANTIZING_PACKAGES[method]
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, "quant", f"model.quantize: {method}")
    convert = {"nf4": _nf4, "int8": _int8, "torchao_int8": _torchao_int8}[method]
    calm_bitsandbytes()
    with quiet_imports():
        for parent, name, layer in linear_layers(model):
            made = convert(layer, compute_dtype).to(device).train(layer.training)
            made.register_forward_pre_hook(_in_autocast_dtype)
            setattr(parent, name, made)
    model.to(device)
    flag = {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}.get(method)
    if flag is not None:
        setattr(model, flag, True)  # transformers' own mark, by which peft chooses its layers


def calm_bitsandbytes() -> None:
    """Silence its 8-bit product, which warns at every call of every layer that its input is rounded to fp16."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def _in_autocast_dtype(layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What autocast does for nn.Linear. bitsandbytes' layers return the dtype they get: after an fp32 embedding every activation
    would be fp32 and take twice the memory."""
    return (to_autocast_dtype(arguments[0]), *arguments[1:])


def linear_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of every linear layer except the output head and the routers of a mixture of experts, where a small
    difference sends a token to another expert."""
    kept = {id(module) for router in find_routers(model) for module in router.module.modules()} | {
        id(output_layer(model))
    }
    found = ((parent, name, child) for parent in model.modules() for name, child in parent.named_children())
    return [(p, name, child) for p, name, child in found if type(child) is nn.Linear and id(child) not in kept]


def quantized_line(model: nn.Module, method: str) -> str:
    """What `quantize` (or `plan_quantized`) left in the model's own dtype, and its share, for a model that was quantized."""
    kinds = {"nf4": "Params4bit", "int8": "Int8Params"}
    planned = {id(module.weight) for module in model.modules() if isinstance(module, PlannedLinear)}

    def covered(name: str, parameter: Tensor) -> bool:
        if planned:
            return id(parameter) in planned
        return type(parameter).__name__ == kinds.get(method, "") or type(parameter.data) is not Tensor

    return f"model.quantize: {method}; not quantized: {left_out(model, covered)}"


def _nf4(layer: nn.Linear, compute_dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    kind: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    made = Linear4bit(*sizes, compute_dtype=compute_dtype, device="meta", **kind)
    made.weight = Params4bit(layer.weight.data, requires_grad=False, module=made, **kind)
    made.bias = layer.bias
    # On CPUs with AVX512-BF16 the first forward pass in evaluation repacks the weights for good; training after that fails.
    made.support_avx512bf16_for_cpu = False
    return made


def check_nf4_runs_here(model: nn.Module) -> None:
    """Raises ModelError if bitsandbytes cannot run this model's layers in nf4 on this CPU.

    With AVX512-BF16 it repacks each layer at the first use in evaluation, which needs rows of whole blocks of scales.
    """
    with quiet_imports():
        from bitsandbytes.functional import has_avx512bf16  # most runs are without it
    odd = [f"{name} of {layer.in_features}" for _, name, layer in linear_layers(model) if layer.in_features % NF4_BLOCK]
    if odd and has_avx512bf16():
        raise ModelError(
            f"on this CPU (AVX512-BF16) bitsandbytes runs nf4 layers only where the input's width is a multiple of {NF4_BLOCK}; "
            f"this model has {counted(len(odd), 'other')}, such as {odd[0]}. int8 works, and so does nf4 on a GPU or another CPU."
        )


def _int8(layer: nn.Linear, compute_dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    made = Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
    made.weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made


def _torchao_int8(layer: nn.Linear, compute_dtype: torch.dtype) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer.requires_grad_(False)
    quantize_(layer, Int8WeightOnlyConfig())
    return layer


# ---- for steep plan: shapes without data ----


def plan_quantized(model: nn.Module, method: str) -> None:
    """Replace the linear layers of a model of fake tensors by stand-ins of the quantized size, in place."""
    for parent, name, layer in linear_layers(model):
        setattr(parent, name, PlannedLinear(layer, method))


class PlannedLinear(nn.Linear):
    """A quantized linear layer as a memory plan sees it: its packed weight, its scales, and what it saves for the backward pass
    (nf4: nothing; int8: its input; torchao: the dequantized weight)."""

    def __init__(self, layer: nn.Linear, method: str):
        nn.Module.__init__(self)
        self.method = method
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        numbers = layer.in_features * layer.out_features
        packed = (math.ceil(numbers / 2), 1) if method == "nf4" else (layer.out_features, layer.in_features)
        self.weight = nn.Parameter(torch.empty(packed, dtype=torch.uint8), requires_grad=False)
        self.weight.quant_state = SimpleNamespace(shape=layer.weight.shape)  # type: ignore[attr-defined]
        scale_bytes = layer.out_features * 4
        if method == "nf4":
            blocks = math.ceil(numbers / NF4_BLOCK)
            scale_bytes = blocks + math.ceil(blocks / NF4_NESTED_BLOCK) * 4 + NF4_TABLE_BYTES
        self.register_buffer("scales", torch.empty(scale_bytes, dtype=torch.uint8), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        output: Tensor = _Dequantized.apply(input, self.out_features, self.method)
        return output if self.bias is None else output + self.bias


class _Dequantized(torch.autograd.Function):
    """Shapes of a product with a weight that is dequantized in the forward and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, out_features: int, method: str) -> Tensor:
        input = to_autocast_dtype(input)
        weight = input.new_empty(out_features, input.shape[-1])
        if method != "nf4":
            ctx.save_for_backward(input if method == "int8" else weight)
        return F.linear(input, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("a plan makes no backward pass")
