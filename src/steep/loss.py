"""Next-token cross-entropy from hidden states: the output head and the loss in chunks, logits never whole.

In: hidden states (N, D), the head's weight (V, D), labels (N,). Out: the summed loss, with gradients already made in
the forward pass. Main choice: rows are processed in chunks whose logits fit `chunk_bytes`; matrix products run on a
chunk in the compute dtype (bf16 under autocast), the softmax in fp32 on blocks of rows that fit the cache and is
written back over the logits as their gradient, so one chunk of logits and one small fp32 block exist at a time.
Making gradients in the forward needs no second product with the head, where recomputing versions do
(1.75 to 1.9 times the time of the loss: TRL #5575). torch 2.13's `F.linear_cross_entropy` has the same idea but sums
bf16 losses in bf16, so it reports wrong values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from steep.batch import IGNORE_INDEX

DEFAULT_CHUNK_BYTES = 64 * 2**20

CPU_BLOCK_BYTES = 4 * 2**20
"""fp32 rows that the softmax works on at a time on a CPU. Several passes go over them, so they must stay in the cache:
1, 2, 4 and 8 MiB measured equal within noise at V=49,152 on 2 AVX2 cores with 32 MiB of L3."""

ROW_ALIGNMENT_BYTES = 64
"""Rows of logits start on cache lines, an odd number of lines apart, so that the rows of a tile fall into different cache sets.
Measured fp32 on one AVX2 core: the logits' product 79 GFLOP/s where 50,257 columns packed tightly give 51, and 82 for 61 at
49,152 columns; both backward products gain a tenth. GPUs ask for aligned rows as well."""

MOST_ROWS = 0.9
"""From this share of labelled rows on all rows are taken: leaving a few out saves little, and oneDNN keeps two thirds of a MB for
every number of rows that a bf16 product has seen."""

WEIGHT_SLICE_ROWS = 4096
"""Vocabulary rows of the weight gradient made at a time, so that the bf16 product is added to fp32 while cached."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    multiplier: float = 1.0,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Tensor:
    """The SUM of -log p(label) over labels != -100, as an fp32 scalar (fp64 for fp64 inputs).

    logits = multiplier * (hidden @ weight.T + bias), then softcap * tanh(logits / softcap) if softcap is given.
    hidden_ND: (N, D) floating; weight_VD: (V, D); labels_N: (N,) int64; bias: (V,) or None.
    chunk_bytes: logits that exist at a time, in bytes of the compute dtype; at least one row.
    Matrix products run in the autocast dtype where autocast is on, else in the widest dtype of the inputs; the softmax
    and every sum over rows run in fp32. Gradients are made for the inputs that require one, and only for those.
    Weakness: the gradient of the weight takes V*D fp32 from the forward on; no second derivative.
    """
    loss, _ = linear_cross_entropy_with_losses(
        hidden_ND, weight_VD, labels_N, bias=bias, softcap=softcap, multiplier=multiplier, chunk_bytes=chunk_bytes
    )
    return loss


def linear_cross_entropy_with_losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    multiplier: float = 1.0,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """The sum of `linear_cross_entropy`, with gradients, and the loss of each token that it is made of, (N,) in the sum's dtype
    without gradients, 0 where the label is -100."""
    with_grad = torch.is_grad_enabled()
    needs = [with_grad and tensor is not None and tensor.requires_grad for tensor in (hidden_ND, weight_VD, bias)]
    plan = _plan(hidden_ND, weight_VD, softcap, multiplier, chunk_bytes, needs)
    if not any(needs):
        losses_N = _run(plan, hidden_ND, weight_VD, bias, labels_N).losses_N
        return losses_N.sum(), losses_N
    both: tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(hidden_ND, weight_VD, bias, labels_N, plan)
    return both


