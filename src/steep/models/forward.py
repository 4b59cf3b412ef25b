"""From a batch to its loss, for any model: hidden states, then the output head and the loss in chunks.

In: a model and batches. Out: summed losses. Main choice: a causal language model of transformers is its base model
followed by a linear head (scaled or soft-capped in some families); that claim is checked against the model's own logits
once, before training, and so is document attention. Where either does not hold, the model's own forward is used and the
message says so: nothing here trusts a family's name.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steep.core.errors import ModelError, TrainingError
from steep.loss import DEFAULT_CHUNK_BYTES, IGNORE_INDEX, linear_cross_entropy_with_losses, token_losses
from steep.models.document_attention import enable_document_attention, obstacle, placeholder_mask
from steep.models.gpt2 import GPT2LMHeadModel
from steep.models.layers import compute_device, evaluating, head_weight, output_layer, text_config
from steep.models.layers import vocab_size as vocab_size_of

if TYPE_CHECKING:
    from steep.batch import Batch

CHECK_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of two computations of the same logits, relative to the largest logit. A wrong head or a leaking
document differs by a good part of 1; kernels that sum in another order differ by far less than this."""


@dataclass(frozen=True)
class OutputHead:
    """logits = softcap * tanh(multiplier * (hidden @ weight.T + bias) / softcap), without the tanh if softcap is None."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None
    multiplier: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), whole: for checks and generation, not for training."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        logits = F.linear(hidden, self.weight.to(hidden.dtype), bias) * self.multiplier
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


@dataclass(frozen=True)
class ModelForward:
    """How a model is run on batches. Made by `prepare_forward`."""

    model: nn.Module
    attention: str
    """`document` (flattened row with cu_seqlens), or `sdpa`, `eager`, `own` (B x T with restarting position_ids)."""
    has_head: bool
    """Whether hidden states and `output_head` give the model's logits; else its own whole logits are used."""


# ---- what a run calls ----


def prepare_forward(
    model: nn.Module, attention: str = "auto", vocab_size: int | None = None
) -> tuple[ModelForward, list[str]]:
    """Choose how `model` is run, checked on a few tokens, and say what was chosen against the wish and why.

    attention: `auto`, `document`, `sdpa` or `eager`. vocab_size: ids that may be used for the check; default the model's.
    Call it before compiling layers. Raises ModelError if the asked attention is impossible.
    """
    vocab_size = vocab_size or _vocab_size(model)
    chosen, messages = _choose_attention(model, attention, vocab_size)
    messages += _left_out(model)
    problem = check_decomposition(model, vocab_size, chosen)
    if problem is not None:
        messages.append(f"loss: whole logits of the model's own forward, because {problem}")
    return ModelForward(model, chosen, problem is None), messages


