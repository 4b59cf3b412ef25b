"""Embeddings in host memory: the token table stays on the CPU, and only the rows that a batch needs go to the device.

In: a model on a GPU whose input embedding is frozen. Out: the same model, less one table of vocabulary x width numbers there.
Weakness: each micro-batch waits for its rows to be looked up on the CPU and copied, and a table that is trained, or tied to the
output head, cannot go.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steep.core.errors import ConfigError
from steep.models.layers import compute_device, input_layer, is_tied


def frozen_embedding(model: Any) -> nn.Embedding:
    """The input embedding. Raises ConfigError where it is trained, tied to the output head, or not to be found."""
    found = input_layer(model)
    if not isinstance(found, nn.Embedding):
        raise ConfigError(f"model.offload_embeddings: {type(model).__name__} has no nn.Embedding that could be moved")
    if is_tied(model):
        raise ConfigError(
            "model.offload_embeddings: this model's embedding is its output head too, which every token needs on the device; "
            "leave it false"
        )
    if found.weight.requires_grad:
        raise ConfigError(
            "model.offload_embeddings: the embedding is trained. Freeze it (model.freeze: embeddings, or an adapter without "
            "embed_tokens in modules_to_save), or leave it false"
        )
    return found


def offload_embeddings(model: nn.Module, device: torch.device) -> str:
    """Hold the frozen input embedding in host memory, in place; a line that says so. Raises as `frozen_embedding`."""
    embedding = frozen_embedding(model)
    if device.type == "cpu":
        return "model.offload_embeddings means nothing on a CPU, whose memory is the host's; not done"
    embedding.to("cpu")
    embedding.register_forward_pre_hook(lambda module, arguments: tuple(ids.to("cpu") for ids in arguments))

    def to_device(module: nn.Module, arguments: Any, rows: Tensor) -> Tensor:
        return rows.to(device, non_blocking=True)

    embedding.register_forward_hook(to_device)
    _say_where_it_computes(model)
    size = embedding.weight.numel() * embedding.weight.element_size()
    return f"embeddings: the frozen table of {embedding.num_embeddings:,} tokens ({size / 1e6:,.0f} MB) lies in host memory"


def _say_where_it_computes(model: nn.Module) -> None:
    """Let `model.device`, where transformers' generate puts its tensors, be the GPU: it asks the first parameter, which is here
    the table. This instance gets a class of its own, made from its class; the class itself stays as it is. A pickle of
    it cannot be made."""
    kind = type(model)
    if hasattr(kind, "device"):
        named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        model.__class__ = type(kind.__name__, (kind,), {**named, "device": property(compute_device)})
