"""How fast this CPU trains in fp32 and in bf16: measured on a small step, remembered for a day.

In: a number of threads. Out: FLOP/s of each. Main choice: whether bf16 is worth it is measured, since flags do not tell: with
AVX-512 BF16 and no AMX it was 1.4 to 2 times slower than fp32 on one CPU and twice as fast on another. Other busy processes slow
both, so figures are the best of several rounds, and those of a busy machine are not remembered. Weakness: the widths of one model
stand for all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steep.core.cache_directory import default_cache_directory
from steep.core.errors import FileError
from steep.core.files import read_json, write_json
from steep.core.fingerprint import fingerprint
from steep.core.say import Say, say_nothing
from steep.core.units import counted
from steep.runtime.device import cpu_has_bf16, cpu_info, keep_torch_settings

if TYPE_CHECKING:
    from torch import Tensor

MEASURE_SECONDS = 0.5
FEWEST_ROUNDS = 3
MOST_SECONDS = 2.0
"""On a machine that is too busy for that many rounds, fewer must do."""

WORTH_ROUNDING_RATIO = 1.1
"""bf16 must be this much faster. Two measurements of one precision on a busy machine differ by as much."""

VALID_SECONDS = 86400.0
"""A virtual machine may become faster or slower under the same name."""

QUIET_RATIO = 0.9
"""CPU time that the threads must have had of the time measured; it was 0.99 on a quiet machine, and 0.1 to 0.5 beside fifteen
busy processes, where the figures were thirty times too low."""

WIDTH, FEED_FORWARD, HEADS, VOCABULARY = 256, 704, 8, 2048
DOCUMENT_TOKENS = (48, 80)
"""Attention runs document by document, so the step has documents of several lengths."""

KERNEL_SETTINGS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
"""Environment variables that change which kernels torch uses."""


@dataclass(frozen=True)
class CpuSpeed:
    """What one step of a small model ran at."""

    threads: int
    fp32_flops: float
    """FLOP/s of its matrix products, everything between them included."""
    bf16_flops: float | None
    """The same under bf16 autocast; None where the CPU has no bf16 instructions, which makes it slower for certain."""
    cpu_ratio: float = 1.0
    """CPU time that the threads had while it was measured, of the time that passed; other processes had the rest."""

    @property
    def was_quiet(self) -> bool:
        """Whether the figures are those of the machine, not of what else it was doing."""
        return self.cpu_ratio >= QUIET_RATIO

    @property
    def conditions(self) -> str:
        """`with 2 threads`, and whether other processes were busy."""
        threads = f"with {counted(self.threads, 'thread')}"
        return (
            threads if self.was_quiet else f"{threads} while other processes took {1 - self.cpu_ratio:.0%} of the CPU"
        )

    @property
    def bf16_is_faster(self) -> bool:
        """Whether mixed_bf16 takes clearly less time than fp32; a tie goes to fp32, which rounds less."""
        return self.bf16_flops is not None and self.bf16_flops > WORTH_ROUNDING_RATIO * self.fp32_flops

    def __str__(self) -> str:
        fp32 = f"{self.fp32_flops / 1e9:.0f} GFLOP/s in fp32"
        if self.bf16_flops is None:
            return f"{fp32} {self.conditions}; this CPU has no bf16 instructions"
        return f"{fp32} and {self.bf16_flops / 1e9:.0f} in bf16 {self.conditions}"


def cpu_speed(threads: int, say: Say = say_nothing) -> CpuSpeed:
    """The speed of this CPU with `threads` threads: remembered, else measured in about half a second.

    say: told where the figure could not be written down. Draws no random number of torch's own generators.
    """
    try:
        path = speed_file(threads)
    except FileError as error:
        say(f"the speed of this CPU is measured at every start: {error}")
        return _measured(threads)
    if (known := _remembered(path, threads)) is not None:
        return known
    speed = _measured(threads)
    if not speed.was_quiet:
        return speed
    figures = {"fp32_flops": speed.fp32_flops, "bf16_flops": speed.bf16_flops, "time": time.time()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**machine_facts(threads), **figures})
    except OSError as error:
        say(f"the speed of this CPU is measured at every start: {path.parent} cannot be written ({error.strerror})")
    return speed


def speed_file(threads: int) -> Path:
    """Where the figures for this machine are remembered. Raises FileError where there can be no cache."""
    return default_cache_directory() / "cpu_speed" / f"{fingerprint(machine_facts(threads))}.json"


def machine_facts(threads: int, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What a measured speed depends on."""
    import torch  # its version; callers have it already

    return {
        "cpu": cpu_info("model name"),
        "flags": cpu_info("flags") or cpu_info("Features"),
        "torch": str(torch.__version__),
        "threads": threads,
        "settings": {name: environment[name] for name in KERNEL_SETTINGS if name in environment},
    }


