"""Activation checkpointing: keep little of each layer, and recompute the rest in the backward pass.

In: a model. Out: the same model, whose layers run inside torch.utils.checkpoint. Gradients equal those of a run without it,
on a CPU bit for bit: dropout draws the same numbers when a layer is recomputed. Main choice: a layer's `forward` is replaced
on the instance, so that no module is added, no name changes, and it works for every model family, whether or not the family
supports checkpointing itself. Weakness: copies to host memory run in the device's main stream, between its other work.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from steep.core.errors import ModelError
from steep.core.say import Say
from steep.models.layers import compute_device, transformer_layers

MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::_grouped_mm")
ATTENTION_WORDS = ("scaled_dot_product", "flash_attention", "efficient_attention", "varlen_attn", "flash_attn")
"""Parts of the names of attention kernels: torch's, and those that flash-attn registers."""


def checkpoint_layers(
    model: nn.Module,
    say: Say,
    mode: str = "full",
    every: int = 2,
    offload: bool = False,
    device_type: str | None = None,
) -> None:
    """Make transformer layers recompute their activations in the backward pass, in place.

    mode: `full`, `every_nth` (layers 0, every, 2 * every, ...) or `selective`. offload: kept inputs of layers go to host memory.
    device_type: where the model trains; default: where its weights are. Layers may be compiled afterwards, by `compile_layers`.
    Raises ModelError for a model without a list of layers, or whose layers are already checkpointed.
    """
    try:
        layers = transformer_layers(model)
    except ModelError as error:
        advice = "Set it to false and use a smaller train.micro_batch_size."
        raise ModelError(f"train.activation_checkpointing: {error}. {advice}") from None
    if any(isinstance(layer.forward, CheckpointedForward) for layer in layers):
        raise ModelError(f"the layers of this {type(model).__name__} are already checkpointed")
    chosen = chosen_layers(model, mode, every)
    device_type = device_type or compute_device(model).type
    moves = offload and device_type != "cpu"
    for layer in chosen:
        layer.forward = CheckpointedForward(layer, selective=mode == "selective", offload=moves)
    what = {
        "full": "every layer is recomputed in the backward pass",
        "every_nth": f"{len(chosen)} of {len(layers)} layers are recomputed in the backward pass",
        "selective": "everything but matrix products and attention is recomputed in the backward pass",
    }[mode]
    say(f"activation checkpointing: {what}" + ("; the inputs of these layers are kept in host memory" if moves else ""))
    if offload and not moves:
        say("activation checkpointing: offload has no effect on a CPU, whose memory is the host's")


def keep_activations(model: nn.Module) -> None:
    """Undo `checkpoint_layers`, in place; does nothing where no layer is checkpointed."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), CheckpointedForward):
            del module.forward


def chosen_layers(model: nn.Module, mode: str, every: int) -> list[nn.Module]:
    """The layers that are recomputed. Raises ModelError for a model without a list of layers."""
    return list(transformer_layers(model))[:: every if mode == "every_nth" else 1]


class KeptBytes(TorchDispatchMode):
    """Counts the bytes that selective checkpointing keeps of the operations that run inside this context."""

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


class CheckpointedForward:
    """Replaces the `forward` of one layer. Without gradients (evaluation, generation) it only calls that forward."""

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
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        extra: dict[str, Any] = {"context_fn": contexts} if self.selective else {}
        # for the inputs that the checkpoint keeps; tensors saved inside it have other hooks
        hooks = torch.autograd.graph.saved_tensors_hooks(to_host, from_host) if self.offload else nullcontext()
        with hooks:
            return checkpoint(run, *args, use_reentrant=False, **extra, **kwargs)

    def compile(self) -> None:
        """Compile the layer's forward inside the checkpoint. Raises ModelError in selective mode."""
        if self.selective:
            raise ModelError(
                "train.activation_checkpointing: selective chooses single operations, which train.compile fuses; "
                "use full or every_nth, or train without compile"
            )
        self.compiled = torch.compile(self._own_forward())

    def _own_forward(self) -> Callable[..., Any]:
        return MethodType(type(self.layer).forward, self.layer)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what is slow to compute. Everything that draws random numbers is recomputed, or later draws would differ."""
    name = operation._schema.name
    is_attention = any(word in name for word in ATTENTION_WORDS)
    if name in MATRIX_PRODUCTS or (is_attention and _dropout(operation, args, kwargs) == 0):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _dropout(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The dropout rate that a kernel is called with; 0 for a kernel without that argument."""
    for position, argument in enumerate(operation._schema.arguments):
        if argument.name == "dropout_p":
            given = args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value)
            return float(given or 0)
    return 0.0


def to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """The tensor's device, and its copy in page-locked host memory; tensors of integers (positions) stay where they are."""
    if not tensor.is_floating_point() or tensor.device.type == "cpu":
        return tensor.device, tensor
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    kept.copy_(tensor, non_blocking=True)  # runs in stream order, so the tensor's memory may be reused afterwards
    return tensor.device, kept


def from_host(kept: tuple[torch.device, Tensor]) -> Tensor:
    """The tensor that was given to `to_host`, back on its device."""
    device, tensor = kept
    return tensor.to(device, non_blocking=True)
