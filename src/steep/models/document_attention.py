"""Attention inside documents that are packed into one sequence, through transformers' AttentionInterface.

In: queries, keys and values of all tokens of a batch, flattened, and the documents' boundaries. Out: each token's attention over
its own document. On CUDA one varlen kernel (torch's, else flash-attn's); elsewhere the tokens are split into documents and each
goes through scaled_dot_product_attention, which is also less work than a masked L x L. Importing this changes nothing:
`enable_document_attention` adds the name to transformers' registry. Suffixes: L tokens of the batch, T tokens of a document,
B documents, N query heads, K key heads, H head size.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steep.core.errors import ModelError
from steep.models.autocast import to_autocast_dtype
from steep.models.layers import text_config, text_part

ATTENTION_NAME = "steep_document"

CUDA_VARLEN_MAX_HEAD = 256
"""Largest head size of the varlen kernels (flash-attn's limit)."""


def attend_documents(
    query_LNH: Tensor,
    key_LKH: Tensor,
    value_LKH: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    scale: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """(L, N, H): causal attention of each token over its own document, softmax(scale * q @ k.T) @ v.

    query_LNH: (L, N, H); key_LKH, value_LKH: (L, K, H), N a multiple of K. cu_seqlens: (documents + 1,) int32, from 0
    to L. max_seqlen: no document is longer; only CUDA uses it, and an upper bound is enough. scale: default H ** -0.5.
    sliding_window: a token sees itself and the sliding_window - 1 before it. softcap: scores become
    softcap * tanh(score / softcap), computed explicitly (Gemma 2). sinks_N: (N,), a score per head that takes its share of
    the softmax and has no value, computed explicitly too (gpt-oss).
    """
    # as autocast does for scaled_dot_product_attention: rotary embeddings leave queries fp32 beside bf16 values
    query, key, value = (to_autocast_dtype(tensor) for tensor in (query_LNH, key_LKH, value_LKH))
    rule = _Rule(scale, dropout, sliding_window, softcap, sinks_N)
    if _varlen_fits(query, value, rule):
        return _varlen(query, key, value, cu_seqlens, max_seqlen, scale, sliding_window)
    return _split_attention(query, key, value, cu_seqlens, rule)


# ---- document by document ----


class _Rule(NamedTuple):
    """How scores become weights: see attend_documents."""

    scale: float | None
    dropout: float
    sliding_window: int | None
    softcap: float | None
    sinks_N: Tensor | None = None

    @property
    def is_explicit(self) -> bool:
        """Whether scaled_dot_product_attention has no argument for a part of it."""
        return self.softcap is not None or self.sinks_N is not None


@torch.compiler.disable
def _split_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, rule: _Rule) -> Tensor:
    """Consecutive documents of equal length go as one batch; the others one by one.

    The backward pass of torch.split is one concatenation; indexing would write a full tensor of zeros for each document.
    """
    lengths = [stop - start for start, stop in itertools.pairwise(cu_seqlens.tolist()) if stop > start]
    rounds = query.dtype == torch.bfloat16 and query.device.type == "cpu"
    rounded = [_rounded(length) for length in lengths] if rounds else lengths
    moves = None if rounded == lengths else _moves(lengths, rounded)
    if moves is not None:
        rounded = sorted(rounded)
        query, key, value = (_Moved.apply(tensor, moves, sum(rounded)) for tensor in (query, key, value))
    runs = [(length, len(list(group))) for length, group in itertools.groupby(rounded)]
    sizes = [length * count for length, count in runs]
    parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), runs, strict=True)
    outputs = []
    for q, k, v, (length, count) in parts:
        shaped = [x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]  # (B*T, N, H) -> (B, N, T, H)
        out_BNTH = _attend_equal(shaped[0], shaped[1], shaped[2], rule)
        outputs.append(out_BNTH.transpose(1, 2).reshape(count * length, *out_BNTH.shape[1:2], out_BNTH.shape[3]))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if moves is None:
        return output
    back: Tensor = _Moved.apply(output, [(to, start, length) for start, to, length in moves], sum(lengths))
    return back


# ---- documents of rounded lengths (bf16 on a CPU) ----

SMALLEST_STEP, STEPS_PER_DOUBLING = 16, 8
"""oneDNN's bf16 kernels keep about 5 MB for every length that a backward pass has seen, and never free it (torch 2.13; fp32 keeps
none): a run of SmolLM2-135M on documents of natural lengths grew by 60 MB a step. With lengths rounded up to eight per doubling,
a window of 1,024 tokens has 32 of them. Documents of 200 tokens take 5 % more memory and 9 % more work in attention, those of
20 tokens 35 % and 80 %. Padding comes after a document, where causal attention does not look."""


