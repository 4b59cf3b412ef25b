"""From a batch to its loss, for any model: hidden states, then the output head and the loss in chunks.

In: a model and batches. Out: summed losses. Main choice: a causal language model of transformers is its base model followed by a
linear head (scaled or soft-capped in some families). If `prepare_lm_loss` finds that true, logits never exist as a whole;
otherwise the model's own forward is used. Suffixes: B sequences, T tokens each, N = B * T, D width, V vocabulary, K positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steep.batch import IGNORE_INDEX, Batch
from steep.core.errors import ModelError
from steep.loss import DEFAULT_CHUNK_BYTES, linear_cross_entropy
from steep.models.balance import Routing, RoutingRecorder
from steep.models.document_attention import placeholder_mask
from steep.models.document_rows import document_rows
from steep.models.layers import head_weight, output_layer, text_config


class BatchLoss(NamedTuple):
    """What a batch gave in training."""

    total: Tensor
    """() fp32 with gradients: the SUM of the cross-entropy of all label tokens."""
    sequences: Tensor
    """(B,) fp32 without gradients: that of each sequence."""
    routing: Routing | None = None
    """What the routers of a mixture of experts did, where `LMLoss.watch_routing` was called."""


class LMLoss(nn.Module):
    """A language model and the cross-entropy of its predictions. Made by `prepare_lm_loss`.

    A module, so that hooks on its forward (sharding) cover every use of the weights. Ask `model` for parameter names: those of
    this module have a prefix.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: str,
        has_head: bool,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        apart: bool = False,
    ):
        """attention: `document` (a flattened row with cu_seqlens), or `sdpa`, `eager`, `own` (B x T, restarting position_ids).

        has_head: whether hidden states and output head give the model's logits; else its own whole logits are used. chunk_bytes:
        logits that exist at a time in training. apart: each document is run as a row of its own (`document_rows`), whatever else
        is in its sequence.
        """
        super().__init__()
        self.model = model
        self.attention = attention
        self.has_head = has_head
        self.apart = apart
        self.gives_positions = not apart
        """Whether transformers' model is told the positions. One document in a row needs none, and some families count them in a
        way of their own (RoBERTa from its padding id on), which serves the model later."""
        self.chunk_bytes = chunk_bytes
        self.routing: RoutingRecorder | None = None
        self.balance_coefficient = 0.0

    def watch_routing(self, recorder: RoutingRecorder, balance_coefficient: float) -> None:
        """Let every training forward report what the routers did. The coefficient is that of the balancing loss in training."""
        self.routing, self.balance_coefficient = recorder, balance_coefficient

    def forward(self, batch: Batch) -> BatchLoss:
        """The loss of a batch, in training."""
        if self.routing is None:
            loss, losses_N = self._losses(batch, self.chunk_bytes)
            return BatchLoss(loss, losses_N.view(batch.labels.shape).sum(1))
        rows = document_rows(batch) if self.apart else None
        with self.routing.recording() as outputs:
            loss, losses_N = self._losses(batch, self.chunk_bytes)
        return BatchLoss(loss, losses_N.view(batch.labels.shape).sum(1), self.routing.routing(outputs, batch, rows))

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> Tensor:
        """(B, T) fp32 without gradients: -log p of each label token, 0 where the label is -100.

        In chunks of the default size, so that a score does not depend on what training was given.
        """
        return self._losses(batch, DEFAULT_CHUNK_BYTES)[1].view(batch.labels.shape)

    def _losses(self, batch: Batch, chunk_bytes: int) -> tuple[Tensor, Tensor]:
        """The sum over all label tokens, () with gradients, and -log p of each, (N,) without; 0 where the label is -100."""
        labels_N = batch.labels.flatten()
        if not self.has_head:
            logits_NV = self.own_logits(batch).float()
            losses_N = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE_INDEX, reduction="none")
            return losses_N.sum(), losses_N.detach()
        head = read_head(self.model)
        return linear_cross_entropy(
            self.hidden_states(batch), head.weight, labels_N,
            bias=head.bias, softcap=head.softcap, multiplier=head.multiplier, chunk_bytes=chunk_bytes,
        )  # fmt: skip

    @torch.no_grad()
    def logits_at(self, batch: Batch, positions_K: Tensor) -> Tensor:
        """(K, V) without gradients: logits at some of the N flattened positions; others are computed only without a head.

        positions_K: (K,) int64.
        """
        positions_K = positions_K.to(batch.input_ids.device)
        if self.has_head:
            return read_head(self.model).logits(self.hidden_states(batch)[positions_K])
        return self.own_logits(batch)[positions_K]

    def hidden_states(self, batch: Batch) -> Tensor:
        """(N, D): what the output head reads. Only where `has_head`."""
        base: Any = self.model.base_model
        return self._flat_outputs(base, batch, lambda output: output if isinstance(output, Tensor) else output[0])

    def own_logits(self, batch: Batch) -> Tensor:
        """(N, V): the model's own logits. Raises ModelError if it returns none."""
        return self._flat_outputs(self.model, batch, self._logits_of)

    def _flat_outputs(self, module: nn.Module, batch: Batch, tensor_of: Callable[[Any], Tensor]) -> Tensor:
        """(N, ...): what `module` gives for each token of the batch."""
        if not self.apart:
            return tensor_of(module(**self._arguments(module, batch))).flatten(0, 1)
        parts = document_rows(batch)
        outputs = [
            tensor_of(module(**self._arguments(module, rows.batch))).flatten(0, 1)[rows.kept_K] for rows in parts
        ]
        return torch.cat(outputs)[torch.cat([rows.positions_K for rows in parts]).argsort()]

    def _logits_of(self, output: Any) -> Tensor:
        """(B, T, V)"""
        if isinstance(output, (tuple, list)):
            output = output[0]
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise ModelError(
                f"{type(self.model).__name__} returned {type(output).__name__}; it must return a tensor of logits (B, T, V), "
                "a tuple that starts with one, or an object with .logits"
            )
        return logits

    def _arguments(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """The arguments of a forward; a module that is not of transformers gets only those in its signature."""
        ids = batch.input_ids
        # A configuration may ask a mixture of experts for its own balancing loss, which does not know this attention's mask.
        quiet = {"output_router_logits": False} if hasattr(text_config(model), "output_router_logits") else {}
        if self.attention == "document":
            return {
                **quiet,
                "input_ids": ids.reshape(1, -1), "position_ids": batch.position_ids.reshape(1, -1), "use_cache": False,
                "attention_mask": placeholder_mask(ids.device), "cu_seqlens": batch.cu_seqlens, "max_seqlen": ids.shape[1],
            }  # fmt: skip
        offered = {"input_ids": ids, "use_cache": False, **quiet}
        if self.gives_positions or self.attention == "own":
            offered["position_ids"] = batch.position_ids
        if self.attention == "own":
            offered["cu_seqlens"] = batch.cu_seqlens
        known = inspect.signature(model.forward).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        if takes_any and self.attention != "own":
            return offered
        taken = {name: value for name, value in offered.items() if name in known}
        if "input_ids" not in taken:  # whose first argument may have any name
            taken = {**taken, next(iter(known), "input_ids"): ids}
        return taken


@dataclass(frozen=True)
class OutputHead:
    """logits = softcap * tanh(multiplier * (hidden @ weight.T + bias) / softcap), without the tanh if softcap is None."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None
    multiplier: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), all at once: for checks and scores, not for training."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        logits = F.linear(hidden, self.weight.to(hidden.dtype), bias) * self.multiplier
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def read_head(model: nn.Module) -> OutputHead:
    """The output head as the model holds it now. Raises ModelError if it is not a plain linear layer."""
    weight = head_weight(model)
    if weight is None:
        raise ModelError(f"{type(model).__name__} has no linear output layer that get_output_embeddings() gives")
    config = text_config(model)
    factors = [getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier")]  # Cohere; Falcon-H1
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        factors.append(1.0 / float(divisor))
    return OutputHead(
        weight=weight,
        bias=getattr(output_layer(model), "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),  # Gemma 2
        multiplier=next((float(factor) for factor in factors if isinstance(factor, (int, float))), 1.0),
    )
