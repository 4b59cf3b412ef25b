"""How long a checkpoint save stops training, against a memcpy of the same state and against torch.save.

    python benchmarks/checkpoint_save.py [--megabytes 557] [--repeats 7] [--directory DIR]

The state is that of a model under AdamW in fp32 (weights and two moments) with tensors of many sizes. Every measurement
starts from weights that were just written, as after an optimizer step, and with no save in flight. One line per way:
time the caller waits (median, smallest, largest), that time as a multiple of the memcpy, and time until it is on disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from steep.checkpoint.folder import CheckpointState
from steep.checkpoint.pieces import whole_pieces
from steep.checkpoint.save import CheckpointWriter

HIDDEN = 576  # SmolLM2-135M's


def make_state(megabytes: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and AdamW moments of about `megabytes` (10^6 bytes) in all, in the shapes of SmolLM2's layers."""
    numbers = int(megabytes * 1e6 / 4 / 3)
    shapes = {
        "up": (1536, HIDDEN),
        "down": (HIDDEN, 1536),
        "q": (HIDDEN, HIDDEN),
        "k": (192, HIDDEN),
        "norm": (HIDDEN,),
    }
    weights: dict[str, Tensor] = {}
    used = layer = 0
    while used < numbers * 0.8:
        for name, shape in shapes.items():
            weights[f"layers.{layer}.{name}"] = torch.randn(shape)
        used += sum(torch.Size(shape).numel() for shape in shapes.values())
        layer += 1
    weights["embed"] = torch.randn(max(numbers - used, HIDDEN) // HIDDEN, HIDDEN)
    moments = {f"{n}.{key}": torch.randn_like(w) for n, w in weights.items() for key in ("exp_avg", "exp_avg_sq")}
    return weights, moments


def as_state(weights: dict[str, Tensor], moments: dict[str, Tensor], step: int) -> CheckpointState:
    """The state as the training loop hands it to the writer."""
    optimizer_state = {"class": "AdamW", "param_groups": [{"params": list(weights)}], "state": {}}
    return CheckpointState(whole_pieces(weights), whole_pieces(moments), optimizer_state, {}, "", step, step, step, "")


Way = Callable[[int], tuple[float, float]]


def measure(touch: Callable[[], None], ways: dict[str, Way], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds stopped, seconds until durable) of each repeat of each way, taking turns: other load hits all alike."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for step in range(repeats):
        for name, way in ways.items():
            touch()
            results[name].append(way(step))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=557)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--directory", help="where to write; default: a temporary folder")
    arguments = parser.parse_args()
    weights, moments = make_state(arguments.megabytes)
    tensors = {**weights, **moments}
    size = sum(tensor.numel() * 4 for tensor in tensors.values())
    kept = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}

    def touch() -> None:
        for tensor in tensors.values():
            tensor.add_(1e-3)

    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        writer = CheckpointWriter(Path(folder) / "steep", keep_last=1)

        def save_with(writer: CheckpointWriter, step: int) -> tuple[float, float]:
            start = time.perf_counter()
            writer.save(f"epoch_0_step_{step}", as_state(weights, moments, step))
            stopped = time.perf_counter() - start
            writer.wait()
            return stopped, time.perf_counter() - start

        def steep_save(step: int) -> tuple[float, float]:
            return save_with(writer, step)

        def steep_first_save(step: int) -> tuple[float, float]:
            with CheckpointWriter(Path(folder) / "first", keep_last=1) as fresh:
                return save_with(fresh, step)

        def steep_reserved_save(step: int) -> tuple[float, float]:
            with CheckpointWriter(Path(folder) / "first", keep_last=1) as fresh:
                fresh.reserve(as_state(weights, moments, step))
                fresh.wait()  # in a run: some training steps
                return save_with(fresh, step)

        def clone(step: int) -> tuple[float, float]:
            start = time.perf_counter()
            copies = [tensor.clone() for tensor in tensors.values()]
            stopped = time.perf_counter() - start
            del copies
            return stopped, float("nan")

        def copy(step: int) -> tuple[float, float]:
            start = time.perf_counter()
            for name, tensor in tensors.items():
                kept[name].copy_(tensor)
            return time.perf_counter() - start, float("nan")

        def torch_save(step: int) -> tuple[float, float]:
            start = time.perf_counter()
            with open(Path(folder) / "torch.pt", "wb") as file:
                torch.save(tensors, file)
                file.flush()
                os.fsync(file.fileno())
            stopped = time.perf_counter() - start
            return stopped, stopped

        ways: dict[str, Way] = {
            "memcpy into fresh memory (torch.clone)": clone,
            "memcpy into kept memory (torch.copy_)": copy,
            "steep, first save without reserve (takes its memory)": steep_first_save,
            "steep, first save after reserve": steep_reserved_save,
            "steep, every later save": steep_save,
            "torch.save + fsync": torch_save,
        }
        steep_save(0)
        results = measure(touch, ways, arguments.repeats)
        writer.close()
    report(results, size, len(tensors))


def report(results: dict[str, list[tuple[float, float]]], size: int, count: int) -> None:
    """Print a Markdown table."""
    medians = {name: statistics.median(stopped for stopped, _ in runs) for name, runs in results.items()}
    fresh, kept = list(medians.values())[:2]
    print(f"{size / 1e6:.0f} MB in {count} tensors, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| way | training stopped: median (min-max) | x memcpy fresh | x memcpy kept | until on disk |")
    print("|---|---:|---:|---:|---:|")
    for name, runs in results.items():
        stopped = [seconds for seconds, _ in runs]
        spread = f"{min(stopped):.3f}-{max(stopped):.3f}"
        on_disk = statistics.median(seconds for _, seconds in runs)
        disk = "-" if on_disk != on_disk else f"{on_disk:.2f} s"
        median = medians[name]
        print(f"| {name} | {median:.3f} s ({spread}) | {median / fresh:.2f} | {median / kept:.2f} | {disk} |")


if __name__ == "__main__":
    main()