def _rounded(length: int) -> int:
    step = max(SMALLEST_STEP, (1 << (length - 1).bit_length()) // (2 * STEPS_PER_DOUBLING))
    return -(-length // step) * step


def _moves(lengths: list[int], rounded: list[int]) -> list[tuple[int, int, int]]:
    """(from row, to row, rows) of each document, sorted so that those of equal rounded length are side by side."""
    starts = list(itertools.accumulate(lengths, initial=0))
    order = sorted(range(len(lengths)), key=rounded.__getitem__)
    targets = itertools.accumulate((rounded[number] for number in order), initial=0)
    return [(starts[number], target, lengths[number]) for number, target in zip(order, targets, strict=False)]


class _Moved(torch.autograd.Function):
    """Blocks of rows moved, with zeros between them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, moves: list[tuple[int, int, int]], rows: int) -> Tensor:
        ctx.moves, ctx.rows = moves, tensor.shape[0]
        return _move(tensor, moves, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _move(gradients[0], [(to, start, length) for start, to, length in ctx.moves], ctx.rows), None, None


def _move(tensor: Tensor, moves: list[tuple[int, int, int]], rows: int) -> Tensor:
    moved = tensor.new_zeros(rows, *tensor.shape[1:])
    for start, to, length in moves:
        moved[to : to + length] = tensor[start : start + length]
    return moved


def _attend_equal(query: Tensor, key: Tensor, value: Tensor, rule: _Rule) -> Tensor:
    """Causal attention over documents of one length: (B, N, T, H), (B, K, T, H) -> (B, N, T, H)."""
    length = query.shape[2]
    window = rule.sliding_window if rule.sliding_window is not None and rule.sliding_window < length else None
    if rule.is_explicit:
        return _explicit(query, key, value, _band(length, window, query.device), rule)
    mask = None if window is None else _band(length, window, query.device)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=rule.dropout, is_causal=mask is None, scale=rule.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """(T, T) bool, True where query t may see key s: s <= t and, with a window, t - s < window."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return mask if window is None else mask.triu_(1 - window)


def _explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rule: _Rule) -> Tensor:
    """Soft caps and sinks as transformers' eager Gemma 2 and gpt-oss compute them; softmax in fp32, T * T memory.

    (B, N, T, H), (B, K, S, H), a mask that broadcasts to (B, N, T, S), true where a key is seen -> (B, N, T, H).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    factor = query.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    scores_BNTS = torch.matmul(query, key.transpose(2, 3)) * factor
    if rule.softcap is not None:
        scores_BNTS = torch.tanh(scores_BNTS / rule.softcap) * rule.softcap
    scores_BNTS = scores_BNTS.masked_fill(~mask, float("-inf"))
    if rule.sinks_N is not None:
        sinks = rule.sinks_N.to(scores_BNTS.dtype).view(1, -1, 1, 1).expand(*scores_BNTS.shape[:3], 1)
        scores_BNTS = torch.cat([scores_BNTS, sinks], dim=-1)
    weights = F.softmax(scores_BNTS, dim=-1, dtype=torch.float32)[..., : key.shape[2]].to(query.dtype)
    return torch.matmul(F.dropout(weights, p=rule.dropout), value)


# ---- one varlen kernel (CUDA) ----


VARLEN_MODULES = {"torch": "torch.nn.attention.varlen", "flash_attn": "flash_attn"}
VARLEN_KERNEL = next((kernel for kernel, name in VARLEN_MODULES.items() if importlib.util.find_spec(name)), None)
"""The varlen kernel of this installation: "torch", "flash_attn" or None. A constant, so that torch.compile can fold it."""


def _gqa_argument() -> dict[str, bool]:
    if VARLEN_KERNEL != "torch":
        return {}
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


VARLEN_GQA = _gqa_argument()
"""How torch's kernel is told that there are fewer key heads than query heads; older versions detect it."""


def _varlen_fits(query: Tensor, value: Tensor, rule: _Rule) -> bool:
    if query.device.type != "cuda" or VARLEN_KERNEL is None or rule.dropout > 0 or rule.is_explicit:
        return False
    half = query.dtype in (torch.float16, torch.bfloat16)
    heads_fit = query.shape[-1] == value.shape[-1] <= CUDA_VARLEN_MAX_HEAD
    return half and heads_fit and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    """The whole batch in one launch. Both kernels count a window as the tokens BEFORE the query: window - 1."""
    left = -1 if window is None else window - 1
    if VARLEN_KERNEL == "torch":
        from torch.nn.attention.varlen import varlen_attn

        extra: dict[str, Any] = VARLEN_GQA if query.shape[1] != key.shape[1] else {}
        out = varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=(left, 0), **extra
        )
        assert isinstance(out, Tensor)
        return out
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    flash: Tensor = flash_attn_varlen_func(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest,
        softmax_scale=scale, causal=True, window_size=(left, 0),
    )  # fmt: skip
    return flash


