"""Questions to a model on 32 tokens, which show how it treats packed documents before anything is trained on them.

In: a model and how it is to be run. Out: what is wrong, in words, or None. Main choice: questions whose answers small weights
cannot hide. The outputs of every module are compared in their own size, not the logits alone, to which a fresh layer adds almost
nothing; and the gradient from one token to another is exactly zero or there is a way between them, whatever its size and in any
dtype. Weakness: only ways through the token embeddings are seen, and choices such as that of an expert have no gradient;
`leak_test` of `attention_choice` changes tokens as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from steep.batch import IGNORE_INDEX, Batch
from steep.core.errors import ModelError
from steep.models import layers
from steep.models.lm_loss import LMLoss

CHECK_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of two computations of the same numbers, relative to the largest of them. Kernels that sum in another order
differ by far less; a wrong head or a leaking document differs by a large part of 1."""

HALF = (torch.bfloat16, torch.float16)

CHECK_LENGTHS = (7, 9, 16)
"""Tokens of the documents that the checks use: two in the first row of 16, one in the second."""


def check_batch(model: nn.Module, vocab_size: int | None) -> Batch:
    """Two rows of 16 tokens in three documents. Draws no random numbers. Raises ModelError without a vocabulary size."""
    vocab_size = vocab_size or layers.vocab_size(model)
    if vocab_size is None:
        raise ModelError(f"{type(model).__name__} has neither config.vocab_size nor an embedding; pass vocab_size")
    ids = (torch.arange(sum(CHECK_LENGTHS), device=layers.compute_device(model)) * 7919 + 13) % vocab_size  # any ids do
    return _batch(ids.view(2, 16), CHECK_LENGTHS)


def one_document(model: nn.Module, tokens: int, vocab_size: int | None) -> Batch:
    """A row of one document of so many tokens. Raises ModelError as `check_batch`."""
    ids = check_batch(model, vocab_size).input_ids.view(1, -1)
    return _batch(ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens], (tokens,))


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


def difference(left: Tensor, right: Tensor) -> float | None:
    """The largest difference relative to the largest number of `right`; None where its dtype explains it."""
    scale = right.float().abs().max().clamp_min(1e-20)
    found = float((left.float() - right.float()).abs().max() / scale)
    return found if found > CHECK_TOLERANCE.get(right.dtype, 5e-2) else None


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """No autocast inside, where all weights are fp32. Half-precision weights beside fp32 ones (of an adapter) need it."""
    half = any(parameter.dtype in HALF for parameter in model.parameters())
    with nullcontext() if half else torch.autocast(layers.compute_device(model).type, enabled=False):
        yield


# ---- packed and alone ----


def packing_problem(packed: LMLoss, vocab_size: int | None) -> str | None:
    """None if packed documents give, in every module, what the same documents give one by one; else what differs."""
    model = packed.model
    batch = check_batch(model, vocab_size)
    alone = LMLoss(model, "own" if packed.attention == "own" else "sdpa", has_head=False)
    alone.gives_positions = False  # as the model is served
    with layers.evaluating(model):
        together = _module_outputs(model, lambda: packed.own_logits(batch), sum(CHECK_LENGTHS))
        parts = []
        for ids_1T in batch.input_ids.view(1, -1).split(CHECK_LENGTHS, dim=1):
            one = _batch(ids_1T, (ids_1T.shape[1],))
            parts.append(_module_outputs(model, lambda one=one: alone.own_logits(one), ids_1T.shape[1]))  # type: ignore[misc]
    dtype = _coarsest_dtype([output for outputs in together.values() for output in outputs])
    for name, outputs in together.items():
        calls = [part.get(name, []) for part in parts]
        for number, output in enumerate(outputs):
            separate = [call[number] for call in calls if len(call) == len(outputs)]
            expected = torch.cat(separate) if len(separate) == len(parts) else None
            if expected is None or expected.shape != output.shape:
                continue
            if (found := _typical_difference(output, expected, dtype)) is not None:
                where = "logits" if name == LOGITS else f"outputs of {name}"
                return f"packed documents give other {where} than the same documents alone ({found:.1e})"
    return None


LOGITS = "logits"