def forward_loss(forward: ModelForward, batch: Batch, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> Tensor:
    """The SUM of the cross-entropy over the batch's label tokens, an fp32 scalar with gradients."""
    return forward_losses(forward, batch, chunk_bytes)[0]


def forward_losses(
    forward: ModelForward, batch: Batch, chunk_bytes: int = DEFAULT_CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """The sum of `forward_loss`, and the sum of each sequence, (B,) fp32 without gradients, from the same forward pass."""
    labels_N = batch.labels.flatten()
    if not forward.has_head:
        logits = logits_of_batch(forward, batch)
        losses_N = F.cross_entropy(logits.float(), labels_N, ignore_index=IGNORE_INDEX, reduction="none")
        return losses_N.sum(), losses_N.detach().view(batch.labels.shape).sum(1)
    head = output_head(forward.model)
    loss, losses_N = linear_cross_entropy_with_losses(
        hidden_states(forward, batch), head.weight, labels_N,
        bias=head.bias, softcap=head.softcap, multiplier=head.multiplier, chunk_bytes=chunk_bytes,
    )  # fmt: skip
    return loss, losses_N.view(batch.labels.shape).sum(1)


@torch.no_grad()
def forward_token_losses(forward: ModelForward, batch: Batch, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> Tensor:
    """-log p of each label token, (B, T) fp32 without gradients, 0 where the label is -100."""
    labels_N = batch.labels.flatten()
    if not forward.has_head:
        logits = logits_of_batch(forward, batch).float()
        losses = F.cross_entropy(logits, labels_N, ignore_index=IGNORE_INDEX, reduction="none")
        return losses.view(batch.labels.shape)
    head = output_head(forward.model)
    losses = token_losses(
        hidden_states(forward, batch), head.weight, labels_N,
        bias=head.bias, softcap=head.softcap, multiplier=head.multiplier, chunk_bytes=chunk_bytes,
    )  # fmt: skip
    return losses.view(batch.labels.shape)


@torch.no_grad()
def forward_logits_at(forward: ModelForward, batch: Batch, places_K: Tensor) -> Tensor:
    """(K, V): logits at some of the B*T flattened positions, without gradients; no others are computed where that is possible.

    places_K: (K,) int64.
    """
    places_K = places_K.to(batch.input_ids.device)
    if not forward.has_head:
        return logits_of_batch(forward, batch)[places_K]
    return output_head(forward.model).logits(hidden_states(forward, batch)[places_K])


def hidden_states(forward: ModelForward, batch: Batch) -> Tensor:
    """(B*T, D): what the output head reads. Only where `forward.has_head`."""
    return _hidden(forward.model, forward.attention, batch.input_ids, batch.position_ids, batch.cu_seqlens)


def logits_of_batch(forward: ModelForward, batch: Batch) -> Tensor:
    """(B*T, V): the model's own logits, whole."""
    return _own_logits(forward.model, forward.attention, batch.input_ids, batch.position_ids, batch.cu_seqlens)


def output_head(model: nn.Module) -> OutputHead:
    """The output head as the model holds it now. Raises ModelError if it is not a plain linear layer."""
    weight = head_weight(model)
    if weight is None:
        raise ModelError(f"{type(model).__name__} has no linear output layer that get_output_embeddings() gives")
    config = text_config(model)
    return OutputHead(
        weight=weight,
        bias=getattr(output_layer(model), "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
        multiplier=_multiplier(config),
    )


def check_decomposition(model: nn.Module, vocab_size: int, attention: str = "sdpa") -> str | None:
    """None if head(hidden states) equals the model's own logits on a few tokens; else what differs, for a message."""
    try:
        head = output_head(model)
    except ModelError as error:
        return str(error)
    ids, positions, bounds = _check_batch(vocab_size, compute_device(model))
    with evaluating(model):
        own = _own_logits(model, attention, ids, positions, bounds)
        hidden = _try_hidden(model, attention, ids, positions, bounds)
        if hidden is None or hidden.shape[-1] != head.weight.shape[-1] or own.shape[-1] != head.weight.shape[0]:
            return f"the hidden states of {type(model).__name__} do not fit its output layer"
        difference = _difference(head.logits(hidden), own)
    if difference > _tolerance(own):
        return (
            f"{type(model).__name__}'s logits are not its output layer applied to its hidden states ({difference:.1e})"
        )
    return None


def leak_test(forward: ModelForward, vocab_size: int | None = None) -> None:
    """Change document A and see that nothing changes in the others. Raises TrainingError if something does.

    Two rows of 16 tokens: A and B in the first, C in the second. Costs two forward passes over 32 tokens.
    """
    model = forward.model
    ids, positions, bounds = _check_batch(vocab_size or _vocab_size(model), compute_device(model))
    first = int(bounds[1])
    changed = ids.clone()
    changed[0, :first] = ids[0, :first].flip(0).roll(1)
    with evaluating(model):
        run = _hidden if forward.has_head else _own_logits
        before = run(model, forward.attention, ids, positions, bounds)
        after = run(model, forward.attention, changed, positions, bounds)
    difference = _difference(after[first:], before[first:])
    if difference > _tolerance(before):
        raise TrainingError(
            f"the leak test failed: changing one document moved another one's outputs by {difference:.1e} of their size. "
            f"{type(model).__name__} with attention {forward.attention!r} sees across documents. "
            "Set data.document_mask to false to train that way, or choose another model.attention."
        )


# ---- running a model ----


def _hidden(model: nn.Module, attention: str, ids: Tensor, positions: Tensor, bounds: Tensor) -> Tensor:
    if isinstance(model, GPT2LMHeadModel):
        hidden = model.hidden_states(ids, positions, bounds if attention == "document" else None)
        return hidden.flatten(0, 1)
    base: Any = model.base_model
    output = base(**_arguments(base, attention, ids, positions, bounds))
    return output[0].flatten(0, 1)


def _own_logits(model: nn.Module, attention: str, ids: Tensor, positions: Tensor, bounds: Tensor) -> Tensor:
    output = model(**_arguments(model, attention, ids, positions, bounds))
    if isinstance(output, (tuple, list)):
        output = output[0]
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise ModelError(
            f"{type(model).__name__} returned {type(output).__name__}; needed is a tensor of logits (B, T, V), "
            "a tuple that starts with one, or an object with .logits"
        )
    return logits.flatten(0, 1)


def _arguments(model: nn.Module, attention: str, ids: Tensor, positions: Tensor, bounds: Tensor) -> dict[str, Any]:
    """What the model's forward is called with; a foreign module gets only what its signature names."""
    if attention == "document" and not isinstance(model, GPT2LMHeadModel):
        return {
            "input_ids": ids.reshape(1, -1), "position_ids": positions.reshape(1, -1), "use_cache": False,
            "attention_mask": placeholder_mask(ids.device), "cu_seqlens": bounds, "max_seqlen": ids.shape[1],
        }  # fmt: skip
    offered = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    if attention in ("document", "own"):
        offered["cu_seqlens"] = bounds
    known = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    if takes_any and attention != "own":
        return offered
    taken = {name: value for name, value in offered.items() if name in known}
    if "input_ids" not in taken:  # a foreign module may call its first argument anything
        taken = {**taken, next(iter(known), "input_ids"): ids}
    return taken


def _try_hidden(model: nn.Module, attention: str, ids: Tensor, positions: Tensor, bounds: Tensor) -> Tensor | None:
    if not isinstance(model, GPT2LMHeadModel) and getattr(model, "base_model", model) is model:
        return None
    hidden = _hidden(model, attention, ids, positions, bounds)
    return hidden if hidden.ndim == 2 else None


# ---- choosing ----


def _choose_attention(model: nn.Module, wished: str, vocab_size: int) -> tuple[str, list[str]]:
    if wished in ("auto", "document"):
        problem = _document_problem(model, vocab_size)
        if problem is None:
            return "document", []
        if wished == "document":
            raise ModelError(f"model.attention=document: {problem}. What works: model.attention: auto")
        fallback = _set_attention(model, "sdpa")
        return fallback, [f"attention: {fallback} with restarting position_ids, not document by document: {problem}"]
    if isinstance(model, GPT2LMHeadModel):
        raise ModelError(f"model.attention={wished}: steep's GPT-2 computes document attention only; use auto")
    chosen = _set_attention(model, wished)
    return chosen, [] if chosen == wished else [f"attention: {chosen}, because the model offers no {wished}"]


def _set_attention(model: nn.Module, name: str) -> str:
    """Set transformers' implementation; the name in effect after it, `own` for a model that has none."""
    config = getattr(model, "config", None)
    if not hasattr(model, "set_attn_implementation") or not hasattr(config, "_attn_implementation"):
        return "own"
    try:
        model.set_attn_implementation(name)  # type: ignore[operator]
    except ValueError:  # transformers' way to say that the family has no sdpa
        model.set_attn_implementation("eager")  # type: ignore[operator]
    return str(config._attn_implementation)  # type: ignore[union-attr]


def _document_problem(model: nn.Module, vocab_size: int) -> str | None:
    """Enable document attention and compare it with documents run one by one. None, or why it cannot be used."""
    reason = None if isinstance(model, GPT2LMHeadModel) else obstacle(model)
    if reason is not None:
        return reason
    if not enable_document_attention(model):
        return f"{type(model).__name__} did not take it"
    ids, positions, bounds = _check_batch(vocab_size, compute_device(model))
    try:
        with evaluating(model):
            packed = _own_logits(model, "document", ids, positions, bounds)
            alone = _logits_one_by_one(model, ids.flatten(), bounds.tolist())
    except ModelError as error:
        return str(error)
    difference = _difference(packed, alone)
    if difference > _tolerance(alone):
        return f"packed documents give other logits than the same documents alone ({difference:.1e})"
    return None


def _logits_one_by_one(model: nn.Module, ids_L: Tensor, bounds: list[int]) -> Tensor:
    parts = []
    for start, stop in itertools.pairwise(bounds):
        ids = ids_L[start:stop].unsqueeze(0)
        positions = torch.arange(stop - start, device=ids.device).unsqueeze(0)
        single = torch.tensor([0, stop - start], dtype=torch.int32, device=ids.device)
        parts.append(_own_logits(model, "sdpa", ids, positions, single))
    return torch.cat(parts)


def _left_out(model: nn.Module) -> list[str]:
    """What the model's own training loss has and ours has not."""
    if getattr(text_config(model), "output_router_logits", False):
        return ["loss: cross-entropy only; the load-balancing loss of this mixture of experts is not added"]
    return []


# ---- small parts ----


def _check_batch(vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows of 16 tokens in documents of 7, 9 and 16: ids and positions (2, 16), boundaries (4,). Draws no numbers."""
    ids = (torch.arange(32, device=device) * 7919 + 13) % vocab_size
    lengths = [7, 9, 16]
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    bounds = torch.tensor([0, 7, 16, 32], dtype=torch.int32, device=device)
    return ids.view(2, 16), positions.view(2, 16), bounds


def _difference(left: Tensor, right: Tensor) -> float:
    scale = right.float().abs().max().clamp_min(1e-20)
    return float((left.float() - right.float()).abs().max() / scale)


def _tolerance(tensor: Tensor) -> float:
    return CHECK_TOLERANCE.get(tensor.dtype, 5e-2)


def _vocab_size(model: nn.Module) -> int:
    size = vocab_size_of(model)
    if size is None:
        raise ModelError(f"{type(model).__name__} has no config.vocab_size; pass vocab_size")
    return size


def _multiplier(config: Any) -> float:
    """What a family multiplies its logits by, under the name that it gives the factor."""
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        factor = getattr(config, name, None)
        if isinstance(factor, (int, float)):
            return float(factor)
    divisor = getattr(config, "logits_scaling", None)  # Granite
    return 1.0 / float(divisor) if divisor else 1.0