# ---- transformers ----


def document_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | str | None = "not given",
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: (1, N, L, H), (1, K, L, H) -> (1, L, N, H).

    With `cu_seqlens` the batch is one flattened row of documents and `attention_mask` is not read. Without it
    (generation, scoring a plain batch) this is transformers' own sdpa. s_aux: (N,), transformers' name for attention sinks.
    Raises ModelError for what it cannot compute.
    """
    if cu_seqlens is None and (softcap is not None or s_aux is not None):  # which transformers' sdpa does not compute
        if attention_mask is None:  # causal: a single query after cached keys sees all of them
            attention_mask = _band(key.shape[2], None, key.device)[key.shape[2] - query.shape[2] :]
        rule = _Rule(scaling, dropout, None, softcap, s_aux)
        return _explicit(query, key, value, attention_mask, rule).transpose(1, 2), None
    if cu_seqlens is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0], None
    _check_computable(module, query, sliding_window, kwargs)
    window = sliding_window if isinstance(sliding_window, int) else None
    out_LNH = attend_documents(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), cu_seqlens,
        max_seqlen=query.shape[2] if max_seqlen is None else max_seqlen,
        scale=scaling, dropout=dropout, sliding_window=window, softcap=softcap, sinks_N=s_aux,
    )  # fmt: skip
    return out_LNH.unsqueeze(0), None


UNKNOWN_PARTS = {
    "position_bias": "a position bias",
    "sinks": "several sinks for each key",
    "indices": "attention to chosen keys only",
    "block_indices": "attention to chosen blocks of keys only",
}
"""Arguments with which families of transformers ask their attention for more -> what that is."""


def _check_computable(module: nn.Module, query: Tensor, window: int | str | None, kwargs: dict[str, Any]) -> None:
    if query.shape[0] != 1:
        raise ModelError(f"document attention takes one flattened row of tokens, not {query.shape[0]}")
    for name, what in UNKNOWN_PARTS.items():
        if kwargs.get(name) is not None:
            raise ModelError(f"document attention does not compute {what}")
    config = getattr(module, "config", None)
    has_window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if window == "not given" and has_window:
        raise ModelError("this model gives its sliding window in its mask only, which document attention does not read")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ModelError("document attention is causal, this layer is not")


def placeholder_mask(device: torch.device) -> Tensor:
    """The attention_mask to pass together with cu_seqlens; nothing reads it.

    transformers passes a 4D mask on unchanged. It then neither builds an L x L mask over all tokens of the batch nor waits for
    the device to find padding and packed positions.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def use_own_attention(model: Any) -> None:
    """Undo `enable_document_attention`: the attention that transformers would choose for a model that it loads."""
    part: Any = text_part(model)
    if getattr(getattr(part, "config", None), "_attn_implementation", None) == ATTENTION_NAME:
        part.set_attn_implementation(part.get_correct_attn_implementation(None))


def enable_document_attention(model: nn.Module) -> str | None:
    """Make `model` take cu_seqlens. Returns None, or the reason why it cannot: then pass restarting position_ids instead.

    Of a model that also sees or hears, the part that reads text is set: the whole's configuration may say what that part does not
    do. None is a claim about the interface only; `steep.models.attention_choice.prepare_lm_loss` compares numbers.
    """
    reason, part = document_obstacle(model), text_part(model)
    config: Any = getattr(part, "config", None)
    if reason is not None or config._attn_implementation == ATTENTION_NAME:
        return reason
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION_NAME, document_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)  # for batches without cu_seqlens, e.g. generation
    part.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]
    return None if config._attn_implementation == ATTENTION_NAME else f"{type(part).__name__} did not take it"


def document_obstacle(model: nn.Module) -> str | None:
    """The reason why a model cannot take document attention, or None."""
    part = text_part(model)
    if not getattr(part, "_supports_attention_backend", False) or not hasattr(part, "set_attn_implementation"):
        return f"{type(part).__name__} does not use transformers' AttentionInterface"
    text = text_config(model)
    if getattr(text, "is_encoder_decoder", False) or getattr(text, "is_causal", True) is False:
        return "its attention is not causal"
    if getattr(text, "attention_chunk_size", None):
        return "it attends in chunks"
    layer_types = set(getattr(text, "layer_types", None) or [])
    foreign = sorted(layer_types - {"full_attention", "sliding_attention"})
    if foreign:
        return f"its layers of type {', '.join(foreign)} do more than causal attention"
    return None