def _module_outputs(model: nn.Module, run: Callable[[], Tensor], tokens: int) -> dict[str, list[Tensor]]:
    """(tokens, ...) for each call of each module that gives so many rows; the result of `run` comes last."""
    outputs: dict[str, list[Tensor]] = {}

    def see(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            found = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(found, Tensor) and found.is_floating_point() and found.ndim >= 3:
                flat = found.detach().flatten(0, 1)
                outputs.setdefault(name, []).append(flat.clone() if len(flat) == tokens else flat.new_zeros(0))

        return hook

    handles = [module.register_forward_hook(see(name)) for name, module in model.named_modules() if name]
    try:
        logits = run()
    finally:
        for handle in handles:
            handle.remove()
    return {**outputs, LOGITS: [logits]}


def _coarsest_dtype(outputs: list[Tensor]) -> torch.dtype:
    """The dtype that rounds most: under autocast a norm gives fp32 numbers that bf16 products have rounded."""
    return max((output.dtype for output in outputs), key=lambda dtype: CHECK_TOLERANCE.get(dtype, 0.0))


def _typical_difference(left: Tensor, right: Tensor, dtype: torch.dtype) -> float | None:
    """As `difference`, of numbers computed in `dtype`. In half precision that of the median token: rounding may send one to
    another expert."""
    if right.numel() == 0 or dtype not in HALF:
        return difference(left, right) if right.numel() else None
    rows = (left.float() - right.float()).flatten(1).abs().amax(1)
    found = float(rows.median() / right.float().abs().max().clamp_min(1e-20))
    return found if found > CHECK_TOLERANCE[dtype] else None


# ---- who influences whom ----


def leak(lm_loss: LMLoss, vocab_size: int | None) -> float | None:
    """The largest gradient from a token to an output of a later document; None if there is none, or no way to see one."""
    first, second, last = itertools.accumulate(CHECK_LENGTHS)
    found = _influences(lm_loss, vocab_size, [((0, first), (first, last)), ((first, second), (second, last))])
    return max(found) or None


def look_ahead(lm_loss: LMLoss, vocab_size: int | None) -> float | None:
    """The largest gradient from a token to an output before it in the same document; None as for `leak`."""
    start, stop = sum(CHECK_LENGTHS[:2]), sum(CHECK_LENGTHS)
    half = (start + stop) // 2
    return max(_influences(lm_loss, vocab_size, [((half, stop), (start, half))])) or None


Span = tuple[int, int]
"""From one of the flattened tokens to before another."""


def _influences(lm_loss: LMLoss, vocab_size: int | None, spans: list[tuple[Span, Span]]) -> list[float]:
    """The largest gradient from the embeddings of the tokens in the first span of each pair to the outputs in the second; 0 where
    it cannot be seen."""
    model = lm_loss.model
    batch = check_batch(model, vocab_size)
    if lm_loss.apart:  # rows of one length stay in their order
        batch = _batch(batch.input_ids, (16, 16))
    leaves: list[Tensor] = []

    def cut(module: nn.Module, arguments: Any, output: Any) -> Any:
        ids = arguments[0] if arguments else None
        if not isinstance(ids, Tensor) or not isinstance(output, Tensor) or ids.is_floating_point():
            return None
        if ids.numel() != batch.input_ids.numel() or not torch.equal(ids.flatten(), batch.input_ids.flatten()):
            return None
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # which the model may change in place

    tables: dict[int, nn.Module] = {
        id(module): module for module in model.modules() if isinstance(module, nn.Embedding)
    }
    if isinstance(named := layers.input_layer(model), nn.Module):
        tables[id(named)] = named
    handles = [table.register_forward_hook(cut) for table in tables.values()]
    try:
        with layers.evaluating(model), torch.enable_grad():
            outputs = lm_loss.hidden_states(batch) if lm_loss.has_head else lm_loss.own_logits(batch)
            return [_gradient(outputs[slice(*to)], leaves, slice(*of), len(outputs)) for of, to in spans]
    finally:
        for handle in handles:
            handle.remove()


def _gradient(outputs_KD: Tensor, leaves: list[Tensor], rows: slice, tokens: int) -> float:
    """The largest gradient of a mixed sum of `outputs_KD` by rows of `leaves`, which have one for each of the tokens."""
    if not leaves or not outputs_KD.requires_grad:
        return 0.0
    mixed = torch.sin(torch.arange(outputs_KD.numel(), device=outputs_KD.device) * 0.7 + 1.0).view(outputs_KD.shape)
    gradients = torch.autograd.grad((outputs_KD.float() * mixed).sum(), leaves, retain_graph=True, allow_unused=True)
    sizes = [gradient.reshape(tokens, -1)[rows].float().abs().max() for gradient in gradients if gradient is not None]
    return float(torch.nan_to_num(torch.stack(sizes).max())) if sizes else 0.0
