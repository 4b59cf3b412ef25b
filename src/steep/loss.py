"""Next-token cross-entropy from hidden states: the output head and the loss in chunks, so that logits never exist whole.

In: hidden states (N, D), the head's weight (V, D), labels (N,). Out: the summed loss, with gradients already computed in
the forward pass. Main choice: rows are processed in chunks whose logits fit `chunk_bytes`. Matrix products run on a
chunk in the compute dtype (bf16 under autocast); the softmax runs in fp32 on blocks of rows that fit the cache, and is
written back over the logits as their gradient. So one chunk of logits and one small fp32 block exist at a time.
Gradients computed in the forward need no second product with the head; versions that recompute the logits take
1.75 to 1.9 times the time of the loss (TRL #5575). torch 2.13's `F.linear_cross_entropy` has the same idea but sums
bf16 losses in bf16, so it reports wrong values.

Shapes: N rows (tokens, of a chunk or a block where the function says so), D width of the model, V vocabulary.
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
"""fp32 rows that the softmax works on at a time on a CPU. Several passes go over them, so they must stay in the cache.
Measured: 1, 2, 4 and 8 MiB equal within noise at V=49,152 on 2 AVX2 cores with 32 MiB of L3."""

ROW_ALIGNMENT_BYTES = 64
"""Rows of logits start on cache lines, an odd number of lines apart, so that the rows of a tile fall into different cache sets.
Measured in fp32 on one AVX2 core: the product that makes the logits runs at 79 GFLOP/s instead of 51 with 50,257 columns, at 82
instead of 61 with 49,152, and both backward products gain a tenth. GPUs need aligned rows as well."""

ALL_ROWS_RATIO = 0.9
"""From this share of labelled rows on, all rows are computed: leaving out a few saves little, and oneDNN keeps two thirds of a MB
for every number of rows that a bf16 product has seen."""

FP16_GRADIENT_SCALE = 1024.0
"""What the gradient of logits is multiplied by in fp16, and divided by in fp32 once it is summed: softmax probabilities are
around 1/V, below fp16's smallest normal number (6e-5), and the loss scale comes later. They are at most the head's multiplier,
so nothing overflows. Their products are summed into fp32, where a frequent token's gradient fits as well."""

