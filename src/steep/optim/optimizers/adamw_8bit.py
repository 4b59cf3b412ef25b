"""AdamW with moments of 8 bits (Dettmers et al. 2021, arXiv:2110.02861), bitsandbytes' AdamW8bit; extra `quant`.

Moments are stored as bytes with one fp32 scale per 256 numbers; tensors below 4,096 numbers keep fp32. State: about 2
bytes per parameter instead of 8 in fp32. Weakness: on a CPU a step takes 6 to 9 times as long as fused AdamW's, so it only
saves memory there; the state of embeddings, whose gradients are rare and large, is quantized like any other.
"""

from __future__ import annotations

from typing import Any

import torch

from steep.core.errors import ConfigError, MissingExtraError
from steep.optim.config import OptimizerConfig

OPTIONS = ("betas", "eps")
PACKAGE = "bitsandbytes"

SMALLEST_8BIT, BLOCK = 4096, 256
"""bitsandbytes' own: its default of `min_8bit_size`, and its fixed block size."""
DEVICES = ("cpu", "cuda", "xpu")


def build(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW8bit over groups as `build_param_groups` makes them.

    Raises MissingExtraError without bitsandbytes, ConfigError on a device without kernels for it.
    """
    devices = {tensor.device.type for group in groups for _, tensor in group["params"]} - set(DEVICES)
    if devices:
        raise ConfigError(
            f"optimizer.name=adamw_8bit works on {', '.join(DEVICES)}; these weights are on {', '.join(sorted(devices))}. "
            "Use adamw, or adafactor or lion, which keep less state"
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "quant", "optimizer.name=adamw_8bit") from error
    optimizer: torch.optim.Optimizer = AdamW8bit(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, min_8bit_size=SMALLEST_8BIT
    )
    return optimizer


def state_bytes(groups: list[dict[str, Any]], config: OptimizerConfig) -> int:
    """Two bytes per number and two fp32 scales per block; for small tensors two fp32 tensors."""
    return sum(_bytes(tensor.numel()) for group in groups for _, tensor in group["params"])


def _bytes(numbers: int) -> int:
    if numbers < SMALLEST_8BIT:
        return 2 * 4 * numbers
    return 2 * numbers + 2 * 4 * -(-numbers // BLOCK)