@torch.no_grad()
def token_losses(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    multiplier: float = 1.0,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> Tensor:
    """-log p(label) of each token, (N,) fp32 without gradients, 0 where the label is -100. See linear_cross_entropy."""
    plan = _plan(hidden_ND, weight_VD, softcap, multiplier, chunk_bytes, [False, False, False])
    return _run(plan, hidden_ND, weight_VD, bias, labels_N).losses_N


@dataclass(frozen=True)
class _Plan:
    """What a call does, decided before the first product."""

    compute_dtype: torch.dtype  # of logits and matrix products
    sum_dtype: torch.dtype  # of softmax, losses and accumulated gradients
    softcap: float | None
    multiplier: float
    chunk_rows: int
    block_rows: int
    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool

    @property
    def needs_any(self) -> bool:
        return self.needs_hidden or self.needs_weight or self.needs_bias


@dataclass
class _Result:
    losses_N: Tensor
    hidden_grad: Tensor | None = None
    weight_grad: Tensor | None = None
    bias_grad: Tensor | None = None


def _plan(
    hidden: Tensor, weight: Tensor, softcap: float | None, multiplier: float, chunk_bytes: int, needs: list[bool]
) -> _Plan:
    compute_dtype = _compute_dtype(hidden, weight)
    sum_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
    row_bytes = weight.shape[0] * compute_dtype.itemsize
    chunk_rows = _equal_chunks(hidden.shape[0], max(1, chunk_bytes // row_bytes))
    block_bytes = CPU_BLOCK_BYTES if hidden.device.type == "cpu" else chunk_bytes
    block_rows = min(chunk_rows, max(1, block_bytes // (weight.shape[0] * sum_dtype.itemsize)))
    return _Plan(compute_dtype, sum_dtype, softcap, multiplier, chunk_rows, block_rows, *needs)


def _equal_chunks(rows: int, most: int) -> int:
    """Rows per chunk, at most `most`: as many chunks as that takes, of equal size. Every chunk costs a pass over the weight's
    gradient, and products of few rows are slow, so no small remainder is left."""
    return max(1, math.ceil(rows / math.ceil(rows / most))) if rows else 1


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that F.linear would compute in: autocast's where it is on (it leaves fp64 alone), else the widest."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    device_type = hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return dtype


def _run(plan: _Plan, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> _Result:
    """Losses (N,) and the gradients that `plan` asks for. On a CPU many rows without a label cost nothing."""
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.device.type != "cpu":  # counting rows would wait for the device: there they get a zero gradient
            return _run_rows(plan, hidden, weight, bias, labels)
        kept = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        if kept.numel() >= MOST_ROWS * labels.numel():
            return _run_rows(plan, hidden, weight, bias, labels)
        result = _run_rows(plan, hidden[kept], weight, bias, labels[kept])
        result.losses_N = result.losses_N.new_zeros(labels.shape).index_copy_(0, kept, result.losses_N)
        if result.hidden_grad is not None:
            result.hidden_grad = torch.zeros_like(hidden).index_copy_(0, kept, result.hidden_grad)
        return result


def _run_rows(plan: _Plan, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> _Result:
    num_rows = hidden.shape[0]
    result = _allocate(plan, hidden, weight, bias)
    compute_weight = weight.detach().to(plan.compute_dtype)  # one copy per call, where the dtypes differ
    compute_bias = None if bias is None else bias.detach().to(plan.compute_dtype)
    compute_hidden = hidden.detach().to(plan.compute_dtype)
    buffer = _aligned_rows(min(plan.chunk_rows, num_rows), weight.shape[0], compute_hidden)
    for start in range(0, num_rows, plan.chunk_rows):
        rows = slice(start, min(start + plan.chunk_rows, num_rows))
        logits = buffer[: rows.stop - start]
        _product(compute_hidden[rows], compute_weight, compute_bias, logits)
        _softmax_blocks(plan, logits, labels[rows], result.losses_N[rows])
        _chunk_gradients(result, logits, compute_hidden[rows], compute_weight, rows)
    return result


def _aligned_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    """An uninitialised (rows, columns) view whose rows lie an odd number of ROW_ALIGNMENT_BYTES apart."""
    per_line = ROW_ALIGNMENT_BYTES // like.element_size()
    lines = math.ceil(columns / per_line) | 1
    return like.new_empty(rows, lines * per_line)[:, :columns]


def _allocate(plan: _Plan, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _Result:
    """Outputs. The weight's gradient is written, not added, by the first chunk, so it is not zeroed unless empty."""
    fill = torch.zeros if hidden.shape[0] == 0 else torch.empty
    options: dict[str, Any] = {"dtype": plan.sum_dtype, "device": hidden.device}
    return _Result(
        losses_N=torch.empty(hidden.shape[0], **options),
        hidden_grad=torch.empty_like(hidden) if plan.needs_hidden else None,
        weight_grad=fill(weight.shape, **options) if plan.needs_weight else None,
        bias_grad=torch.zeros(bias.shape, **options) if plan.needs_bias and bias is not None else None,
    )


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


def _softmax_blocks(plan: _Plan, logits: Tensor, labels: Tensor, losses: Tensor) -> None:
    """Fill `losses` from `logits` and, if gradients are wanted, overwrite `logits` with theirs, block by block."""
    for start in range(0, logits.shape[0], plan.block_rows):
        rows = slice(start, start + plan.block_rows)
        block = logits[rows].to(plan.sum_dtype)  # the logits themselves where they are fp32 already
        losses[rows] = _softmax_block(plan, block, labels[rows])
        if plan.needs_any and block.dtype != logits.dtype:
            logits[rows] = block


def _softmax_block(plan: _Plan, block_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Losses (N,) of a block of logits, which is overwritten: by their gradient if `plan` wants any, else by scratch."""
    tanh = None
    if plan.multiplier != 1.0:
        block_NV.mul_(plan.multiplier)
    if plan.softcap is not None:
        tanh = block_NV.div_(plan.softcap).tanh_().clone()
        block_NV.mul_(plan.softcap)
    labelled_N = labels_N != IGNORE_INDEX
    targets_N1 = labels_N.clamp_min(0).unsqueeze(1)
    target_logits = block_NV.gather(1, targets_N1).squeeze(1)
    maximum = block_NV.amax(dim=1, keepdim=True)
    exponentials = block_NV.sub_(maximum).exp_()
    total = exponentials.sum(dim=1, keepdim=True)
    losses = total.log().add_(maximum).squeeze(1).sub_(target_logits).mul_(labelled_N)
    if plan.needs_any:
        weight_N1 = labelled_N.unsqueeze(1).to(block_NV.dtype)  # zero gradient for rows without a label
        exponentials.mul_(weight_N1 / total).scatter_add_(1, targets_N1, -weight_N1)
        if tanh is not None:
            exponentials.mul_(tanh.square_().neg_().add_(1.0))
        if plan.multiplier != 1.0:
            exponentials.mul_(plan.multiplier)
    return losses


def _chunk_gradients(result: _Result, logits_grad: Tensor, hidden: Tensor, weight: Tensor, rows: slice) -> None:
    """Add one chunk's share of the gradients: products in the compute dtype, sums over chunks in fp32."""
    if result.hidden_grad is not None:
        result.hidden_grad[rows] = torch.mm(logits_grad, weight)
    if result.bias_grad is not None:
        result.bias_grad += logits_grad.sum(dim=0, dtype=result.bias_grad.dtype)
    if result.weight_grad is not None:
        _add_weight_gradient(result.weight_grad, logits_grad, hidden, first=rows.start == 0)


def _add_weight_gradient(weight_grad: Tensor, logits_grad: Tensor, hidden: Tensor, first: bool) -> None:
    if logits_grad.dtype == weight_grad.dtype:
        torch.addmm(weight_grad, logits_grad.t(), hidden, beta=0 if first else 1, out=weight_grad)
        return
    step = WEIGHT_SLICE_ROWS if logits_grad.device.type == "cpu" else weight_grad.shape[0]
    for start in range(0, weight_grad.shape[0], step):
        part = weight_grad[start : start + step]
        product = torch.mm(logits_grad[:, start : start + step].t(), hidden)
        part.copy_(product) if first else part.add_(product)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients of the sum are made in forward and handed out, scaled by the incoming gradient, in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        result = _run(plan, hidden, weight, bias, labels)
        ctx.save_for_backward(result.hidden_grad, result.weight_grad, result.bias_grad)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(result.losses_N)
        return result.losses_N.sum(), result.losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        in_place = not _graph_is_kept()
        scaled = [_scale(saved, grad_outputs[0], in_place) for saved in ctx.saved_tensors]
        typed = [None if s is None else s.to(dtype) for s, dtype in zip(scaled, ctx.dtypes, strict=True)]
        return *typed, None, None


def _scale(gradient: Tensor | None, factor: Tensor, in_place: bool) -> Tensor | None:
    if gradient is None:
        return None
    return gradient.mul_(factor) if in_place else gradient * factor


def _graph_is_kept() -> bool:
    """Whether this backward runs with retain_graph=True, so that saved gradients may be needed again.

    Scaling in place saves a second V*D fp32 tensor. Where torch does not tell, the graph counts as kept.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
