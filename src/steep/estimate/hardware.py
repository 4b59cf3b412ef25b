"""The device that a plan is for: the one that is here, or one that is named."""

from __future__ import annotations

from dataclasses import dataclass, replace

from steep.core.errors import ConfigError
from steep.core.say import Say, say_nothing
from steep.runtime.cpu_speed import CpuSpeed, cpu_speed
from steep.runtime.device import (
    choose_device,
    cpu_name,
    default_threads,
    device_name,
    peak_flops,
    total_memory_bytes,
)
from steep.runtime.precision import choose_precision

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
    "v100": ("NVIDIA V100", 15.7e12, 16 * GIB),
    "v100-32gb": ("NVIDIA V100 32GB", 15.7e12, 32 * GIB),
    "t4": ("NVIDIA T4", 8.1e12, 15 * GIB),
}

WITHOUT_BF16 = ("v100", "v100-32gb", "t4")

UNKNOWN_GPU_HALF_FLOPS = 100e12

GPU_UTILIZATION = 0.35
"""Share of the peak that small models reach in training (public code reaches 38 to 49 % at its best)."""


@dataclass(frozen=True)
class Hardware:
    """A device to plan for."""

    name: str
    device_type: str
    memory_bytes: int
    half_flops: float
    """Expected rate of training in bf16, or in fp16 where there is no bf16, FLOP/s."""
    fp32_flops: float
    basis: str
    """Where the rates come from."""
    is_here: bool = True
    has_bf16: bool = True
    """Of a GPU of the table."""

    def expected_flops(self, precision: str) -> float:
        """Expected rate of training in FLOP/s."""
        return self.fp32_flops if precision == "fp32" else self.half_flops

    def choose_precision(self, name: str, *, threads: int | None = None, say: Say = say_nothing) -> str:
        """train.precision with `auto` resolved for this device. threads, say: as for `runtime.precision.choose_precision`."""
        if name == "auto" and not self.is_here:
            return "mixed_bf16" if self.has_bf16 else "mixed_fp16"
        return choose_precision(name, self.device_type, threads=threads, say=say)


def find_hardware(name: str, threads: int | None = None) -> Hardware:
    """`auto`, `cpu`, `cuda` for what is here, or a GPU of the table such as `h100`. Raises ConfigError.

    threads: that a CPU trains with; None for as many as torch gets by default.
    """
    if name.lower() in GPUS:
        full_name, fp32, memory = GPUS[name.lower()]
        return replace(_gpu(full_name, fp32, memory), is_here=False, has_bf16=name.lower() not in WITHOUT_BF16)
    try:
        device = choose_device(name)
    except ConfigError as error:
        raise ConfigError(f"{error}. To plan for a GPU that is not here, name one of: {', '.join(GPUS)}.") from None
    if device.type == "cuda":
        name = device_name(device)
        fp32 = (peak_flops(name) or UNKNOWN_GPU_HALF_FLOPS) / 8
        return _gpu(name, fp32, total_memory_bytes("cuda"))
    return _cpu(cpu_speed(threads or default_threads()))


def _cpu(speed: CpuSpeed) -> Hardware:
    """The rates as measured: models 128 to 512 wide trained at 0.6 to 1.1 times these (2 Zen 5 cores, torch 2.13)."""
    half = speed.fp32_flops if speed.bf16_flops is None else speed.bf16_flops
    basis = f"at the rate of a training step, measured {speed.conditions}"
    return Hardware(cpu_name(), "cpu", total_memory_bytes("cpu"), half, speed.fp32_flops, basis)


def _gpu(name: str, fp32_flops: float, memory_bytes: int) -> Hardware:
    peak = peak_flops(name)
    known = "peak" if peak else f"assumed peak of {UNKNOWN_GPU_HALF_FLOPS / 1e12:.0f} TFLOP/s"
    half = (peak or UNKNOWN_GPU_HALF_FLOPS) * GPU_UTILIZATION
    basis = f"at {GPU_UTILIZATION:.0%} of the {known}"
    return Hardware(name, "cuda", memory_bytes, half, fp32_flops * GPU_UTILIZATION, basis)
