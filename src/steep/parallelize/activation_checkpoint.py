"""Activation checkpointing: keep little of each layer, compute the rest again in the backward pass.

In: a model. Out: the same model, whose layers run inside torch.utils.checkpoint. Gradients are those of the same run without it,
bit for bit on a CPU: dropout draws the same numbers when a layer is computed again. Main choice: a layer's `forward` is replaced
on the instance, so that no module is added, no name changes and every family works alike, whether or not it has a switch of its
own. Weakness: copies to host memory wait their turn among the device's own work.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from steep.core.errors import ModelError
from steep.models.layers import compute_device, transformer_layers

MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::_grouped_mm")
ATTENTION_WORDS = ("scaled_dot_product", "flash_attention", "efficient_attention", "varlen_attn", "flash_attn")
"""Parts of the names of attention kernels: torch's own, and those that flash-attn registers."""


def checkpoint_layers(
    model: nn.Module, mode: str = "full", every: int = 2, offload: bool = False, device_type: str | None = None
) -> list[str]:
    """Compute transformer layers again in the backward pass; lines that say what is done.

    mode: `full`, `every_nth` (layers 0, every, 2 * every, ...) or `selective`. offload: kept inputs of layers go to host memory.
    device_type: where the model trains; default where its weights are. Layers may be compiled afterwards, by `compile_layers`.
    Raises ModelError for a model without a list of layers, or whose layers are checkpointed already.
    """
    layers = _layers(model)
    chosen = chosen_layers(model, mode, every)
    device_type = device_type or compute_device(model).type
    moves = offload and device_type != "cpu"
    for layer in chosen:
        layer.forward = CheckpointedForward(layer, selective=mode == "selective", offload=moves)
    what = {
        "full": "every layer is computed again in the backward pass",
        "every_nth": f"{len(chosen)} of {len(layers)} layers are computed again in the backward pass",
        "selective": "all but matrix products and attention is computed again in the backward pass",
    }[mode]
    lines = [f"activation checkpointing: {what}" + ("; kept inputs of layers lie in host memory" if moves else "")]
    if offload and not moves:
        lines.append("activation checkpointing: offload means nothing on a CPU, whose memory is the host's; not done")
    return lines


def keep_activations(model: nn.Module) -> None:
    """Undo `checkpoint_layers`, in place; nothing for a model whose layers are not checkpointed."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), CheckpointedForward):
            del module.forward


def chosen_layers(model: nn.Module, mode: str, every: int) -> list[nn.Module]:
    """The layers that are computed again. Raises ModelError for a model without a list of layers."""
    return list(transformer_layers(model))[:: every if mode == "every_nth" else 1]


class KeptBytes(TorchDispatchMode):
    """Sums what selective checkpointing keeps of the operations that run inside it: bytes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation's own result."""
        result = func(*args, **(kwargs or {}))
        if _policy(None, func, *args, **(kwargs or {})) == CheckpointPolicy.MUST_SAVE:
            parts = result if isinstance(result, (tuple, list)) else (result,)
            self.total += sum(part.numel() * part.element_size() for part in parts if isinstance(part, Tensor))
        return result


def _layers(model: nn.Module) -> nn.ModuleList:
    try:
        layers = transformer_layers(model)
    except ModelError as error:
        raise ModelError(
            f"train.activation_checkpointing: {error}. Set it to false and take a smaller train.micro_batch_size."
        ) from None
    if any(isinstance(layer.forward, CheckpointedForward) for layer in layers):
        raise ModelError(f"the layers of this {type(model).__name__} are checkpointed already")
    return layers


class CheckpointedForward:
    """Stands in for the `forward` of one layer. Without gradients (evaluation, generation) it is that forward and no more."""

    def __init__(self, layer: nn.Module, *, selective: bool, offload: bool):
        self.layer = layer  # not its bound method: a deep copy of the model must call the copy
        self.selective = selective
        self.offload = offload
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer's own forward returns."""
        run = self.compiled or self._own_forward()
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        extra: dict[str, Any] = {"context_fn": _selective_contexts} if self.selective else {}
        with self._kept_inputs():
            return checkpoint(run, *args, use_reentrant=False, **extra, **kwargs)

    def compile(self) -> None:
        """Compile what is checkpointed, the checkpoint staying around it. Raises ModelError in selective mode."""
        if self.selective:
            raise ModelError(
                "train.activation_checkpointing selective chooses among single operations, which train.compile fuses; "
                "use full or every_nth, or train without compile"
            )
        self.compiled = torch.compile(self._own_forward())

    def _own_forward(self) -> Callable[..., Any]:
        return MethodType(type(self.layer).forward, self.layer)

    def _kept_inputs(self) -> AbstractContextManager[Any]:
        """Hooks for the inputs that the checkpoint keeps; what is saved inside it has hooks of its own."""
        return torch.autograd.graph.saved_tensors_hooks(to_host, from_host) if self.offload else nullcontext()


def _selective_contexts() -> tuple[Any, Any]:
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(_policy)
    return contexts


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what is slow to make. What draws random numbers is made again, all of it, or later draws would differ."""
    name = operation._schema.name
    if name in MATRIX_PRODUCTS or (_is_attention(name) and _dropout(operation, args, kwargs) == 0):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _is_attention(name: str) -> bool:
    return any(word in name for word in ATTENTION_WORDS)


def _dropout(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The dropout rate that a kernel is called with; of a kernel that has no such argument 0."""
    for position, argument in enumerate(operation._schema.arguments):
        if argument.name == "dropout_p":
            given = args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value)
            return float(given or 0)
    return 0.0


def to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """A tensor of numbers that has gone to page-locked host memory, and where it came from; others (positions) stay."""
    if not tensor.is_floating_point() or tensor.device.type == "cpu":
        return tensor.device, tensor
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    kept.copy_(
        tensor, non_blocking=True
    )  # in the order of the stream, so the tensor's memory may be used again after it
    return tensor.device, kept


def from_host(kept: tuple[torch.device, Tensor]) -> Tensor:
    """The tensor that `to_host` was given."""
    device, tensor = kept
    return tensor.to(device, non_blocking=True)