WEIGHT_SLICE_ROWS = 4096
"""Vocabulary rows of the weight gradient computed at a time, so that the bf16 product is added to fp32 while still cached."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    multiplier: float = 1.0,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """(sum, losses): the SUM of -log p(label) over labels != -100, a scalar with gradients, and the loss of each row, (N,)
    without gradients and 0 where the label is -100. Both fp32 (fp64 for fp64 inputs).

    logits = multiplier * (hidden @ weight.T + bias), then softcap * tanh(logits / softcap) if softcap is given.
    hidden_ND: (N, D) floating; weight_VD: (V, D); labels_N: (N,) int64; bias: (V,) or None.
    chunk_bytes: logits that exist at a time, in bytes of the compute dtype; at least one row.
    Matrix products run in the autocast dtype where autocast is on, else in the widest dtype of the inputs; the softmax
    and every sum over rows run in fp32. Gradients are computed only for the inputs that require one.
    Weakness: the gradient of the weight takes V*D fp32 from the forward on; no second derivative.
    """
    with_grad = torch.is_grad_enabled()
    needs = [with_grad and tensor is not None and tensor.requires_grad for tensor in (hidden_ND, weight_VD, bias)]
    layout = _layout(hidden_ND, weight_VD, softcap, multiplier, chunk_bytes, needs)
    if not any(needs):
        losses_N = _run(layout, hidden_ND, weight_VD, bias, labels_N).losses_N
        return losses_N.sum(), losses_N
    both: tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(hidden_ND, weight_VD, bias, labels_N, layout)
    return both


@dataclass(frozen=True)
class _Layout:
    """What a call computes, in which dtypes and in how many rows at a time; decided before the first product."""

    compute_dtype: torch.dtype  # of logits and matrix products
    sum_dtype: torch.dtype  # of softmax, losses and accumulated gradients
    softcap: float | None
    multiplier: float
    chunk_rows: int
    block_rows: int
    gradient_scale: float  # of a chunk's logits, see FP16_GRADIENT_SCALE
    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool

    @property
    def needs_any(self) -> bool:
        return self.needs_hidden or self.needs_weight or self.needs_bias

    def hidden_grad_dtype(self, hidden_ND: Tensor) -> torch.dtype:
        """The dtype that the gradient of the hidden states is kept in until the backward pass."""
        return self.sum_dtype if self.compute_dtype == torch.float16 else hidden_ND.dtype


@dataclass
class _Result:
    losses_N: Tensor
    hidden_grad_ND: Tensor | None = None
    weight_grad_VD: Tensor | None = None
    bias_grad_V: Tensor | None = None


def _layout(
    hidden_ND: Tensor, weight_VD: Tensor, softcap: float | None, multiplier: float, chunk_bytes: int, needs: list[bool]
) -> _Layout:
    num_rows, vocabulary = hidden_ND.shape[0], weight_VD.shape[0]
    # The dtype that F.linear would compute in: autocast's where it is on (it does not change fp64), else the widest.
    compute_dtype = torch.promote_types(hidden_ND.dtype, weight_VD.dtype)
    if compute_dtype != torch.float64 and torch.is_autocast_enabled(hidden_ND.device.type):
        compute_dtype = torch.get_autocast_dtype(hidden_ND.device.type)
    sum_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
    # As few chunks as possible, of equal size: every chunk costs a pass over the weight's gradient, and products of few rows are
    # slow, so no small remainder is left.
    most_rows = max(1, chunk_bytes // (vocabulary * compute_dtype.itemsize))
    chunk_rows = math.ceil(num_rows / math.ceil(num_rows / most_rows)) if num_rows else 1
    block_bytes = CPU_BLOCK_BYTES if hidden_ND.device.type == "cpu" else chunk_bytes
    block_rows = min(chunk_rows, max(1, block_bytes // (vocabulary * sum_dtype.itemsize)))
    scale = FP16_GRADIENT_SCALE if compute_dtype == torch.float16 else 1.0
    return _Layout(compute_dtype, sum_dtype, softcap, multiplier, chunk_rows, block_rows, scale, *needs)


def _run(layout: _Layout, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor) -> _Result:
    """Losses and the gradients that `layout` asks for. On a CPU, many rows without a label cost nothing."""
    with torch.autocast(hidden_ND.device.type, enabled=False):
        if hidden_ND.device.type != "cpu":  # counting rows would wait for the device: there they get a zero gradient
            return _run_rows(layout, hidden_ND, weight_VD, bias_V, labels_N)
        kept_K = (labels_N != IGNORE_INDEX).nonzero().squeeze(1)
        if kept_K.numel() >= ALL_ROWS_RATIO * labels_N.numel():
            return _run_rows(layout, hidden_ND, weight_VD, bias_V, labels_N)
        result = _run_rows(layout, hidden_ND[kept_K], weight_VD, bias_V, labels_N[kept_K])
        result.losses_N = result.losses_N.new_zeros(labels_N.shape).index_copy_(0, kept_K, result.losses_N)
        if result.hidden_grad_ND is not None:
            result.hidden_grad_ND = torch.zeros_like(hidden_ND, dtype=result.hidden_grad_ND.dtype).index_copy_(
                0, kept_K, result.hidden_grad_ND
            )
        return result


def _run_rows(
    layout: _Layout, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor
) -> _Result:
    num_rows = hidden_ND.shape[0]
    # the first chunk writes the weight's gradient, so it is zeroed only where there is no row
    fill = torch.empty if num_rows else torch.zeros
    options: dict[str, Any] = {"dtype": layout.sum_dtype, "device": hidden_ND.device}
    result = _Result(
        losses_N=torch.empty(num_rows, **options),
        # in fp32 beside fp16 products: the loss scale comes only in the backward pass
        hidden_grad_ND=torch.empty_like(hidden_ND, dtype=layout.hidden_grad_dtype(hidden_ND))
        if layout.needs_hidden
        else None,
        weight_grad_VD=fill(weight_VD.shape, **options) if layout.needs_weight else None,
        bias_grad_V=torch.zeros(bias_V.shape, **options) if layout.needs_bias and bias_V is not None else None,
    )
    weight_VD = weight_VD.detach().to(layout.compute_dtype)  # one copy per call, where the dtypes differ
    bias_V = None if bias_V is None else bias_V.detach().to(layout.compute_dtype)
    hidden_ND = hidden_ND.detach().to(layout.compute_dtype)
    buffer_NV = _aligned_rows(min(layout.chunk_rows, num_rows), weight_VD.shape[0], hidden_ND)
    for start in range(0, num_rows, layout.chunk_rows):
        rows = slice(start, min(start + layout.chunk_rows, num_rows))
        logits_NV = buffer_NV[: rows.stop - start]
        if bias_V is None:
            torch.mm(hidden_ND[rows], weight_VD.t(), out=logits_NV)
        else:
            torch.addmm(bias_V, hidden_ND[rows], weight_VD.t(), out=logits_NV)
        _softmax_blocks(layout, logits_NV, labels_N[rows], result.losses_N[rows])
        _chunk_gradients(result, logits_NV, hidden_ND[rows], weight_VD, rows)
    if layout.gradient_scale != 1.0:
        for gradient in (result.hidden_grad_ND, result.weight_grad_VD, result.bias_grad_V):
            if gradient is not None:
                gradient.div_(layout.gradient_scale)
    return result


def _aligned_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    """An uninitialised (rows, columns) view whose rows lie an odd number of ROW_ALIGNMENT_BYTES apart."""
    per_line = ROW_ALIGNMENT_BYTES // like.element_size()
    lines = math.ceil(columns / per_line) | 1
    return like.new_empty(rows, lines * per_line)[:, :columns]


def _softmax_blocks(layout: _Layout, logits_NV: Tensor, labels_N: Tensor, losses_N: Tensor) -> None:
    """Fill `losses_N` from a chunk's logits and, if gradients are needed, overwrite the logits with theirs, block by block."""
    for start in range(0, logits_NV.shape[0], layout.block_rows):
        rows = slice(start, start + layout.block_rows)
        block_NV = logits_NV[rows].to(layout.sum_dtype)  # the logits themselves where they are fp32 already
        losses_N[rows] = _softmax_block(layout, block_NV, labels_N[rows])
        if layout.needs_any and block_NV.dtype != logits_NV.dtype:
            logits_NV[rows] = block_NV if layout.gradient_scale == 1.0 else block_NV.mul_(layout.gradient_scale)


