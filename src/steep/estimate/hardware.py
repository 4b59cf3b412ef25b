"""The device that a plan is for: the one that is here, or one that is named."""

from __future__ import annotations

import time
from dataclasses import dataclass

from steep.core.errors import ConfigError
from steep.runtime.device import choose_device, cpu_has_bf16, cpu_name, device_name, peak_flops, total_memory_bytes

GIB = 2**30

GPUS: dict[str, tuple[str, float, int]] = {
    # what people type: name as in the table of peaks, fp32 FLOP/s, bytes of memory (from the makers' data sheets)
    "h200": ("NVIDIA H200", 67e12, 141 * 10**9),
    "h100": ("NVIDIA H100", 67e12, 80 * GIB),
    "a100": ("NVIDIA A100", 19.5e12, 80 * GIB),
    "a100-40gb": ("NVIDIA A100 40GB", 19.5e12, 40 * GIB),
    "l40s": ("NVIDIA L40S", 91e12, 48 * GIB),
    "l4": ("NVIDIA L4", 30e12, 24 * GIB),
    "rtx4090": ("NVIDIA RTX 4090", 82e12, 24 * GIB),
    "rtx3090": ("NVIDIA RTX 3090", 35e12, 24 * GIB),
}

UNKNOWN_GPU_BF16_FLOPS = 100e12

GPU_UTILIZATION = 0.35
"""Share of the peak that small models reach in training (public code reaches 38 to 49 % at its best)."""

CPU_UTILIZATION = {"fp32": 0.55, "bf16": 0.22}
"""Share of a large matrix product's rate that training reaches on a CPU (measured on two AMX cores)."""


@dataclass(frozen=True)
class Hardware:
    """A device to plan for."""

    name: str
    device_type: str
    memory_bytes: int
    bf16_flops: float
    """Expected rate of training, FLOP/s."""
    fp32_flops: float
    basis: str
    """Where the rates come from."""
    is_here: bool = True

    def expected_flops(self, precision: str) -> float:
        """Expected rate of training in FLOP/s."""
        return self.fp32_flops if precision == "fp32" else self.bf16_flops


def find_hardware(name: str) -> Hardware:
    """`auto`, `cpu`, `cuda` for what is here, or a GPU of the table such as `h100`. Raises ConfigError."""
    if name.lower() in GPUS:
        full_name, fp32, memory = GPUS[name.lower()]
        return _gpu(full_name, fp32, memory, is_here=False)
    try:
        device = choose_device(name)
    except ConfigError as error:
        raise ConfigError(f"{error}. To plan for a GPU that is not here, name one of: {', '.join(GPUS)}.") from None
    if device.type == "cuda":
        name = device_name(device)
        fp32 = (peak_flops(name) or UNKNOWN_GPU_BF16_FLOPS) / 8
        return _gpu(name, fp32, total_memory_bytes("cuda"), is_here=True)
    fp32 = matrix_product_flops("float32")
    bf16 = matrix_product_flops("bfloat16") if cpu_has_bf16() else fp32
    rates = bf16 * CPU_UTILIZATION["bf16"], fp32 * CPU_UTILIZATION["fp32"]
    return Hardware(cpu_name(), "cpu", total_memory_bytes("cpu"), *rates, "from a matrix product timed just now")


def _gpu(name: str, fp32_flops: float, memory_bytes: int, *, is_here: bool) -> Hardware:
    peak = peak_flops(name)
    known = "peak" if peak else f"assumed peak of {UNKNOWN_GPU_BF16_FLOPS / 1e12:.0f} TFLOP/s"
    bf16 = (peak or UNKNOWN_GPU_BF16_FLOPS) * GPU_UTILIZATION
    basis = f"at {GPU_UTILIZATION:.0%} of the {known}"
    return Hardware(name, "cuda", memory_bytes, bf16, fp32_flops * GPU_UTILIZATION, basis, is_here)


def matrix_product_flops(dtype: str, size: int = 1024, repeats: int = 4) -> float:
    """FLOP/s of a square matrix product on this CPU, the best of a few. Takes tens of milliseconds."""
    import torch

    a = torch.ones(size, size, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best  # n^3 products and n^3 sums
