"""In which precision a model is computed, and which dtypes follow from that."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from steep.core.errors import ConfigError
from steep.core.say import Say, say_nothing
from steep.runtime.cpu_speed import cpu_speed
from steep.runtime.device import default_threads

if TYPE_CHECKING:
    import torch


PRECISIONS = ("auto", "mixed_bf16", "mixed_fp16", "bf16", "fp32")

AUTOCAST_DTYPES = {"mixed_bf16": "bfloat16", "mixed_fp16": "float16"}

TENSOR_CORE_CAPABILITY = 7
"""Compute capability from which a GPU multiplies fp16 in tensor cores: V100 (7.0) and T4 (7.5), which have no bf16."""


def choose_precision(name: str, device_type: str, *, threads: int | None = None, say: Say = say_nothing) -> str:
    """`auto` as what is faster here; other names as they are. Raises ConfigError.

    On a GPU: mixed_bf16 where it has bf16, else mixed_fp16 from Volta on, else fp32. On a CPU fp32 or mixed_bf16, whichever was
    faster when measured with `threads` threads. say: told in one line what `auto` chose and why.
    """
    if name not in PRECISIONS:
        raise ConfigError(f"precision {name!r} is not known; use one of {', '.join(PRECISIONS)}")
    if name != "auto":
        return name
    if device_type == "cuda":
        chosen, reason = _of_gpu()
    else:
        speed = cpu_speed(threads or default_threads(), say)
        chosen, reason = "mixed_bf16" if speed.bf16_is_faster else "fp32", f"a training step measured at {speed}"
    say(f"precision auto: {chosen} ({reason})")
    return chosen


def _of_gpu() -> tuple[str, str]:
    """The precision for the current GPU, and why."""
    import torch  # callers have it already

    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "mixed_bf16", "this GPU has bf16"
    if torch.cuda.get_device_capability()[0] >= TENSOR_CORE_CAPABILITY:
        return "mixed_fp16", "this GPU has no bf16; the loss is scaled so that gradients fit fp16"
    return "fp32", "this GPU has neither bf16 nor tensor cores for fp16"


def is_mixed(precision: str) -> bool:
    """Whether weights are fp32 and matrix products run in a shorter dtype, by autocast."""
    return precision in AUTOCAST_DTYPES


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of matrix products."""
    import torch  # callers have it already

    name = AUTOCAST_DTYPES.get(precision, "float32" if precision == "fp32" else "bfloat16")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context that forward passes run in: autocast for mixed_bf16 and mixed_fp16, nothing otherwise."""
    import torch  # callers have it already

    return torch.autocast(device.type, compute_dtype(precision)) if is_mixed(precision) else contextlib.nullcontext()


def parameter_dtype(precision: str) -> torch.dtype:
    """The dtype that weights and their gradients are kept in."""
    import torch  # callers have it already

    return torch.bfloat16 if precision == "bf16" else torch.float32


def frozen_dtype(precision: str) -> torch.dtype:
    """The dtype of weights that are not trained: that of the matrix products, since no update can be lost in rounding."""
    return compute_dtype(precision)