def _softmax_block(layout: _Layout, block_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Losses (N,) of a block of logits, which is overwritten: by their gradient if `layout` needs any, else by scratch.

    With m the multiplier, c the softcap and y the label of a row: z = c tanh(m logits / c), or m logits without a softcap.
    loss = log sum_v exp(z_v) - z_y, and dloss / dlogits_v = (softmax(z)_v - [v = y]) (1 - tanh^2) m.
    """
    tanh_NV = None
    if layout.multiplier != 1.0:
        block_NV.mul_(layout.multiplier)
    if layout.softcap is not None:
        tanh_NV = block_NV.div_(layout.softcap).tanh_().clone()
        block_NV.mul_(layout.softcap)
    labelled_N = labels_N != IGNORE_INDEX
    targets_N1 = labels_N.clamp_min(0).unsqueeze(1)
    target_logits_N = block_NV.gather(1, targets_N1).squeeze(1)  # z_y
    maximum_N1 = block_NV.amax(dim=1, keepdim=True)
    exponentials_NV = block_NV.sub_(maximum_N1).exp_()  # exp(z - max z), so that nothing overflows
    total_N1 = exponentials_NV.sum(dim=1, keepdim=True)
    losses_N = total_N1.log().add_(maximum_N1).squeeze(1).sub_(target_logits_N).mul_(labelled_N)
    if layout.needs_any:
        weight_N1 = labelled_N.unsqueeze(1).to(block_NV.dtype)  # zero gradient for rows without a label
        exponentials_NV.mul_(weight_N1 / total_N1).scatter_add_(1, targets_N1, -weight_N1)  # softmax - [v = y]
        if tanh_NV is not None:
            exponentials_NV.mul_(tanh_NV.square_().neg_().add_(1.0))  # d(c tanh(x / c)) / dx = 1 - tanh^2
        if layout.multiplier != 1.0:
            exponentials_NV.mul_(layout.multiplier)
    return losses_N


def _chunk_gradients(
    result: _Result, logits_grad_NV: Tensor, hidden_ND: Tensor, weight_VD: Tensor, rows: slice
) -> None:
    """Add one chunk's share of the gradients: products in the compute dtype, sums over chunks in fp32."""
    if result.hidden_grad_ND is not None:
        result.hidden_grad_ND[rows] = _product(logits_grad_NV, weight_VD)
    if result.bias_grad_V is not None:
        result.bias_grad_V += logits_grad_NV.sum(dim=0, dtype=result.bias_grad_V.dtype)
    if result.weight_grad_VD is not None:
        _add_weight_gradient(result.weight_grad_VD, logits_grad_NV, hidden_ND, first=rows.start == 0)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in their dtype; of fp16 in fp32, since a sum over many rows does not fit fp16."""
    if left.dtype != torch.float16:
        return torch.mm(left, right)
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else torch.mm(left.float(), right.float())


def _add_weight_gradient(weight_grad_VD: Tensor, logits_grad_NV: Tensor, hidden_ND: Tensor, first: bool) -> None:
    """weight_grad += logits_grad.T @ hidden; the first chunk writes it."""
    if logits_grad_NV.dtype == weight_grad_VD.dtype:
        torch.addmm(weight_grad_VD, logits_grad_NV.t(), hidden_ND, beta=0 if first else 1, out=weight_grad_VD)
        return
    step = WEIGHT_SLICE_ROWS if logits_grad_NV.device.type == "cpu" else weight_grad_VD.shape[0]
    for start in range(0, weight_grad_VD.shape[0], step):
        part = weight_grad_VD[start : start + step]
        product = _product(logits_grad_NV[:, start : start + step].t(), hidden_ND)
        part.copy_(product) if first else part.add_(product)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients of the sum are computed in forward; backward returns them, scaled by the incoming gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, layout: _Layout
    ) -> tuple[Tensor, Tensor]:
        result = _run(layout, hidden_ND, weight_VD, bias_V, labels_N)
        ctx.save_for_backward(result.hidden_grad_ND, result.weight_grad_VD, result.bias_grad_V)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(result.losses_N)
        return result.losses_N.sum(), result.losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        factor, kept = grad_outputs[0], _graph_is_kept()
        scaled = [None if g is None else g * factor if kept else g.mul_(factor) for g in ctx.saved_tensors]
        typed = [None if s is None else s.to(dtype) for s, dtype in zip(scaled, ctx.dtypes, strict=True)]
        return *typed, None, None


def _graph_is_kept() -> bool:
    """Whether this backward runs with retain_graph=True, so that saved gradients may be needed again.

    Scaling in place saves a second V*D fp32 tensor. Where torch does not tell, the graph counts as kept.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
