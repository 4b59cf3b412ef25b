"""How much memory it takes to train a model, by part, before any weight exists.

The model is built and run forward on fake tensors (shapes and dtypes without data), and what autograd would keep for the
backward pass is counted. So the figure holds for every architecture, precision and checkpointing setting, without a formula for
each family. Weakness: the scratch memory of kernels and the allocator's unused blocks are not seen; sequences are not split into
documents, which makes no difference where a flash kernel computes attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from steep.core.units import format_bytes

PROCESS_BYTES = 500 * 2**20
"""Resident set of a process that trains a model of no size on a CPU: python, torch, transformers, kernels, threads. Measured
465 to 630 MiB above the other parts, for models of 1 to 23 M parameters (torch 2.13)."""


@dataclass(frozen=True)
class ActivationLayout:
    """Bytes that the forward pass up to the head leaves for the backward pass."""

    kept: int
    """Kept from the forward pass on; with checkpointing, the inputs of layers and what selective checkpointing keeps."""
    recomputed: int = 0
    """Computed again in the backward pass, one checkpointed layer at a time."""
    note: str = ""
    """What to know about these figures; empty where everything was measured."""


@dataclass(frozen=True)
class PeakMemory:
    """Bytes by part at the moment of the step that needs most."""

    weights: int
    gradients: int
    """Those that exist at that moment: all of them with accumulation, else those the backward pass has computed."""
    optimizer: int
    activations: int
    """What the forward pass keeps for the backward pass, including the bf16 copies of weights that autocast makes, and the layer
    that is computed again at that moment."""
    logits: int
    """One chunk of logits, and the gradient of the output head."""
    checkpoint: int
    """The copy of the state that asynchronous saving writes from; held in host memory."""
    moment: str = ""
    """Which moment of the step that is."""
    all_gradients: int = 0
    """What gradients take once all of them exist."""

    def parts(self, device_type: str, process_bytes: int | None = None) -> dict[str, int]:
        """Bytes by part on the device; with a GPU the checkpoint's copy and the process itself are in host memory and left out.

        process_bytes: of the process without the run, of which at least `PROCESS_BYTES` are counted; None leaves it out.
        """
        parts = {name: getattr(self, name) for name in ("weights", "gradients", "optimizer", "activations", "logits")}
        if device_type != "cpu":
            return parts
        process = {} if process_bytes is None else {"process": max(process_bytes, PROCESS_BYTES)}
        return parts | {"checkpoint copy": self.checkpoint} | process

    @property
    def note(self) -> str:
        """Why gradients take no memory, where they do not; empty elsewhere."""
        if self.gradients or not self.all_gradients:
            return ""
        return (
            f"gradients: there are none {self.moment}, when most memory is needed; at the end of the backward pass they take "
            f"{format_bytes(self.all_gradients)}, where activations were"
        )


def peak_memory(
    model: nn.Module,
    activations: ActivationLayout,
    *,
    micro_batch_size: int,
    sequence_length: int,
    head_shape: tuple[int, int],
    head_trained: bool = True,
    head_tied: bool = False,
    autocast_bytes: int | None,
    accumulates: bool,
    optimizer_bytes: int,
    loss_chunk_bytes: int,
    copied_bytes: int,
    host_bytes: int = 0,
) -> PeakMemory:
    """The memory of training `model`, which may be built on fake tensors.

    head_shape: (V, D). autocast_bytes: bytes per number of the autocast dtype, None without autocast. optimizer_bytes: the
    optimizer's whole state. copied_bytes: of the copy that saves are written from, 0 without one. host_bytes: of weights that
    are in host memory.
    """
    parameters = list(model.parameters())
    weights = sum(tensor.nbytes for tensor in [*parameters, *model.buffers()])
    gradients = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    rows, (vocabulary, width) = micro_batch_size * sequence_length, head_shape  # B*T, (V, D)
    compute_bytes = autocast_bytes or parameters[0].element_size()
    chunk = min(max(loss_chunk_bytes, vocabulary * compute_bytes), rows * vocabulary * compute_bytes)
    head_copy = vocabulary * width * compute_bytes if autocast_bytes else 0
    head_gradient = vocabulary * width * 4 if head_trained else 0  # (V, D) fp32
    hidden = rows * width * (4 + compute_bytes)  # (B*T, D): the states before the head, and their fp32 gradient
    tables = (module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    embedding = max((table.nbytes for table in tables if table.requires_grad), default=0)
    before = gradients if accumulates else 0
    pending = head_gradient if head_tied or not accumulates else 0
    # (gradients, activations, logits) at the four moments that may need most. 1: at the loss, all activations and the head's
    # gradient exist. 2: the last layer is computed again. 3: the first layer is, and all gradients exist. 4: the embedding's
    # gradient is added to one that waits for it (the head's, where they are tied) or to that of an earlier micro-batch. With
    # accumulation gradients exist at all four.
    moments = {
        "at the loss": (before, activations.kept, chunk + head_copy + head_gradient + hidden),
        "at the last layer": (before, activations.kept + activations.recomputed, pending + hidden),
        "at the first layer": (gradients, activations.recomputed, head_gradient if head_tied else 0),
        "at the embedding": (gradients + (embedding if accumulates else 0), 0, head_gradient if head_tied else 0),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    present, kept, logits = moments[moment]
    return PeakMemory(
        weights=weights - host_bytes,
        gradients=present,
        optimizer=optimizer_bytes,
        activations=kept,
        logits=logits,
        checkpoint=copied_bytes,
        moment=moment,
        all_gradients=gradients,
    )


def saved_bytes(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that autograd keeps after `forward`, each storage once, without the model's own weights."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: list[torch.Tensor] = []  # held until counted: a freed storage's address may be used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in [*kept, output]}
    return sum(size for storage, size in storages.items() if storage not in own)


def layer_input_bytes(layers: Iterable[nn.Module], forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of the floating-point inputs of `layers`: what checkpointing keeps, and offloading moves to host memory."""
    inputs: list[torch.Tensor] = []

    def see(module: nn.Module, arguments: tuple[object, ...]) -> None:
        inputs.extend(t for t in arguments if isinstance(t, torch.Tensor) and t.is_floating_point())

    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return sum(tensor.nbytes for tensor in inputs)
