"""What the machine offers: device, threads, memory. The one place that asks whether CUDA is there."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from steep.core.errors import ConfigError

if TYPE_CHECKING:
    import torch


PEAK_HALF_FLOPS = (
    ("gb200", 2.5e15), ("b200", 2.25e15), ("b100", 1.75e15),
    ("h100 pcie", 756e12), ("h100 nvl", 835e12), ("h100", 989e12), ("h200", 989e12), ("gh200", 989e12),
    ("h800", 989e12), ("h20", 148e12), ("a100", 312e12), ("a800", 312e12), ("a40", 149.7e12), ("a30", 165e12),
    ("a10g", 70e12), ("a10", 125e12), ("l40s", 362e12), ("l40", 181e12), ("l4", 121e12),
    ("rtx a6000", 154.8e12), ("rtx 6000 ada", 364e12), ("rtx 5090", 209.5e12), ("rtx 4090", 165.2e12),
    ("rtx 3090", 71e12), ("v100", 125e12), ("t4", 65e12), ("mi325x", 1307e12), ("mi300x", 1307e12), ("mi250x", 191.5e12),
)  # fmt: skip
"""Dense bf16 peak of GPUs in FLOP/s (fp16 for the V100 and the T4, which have no bf16), from the makers' data sheets, by
a part of the name that the driver reports. Longer names come before the ones they contain."""


def choose_device(name: str) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda` or `cuda:1`. Raises ConfigError for one that is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"train.device={name!r} is not a device; use auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        count = torch.cuda.device_count()
        if device.index >= count:
            raise ConfigError(f"train.device={name!r}, but torch finds {count} CUDA devices here; use auto or cpu")
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ConfigError(f"train.device={name!r} is not supported; use auto, cpu or cuda")
    return device


@contextlib.contextmanager
def keep_torch_settings() -> Iterator[None]:
    """Afterwards torch's thread count and current CUDA device are what they were before the block."""
    import torch

    threads = torch.get_num_threads()
    current = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if torch.cuda.is_initialized():
            torch.cuda.set_device(current)


def usable_cpus() -> set[int]:
    """The logical CPUs that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def available_cores() -> int:
    """Physical cores that this process may use, its container's quota of CPU time included (no torch). Where the topology is
    hidden, logical ones."""
    siblings = set()
    for cpu in usable_cpus():
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text().strip() if path.exists() else str(cpu))
    return max(1, min(len(siblings), cpu_quota() or len(siblings)))


def cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> int | None:
    """CPUs that the container may keep busy at a time, rounded up; None without a limit. More threads than that wait for each
    other while the kernel holds them back."""
    quota, _, period = (path.read_text() if path.exists() else "max").strip().partition(" ")
    return math.ceil(int(quota) / int(period)) if quota.isdigit() and period.isdigit() else None


def default_threads() -> int:
    """CPU threads of torch where none are configured: OMP_NUM_THREADS, else one per physical core that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list gives one number per nested level
    return int(asked) if asked.isdigit() and int(asked) > 0 else available_cores()


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products (AMX, AVX-512 BF16, Arm's BF16), from the flags the kernel reports.
    Whether they are faster than fp32 is another question: see cpu_speed.py."""
    flags = f"{cpu_info('flags')} {cpu_info('Features')}".split()
    return any(flag in flags for flag in ("amx_bf16", "avx512_bf16", "bf16"))


def cpu_info(field: str) -> str:
    """What the kernel says of the first CPU under `field`; empty where it does not."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: allocated on a CUDA device, resident set of the process on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM now; None where the system does not say (no /proc). Needs no torch."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else None


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far (no torch).

    From the kernel's own high-water mark where there is one: getrusage's also counts what the parent had before exec.
    """
    status = Path("/proc/self/status")
    if status.exists():
        mark = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if mark is not None:
            return int(mark.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    """The name people know the device by."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return cpu_name()


def cpu_name() -> str:
    """The CPU's name and how many of its cores this process may use (no torch)."""
    return f"{cpu_info('model name') or 'CPU'}, {available_cores()} cores"


def total_memory_bytes(device_type: str) -> int:
    """Memory of the device: of the current GPU, or of this machine (or its container's limit) for a CPU."""
    if device_type == "cuda":
        import torch

        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(physical, int(text)) if text.isdigit() else physical


def free_memory_bytes(device_type: str) -> int:
    """Memory of the device that nothing uses now: of the current GPU, or of this machine (or its container) for a CPU.

    Where the system does not say (no /proc/meminfo), all of it.
    """
    if device_type == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    total, meminfo = total_memory_bytes(device_type), Path("/proc/meminfo")
    found = [line.split()[1] for line in _lines(meminfo) if line.startswith("MemAvailable:")]
    used = _lines(Path("/sys/fs/cgroup/memory.current"))
    limit = _lines(Path("/sys/fs/cgroup/memory.max"))
    free = [total, *(int(kib) * 1024 for kib in found)]
    if used and limit and limit[0].isdigit():
        free.append(max(0, int(limit[0]) - int(used[0])))
    return min(free)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def peak_flops(device_name: str) -> float | None:
    """The dense peak of a GPU in 16 bits, in FLOP/s by its name; None for any other device, such as a CPU."""
    name = f" {' '.join(device_name.lower().replace('-', ' ').split())} "  # whole words: an A1000 is not an A100
    return next((peak for part, peak in PEAK_HALF_FLOPS if f" {part} " in name), None)
