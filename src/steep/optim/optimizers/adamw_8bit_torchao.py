"""AdamW with moments of 8 bits (Dettmers et al. 2021, arXiv:2110.02861), torchao's AdamW8bit; extra `quant`.

Like `adamw_8bit`, but plain PyTorch, compiled on a GPU, so that it runs on every device that PyTorch supports.
Moments are stored as bytes with one fp32 scale per 256 numbers; tensors below 4,096 numbers, or whose size is not a multiple of
256, keep their dtype. Weakness: on a GPU the first step compiles a kernel for every shape of tensor; on a CPU it runs uncompiled,
and needs about sixty bytes per number of the largest tensor while it updates it, which `steep plan` does not count.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from steep.core.errors import MissingExtraError
from steep.optim.config import OptimizerConfig

OPTIONS = ("betas", "eps")
PACKAGE = "torchao"

SMALLEST_8BIT, BLOCK = 4096, 256
"""torchao's own: the smallest tensor that it quantizes, and its default block size."""
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Key of the state -> whether its numbers are signed."""


def build(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW8bit over groups as `build_param_groups` makes them.

    Raises MissingExtraError without torchao.
    """
    try:
        from torchao.optim import AdamW8bit
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise MissingExtraError("torchao", "quant", "optimizer.name=adamw_8bit_torchao") from error

    class TorchaoAdamW8bit(AdamW8bit):  # type: ignore[misc]
        """State per parameter: `step` (CPU fp32), `exp_avg` and `exp_avg_sq`, in uint8 where `exp_avg_scale` and
        `exp_avg_sq_scale` exist. Between steps they are plain tensors, which a checkpoint can hold, and rates plain numbers."""

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            rate = float(param_group.get("lr", self.defaults["lr"]))
            super().add_param_group(param_group)
            self.param_groups[-1]["lr"] = rate  # not rounded to fp32

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            """One update of every parameter that has a gradient. No closure."""
            assert closure is None
            on_gpu = any(parameter.is_cuda for group in self.param_groups for parameter in group["params"])
            with self._in_torchaos_form(), nullcontext() if on_gpu else torch.compiler.set_stance("force_eager"):
                super().step()

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            """Like torch's, which casts state to the dtype of the weights; here bytes stay bytes and scales fp32."""
            super().load_state_dict({**state_dict, "state": {}})
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            for number, state in state_dict["state"].items():
                for key, value in state.items():
                    device = torch.device("cpu") if key == "step" else parameters[number].device
                    self.state[parameters[number]][key] = value.to(device, copy=True)

        @contextmanager
        def _in_torchaos_form(self) -> Iterator[None]:
            rates = [group["lr"] for group in self.param_groups]
            for group in self.param_groups:
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
            for parameter, state in self.state.items():
                for key, signed in MOMENTS.items():
                    if (scale := state.pop(f"{key}_scale", None)) is not None:
                        values = _values(signed, scale.device)
                        state[key] = OptimState8bit(state[key], scale, values, signed, dtype=parameter.dtype)
            try:
                yield
            finally:
                for group, rate in zip(self.param_groups, rates, strict=True):
                    group["lr"] = rate
                for state in self.state.values():
                    for key in MOMENTS:
                        if isinstance(state.get(key), OptimState8bit):
                            state[f"{key}_scale"], state[key] = state[key].scale, state[key].codes

    return TorchaoAdamW8bit(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, block_size=BLOCK)


@functools.cache
def _values(signed: bool, device: torch.device) -> Tensor:
    """(256,) fp32: the number that each byte stands for, before scaling."""
    from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned

    return torch.tensor(get_qmap_signed() if signed else get_qmap_unsigned(), dtype=torch.float32, device=device)


def state_bytes(groups: list[dict[str, Any]], config: OptimizerConfig) -> int:
    """Two bytes per number and two fp32 scales per block; for other tensors two of their shape and dtype."""
    return sum(_bytes(tensor) for group in groups for _, tensor in group["params"])


def _bytes(tensor: Tensor) -> int:
    numbers = tensor.numel()
    if numbers < SMALLEST_8BIT or numbers % BLOCK:
        return 2 * tensor.element_size() * numbers
    return 2 * numbers + 2 * 4 * (numbers // BLOCK)