def _remembered(path: Path, threads: int) -> CpuSpeed | None:
    """What was measured less than a day ago; None where nothing readable is there."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # a damaged file is measured again
        found = read_json(path)
        if 0 <= time.time() - found["time"] < VALID_SECONDS:
            bf16 = found["bf16_flops"]
            return CpuSpeed(threads, float(found["fp32_flops"]), None if bf16 is None else float(bf16))
    return None


@cache
def _measured(threads: int) -> CpuSpeed:
    """Once per process, so that a plan and its run agree where nothing can be remembered."""
    return measure_cpu_speed(threads)


def measure_cpu_speed(threads: int, seconds: float = MEASURE_SECONDS) -> CpuSpeed:
    """Time the step in both precisions in turn for about `seconds`; the best round of each counts."""
    import torch  # callers have it already

    with keep_torch_settings(), torch.enable_grad():
        torch.set_num_threads(threads)
        step, flops = _training_step()
        kinds = (False, True) if cpu_has_bf16() else (False,)
        best = dict.fromkeys(kinds, float("inf"))
        for in_bf16 in kinds:
            step(in_bf16)  # kernels are made and memory is taken at the first call
        started, rounds, spent, had = time.perf_counter(), 0, 0.0, time.process_time()
        while spent < (seconds if rounds >= FEWEST_ROUNDS else MOST_SECONDS):
            for in_bf16 in kinds:
                before = time.perf_counter()
                step(in_bf16)
                best[in_bf16] = min(best[in_bf16], time.perf_counter() - before)
            rounds, spent = rounds + 1, time.perf_counter() - started
    cpu_ratio = min(1.0, (time.process_time() - had) / (threads * spent))
    return CpuSpeed(threads, flops / best[False], flops / best[True] if True in best else None, cpu_ratio)


def _training_step() -> tuple[Callable[[bool], None], float]:
    """Forward and backward of a decoder layer with head and loss, under bf16 autocast or not; and the FLOPs of its products."""
    import torch  # callers have it already
    import torch.nn.functional as F

    generator, tokens = torch.Generator().manual_seed(0), sum(DOCUMENT_TOKENS)

    def weight(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(columns**-0.5).requires_grad_()

    qkv, out, head = weight(3 * WIDTH, WIDTH), weight(WIDTH, WIDTH), weight(VOCABULARY, WIDTH)
    gate, up, down = weight(FEED_FORWARD, WIDTH), weight(FEED_FORWARD, WIDTH), weight(WIDTH, FEED_FORWARD)
    weights = (qkv, out, head, gate, up, down)
    states_TD = torch.randn(tokens, WIDTH, generator=generator, requires_grad=True)
    labels_T = torch.randint(VOCABULARY, (tokens,), generator=generator)

    def attention(normed_TD: Tensor) -> Tensor:
        documents = F.linear(normed_TD, qkv).view(tokens, 3, HEADS, -1).split(DOCUMENT_TOKENS)
        parts = [
            F.scaled_dot_product_attention(q_NTH, k_NTH, v_NTH, is_causal=True)
            for q_NTH, k_NTH, v_NTH in (document.permute(1, 2, 0, 3).unbind(0) for document in documents)
        ]
        return torch.cat([part_NTH.transpose(0, 1).reshape(-1, WIDTH) for part_NTH in parts])

    def step(in_bf16: bool) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_bf16):
            hidden_TD = states_TD + F.linear(attention(F.rms_norm(states_TD, (WIDTH,))), out)
            normed_TD = F.rms_norm(hidden_TD, (WIDTH,))
            hidden_TD = hidden_TD + F.linear(F.silu(F.linear(normed_TD, gate)) * F.linear(normed_TD, up), down)
            logits_TV = F.linear(F.rms_norm(hidden_TD, (WIDTH,)), head)
        F.cross_entropy(logits_TV.float(), labels_T).backward()
        for tensor in (*weights, states_TD):
            tensor.grad = None

    return step, 6.0 * tokens * sum(tensor.numel() for tensor in weights)
