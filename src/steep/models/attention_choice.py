"""How a model is run on batches, chosen and checked before training: its attention, and whether its head can be separated.

In: a model. Out: an `LMLoss`. Main choice: no family's name is trusted. Document attention is compared with the same documents
run one by one, and head(hidden states) with the model's own logits; where they differ, the model's own way is used and said.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor, nn

from steep.batch import IGNORE_INDEX, Batch
from steep.core.errors import ModelError, TrainingError
from steep.core.say import Say
from steep.loss import DEFAULT_CHUNK_BYTES
from steep.models import layers
from steep.models.document_attention import enable_document_attention
from steep.models.lm_loss import LMLoss, read_head

CHECK_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of two computations of the same logits, relative to the largest logit. Kernels that sum in another order
differ by far less; a wrong head or a leaking document differs by a large part of 1."""

CHECK_LENGTHS = (7, 9, 16)
"""Tokens of the documents that the checks use: two in the first row of 16, one in the second."""


def prepare_lm_loss(
    model: nn.Module,
    say: Say,
    *,
    attention: str = "auto",
    vocab_size: int | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> LMLoss:
    """Choose how `model` is run, checked on a few tokens. `say` is told where that differs from the wish, and why.

    attention: `auto`, `document`, `sdpa` or `eager`. vocab_size: ids that the check may use; default the model's. Call it before
    compiling layers. Raises ModelError if the attention asked for is impossible.
    """
    chosen = _choose_attention(model, attention, vocab_size, say)
    problem = check_decomposition(LMLoss(model, chosen, has_head=True), vocab_size)
    if problem is not None:
        say(f"loss: whole logits of the model's own forward, because {problem}")
    return LMLoss(model, chosen, problem is None, chunk_bytes)


def leak_test(lm_loss: LMLoss, vocab_size: int | None = None) -> None:
    """Change one document and check that nothing changes in the others. Raises TrainingError if something does.

    Costs two forward passes over 32 tokens.
    """
    model = lm_loss.model
    batch = check_batch(model, vocab_size)
    first = CHECK_LENGTHS[0]
    ids = batch.input_ids.clone()
    ids[0, :first] = ids[0, :first].flip(0).roll(1)
    changed = replace(batch, input_ids=ids)
    with layers.evaluating(model):
        run = lm_loss.hidden_states if lm_loss.has_head else lm_loss.own_logits
        before, after = run(batch), run(changed)
    if (difference := _difference(after[first:], before[first:])) is not None:
        raise TrainingError(
            f"the leak test failed: changing one document moved the outputs of another by {difference:.1e} of their size. "
            f"{type(model).__name__} with attention {lm_loss.attention!r} sees across documents. "
            "Set data.document_mask to false to train that way, or choose another model.attention."
        )


def check_decomposition(lm_loss: LMLoss, vocab_size: int | None = None) -> str | None:
    """None if head(hidden states) equals the model's own logits on a few tokens; otherwise what differs, for a message."""
    model = lm_loss.model
    name = type(model).__name__
    try:
        head = read_head(model)
    except ModelError as error:
        return str(error)
    batch = check_batch(model, vocab_size)
    with layers.evaluating(model):
        own_NV = lm_loss.own_logits(batch)
        has_base = getattr(model, "base_model", model) is not model
        hidden_ND = lm_loss.hidden_states(batch) if has_base else None
        if hidden_ND is None or (own_NV.shape[-1], hidden_ND.shape[-1]) != head.weight.shape:
            return f"the hidden states of {name} do not fit its output layer"
        difference = _difference(head.logits(hidden_ND), own_NV)
    if difference is not None:
        return f"{name}'s logits are not its output layer applied to its hidden states ({difference:.1e})"
    return None


# ---- attention ----


def _choose_attention(model: nn.Module, wished: str, vocab_size: int | None, say: Say) -> str:
    if wished in ("auto", "document"):
        problem = _document_problem(model, vocab_size)
        if problem is None:
            return "document"
        if wished == "document":
            raise ModelError(f"model.attention=document: {problem}. Use model.attention: auto")
        fallback = _set_attention(model, "sdpa")
        say(f"attention: {fallback} with restarting position_ids, not document by document: {problem}")
        return fallback
    chosen = _set_attention(model, wished)
    if chosen != wished:
        say(f"attention: {chosen}, because the model offers no {wished}")
    return chosen


def _set_attention(model: nn.Module, name: str) -> str:
    """Set transformers' implementation. Returns the one now in effect, `own` for a model that has none."""
    config = getattr(model, "config", None)
    if not hasattr(model, "set_attn_implementation") or not hasattr(config, "_attn_implementation"):
        return "own"
    try:
        model.set_attn_implementation(name)  # type: ignore[operator]
    except ValueError:  # the family has no sdpa
        model.set_attn_implementation("eager")  # type: ignore[operator]
    return str(config._attn_implementation)  # type: ignore[union-attr]


def _document_problem(model: nn.Module, vocab_size: int | None) -> str | None:
    """Enable document attention and compare it with documents run one by one. Returns None, or why it cannot be used."""
    reason = enable_document_attention(model)
    if reason is not None:
        return reason
    batch = check_batch(model, vocab_size)
    try:
        with layers.evaluating(model):
            packed_NV = LMLoss(model, "document", has_head=False).own_logits(batch)
            alone = LMLoss(model, "sdpa", has_head=False)
            parts = batch.input_ids.view(1, -1).split(CHECK_LENGTHS, dim=1)
            alone_NV = torch.cat([alone.own_logits(_batch(part_1T, (part_1T.shape[1],))) for part_1T in parts])
    except ModelError as error:
        return str(error)
    if (difference := _difference(packed_NV, alone_NV)) is not None:
        return f"packed documents give other logits than the same documents alone ({difference:.1e})"
    return None


# ---- small parts ----


def check_batch(model: nn.Module, vocab_size: int | None) -> Batch:
    """Two rows of 16 tokens in three documents. Draws no random numbers. Raises ModelError without a vocabulary size."""
    vocab_size = vocab_size or layers.vocab_size(model)
    if vocab_size is None:
        raise ModelError(f"{type(model).__name__} has neither config.vocab_size nor an embedding; pass vocab_size")
    ids = (torch.arange(sum(CHECK_LENGTHS), device=layers.compute_device(model)) * 7919 + 13) % vocab_size  # any ids do
    return _batch(ids.view(2, 16), CHECK_LENGTHS)


def _batch(ids_BT: Tensor, lengths: tuple[int, ...]) -> Batch:
    """A batch without labels of documents of these lengths."""
    device = ids_BT.device
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    return Batch(
        input_ids=ids_BT,
        labels=torch.full_like(ids_BT, IGNORE_INDEX),
        position_ids=positions.view(ids_BT.shape),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device),
        max_seqlen=max(lengths),
        source_ids=torch.zeros(len(ids_BT), dtype=torch.int32),
    )


def _difference(left: Tensor, right: Tensor) -> float | None:
    """The largest difference relative to the largest number of `right`; None where its dtype explains it."""
    scale = right.float().abs().max().clamp_min(1e-20)
    difference = float((left.float() - right.float()).abs().max() / scale)
    return difference if difference > CHECK_TOLERANCE.get(right.dtype, 5e-2) else None
