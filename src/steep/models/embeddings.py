"""Embeddings in host memory: the token table stays on the CPU, and only the rows that a batch needs go to the device.

In: a model on a GPU whose input embedding is frozen. Out: the same model, without its V x D table on the GPU. Weakness: each
micro-batch waits until its rows are looked up on the CPU and copied; a table that is trained or tied to the output head cannot
be moved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from steep.core.errors import ConfigError
from steep.core.say import Say
from steep.models.layers import compute_device, input_layer, is_tied


def frozen_embedding(model: Any) -> nn.Embedding:
    """The input embedding. Raises ConfigError where it is trained, tied to the output head, or not found."""
    found = input_layer(model)
    if not isinstance(found, nn.Embedding):
        raise ConfigError(f"model.offload_embeddings: {type(model).__name__} has no nn.Embedding to move")
    if is_tied(model):
        raise ConfigError(
            "model.offload_embeddings: this model's embedding is also its output head, which every token needs on the device; "
            "set it to false"
        )
    if found.weight.requires_grad:
        raise ConfigError(
            "model.offload_embeddings: the embedding is trained. Freeze it (model.freeze: embeddings, or an adapter without "
            "embed_tokens in modules_to_save), or set it to false"
        )
    return found


def offload_embeddings(model: nn.Module, device: torch.device, say: Say) -> None:
    """Move the frozen input embedding to host memory, in place. Raises the errors of `frozen_embedding`."""
    embedding = frozen_embedding(model)
    if device.type == "cpu":
        say("model.offload_embeddings has no effect on a CPU, whose memory is the host's")
        return
    embedding.to("cpu")
    embedding.register_forward_pre_hook(lambda module, arguments: tuple(ids.to("cpu") for ids in arguments))
    embedding.register_forward_hook(lambda module, arguments, rows: rows.to(device, non_blocking=True))
    kind = type(model)
    if hasattr(kind, "device"):
        # transformers' generate puts its tensors on `model.device`, that of the first parameter: the table. This instance gets a
        # subclass of its own that names the GPU; its class is not changed. Such a model cannot be pickled.
        named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        model.__class__ = type(kind.__name__, (kind,), {**named, "device": property(compute_device)})
    size = embedding.weight.numel() * embedding.weight.element_size()
    say(f"embeddings: the frozen table of {embedding.num_embeddings:,} tokens ({size / 1e6:,.0f} MB) is in host memory")
