"""What a run leaves to steep (`auto`) and follows from its memory: the micro-batch, and the copy that saves are written from.

In: a RunConfig, its sizes, its device. Out: the same with numbers, and a line that says what was chosen and why. A run chooses
once, when it starts, and has the choice in its saved configuration, so that a resumed run computes the same.
Main choice: the smallest micro-batch that keeps the device busy, not the largest that fits. Larger ones take memory in
proportion and hardly any less time. Weakness: the plan's memory is arithmetic, so a fifth of what is free is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from steep.config.run import RunConfig
from steep.core.section import Target
from steep.core.units import format_bytes
from steep.estimate.hardware import Hardware
from steep.estimate.structure import StructureFacts, measure_structure
from steep.models.config import ModelConfig
from steep.order.batches import Sizes
from steep.runtime.device import free_memory_bytes

AUTO = "auto"

BUSY_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens of a micro-batch from which on more of them gain little. What is done once per micro-batch (adding to the gradients,
bf16 copies of the weights, on a GPU the launching of kernels) takes no longer for more tokens. CPU: a llama of 11
million parameters trained 1,171, 1,240, 1,269 and at most 1,287 tokens per CPU second with 256, 1,024, 2,048 and 4,096 tokens
(one Zen 5 core, torch 2.13). GPU: nanoGPT trains GPT-2 with 12 to 32 sequences of 1,024 tokens per pass; not measured here."""

FILLED_RATIO = 0.8
"""The share of the free memory that a plan may fill: kernels need scratch memory, and allocators have gaps."""

LIKELY_FACTOR = 3
"""A run may take so many times as long as its plan says."""


@dataclass(frozen=True)
class Chosen:
    """A run without `auto` in what this module chooses."""

    config: RunConfig
    sizes: Sizes
    structure: StructureFacts
    lines: list[str]
    """What was chosen and why, a line each."""


def choose(
    config: RunConfig,
    sizes: Sizes,
    hardware: Hardware,
    vocabulary_rows: int | None = None,
    shapes: ModelConfig | Target | None = None,
) -> Chosen:
    """Choose what is `auto` and measure the structure of the run. Raises ModelError, ConfigError for what cannot work.

    config: with its precision chosen. vocabulary_rows: embeddings that the run's tokenizer needs, where the run adds tokens.
    shapes: what to read the model's shapes from, where that is not what the configuration names.
    """
    precision = config.train.precision
    read = config if shapes is None else config.model_copy(update={"model": shapes})
    free_bytes = free_memory_bytes(hardware.device_type) if hardware.is_here else hardware.memory_bytes
    limit_bytes = int(FILLED_RATIO * free_bytes)
    lines: list[str] = []

    def measured(size: int) -> StructureFacts:
        accumulates, on_gpu = sizes.world_size * size < sizes.global_batch_size, hardware.device_type != "cpu"
        return measure_structure(read, size, accumulates, precision, on_gpu, vocabulary_rows)

    def peak_bytes(facts: StructureFacts) -> int:
        return sum(facts.memory.parts(hardware.device_type).values())

    if config.train.micro_batch_size == AUTO:
        busy = [n for n in sizes.micro_batch_sizes if n * sizes.sequence_length <= BUSY_TOKENS[hardware.device_type]]
        wanted = max(busy, default=1)
        structure = measured(wanted)
        size = wanted
        while size > 1 and peak_bytes(structure) > limit_bytes:
            size = max(n for n in sizes.micro_batch_sizes if n < size)
            structure = measured(size)
        sizes = replace(sizes, micro_batch_size=size)
        config = with_values(config, {"train.micro_batch_size": size})
        lines.append(_micro_batch_line(sizes, wanted, hardware, peak_bytes(structure), free_bytes))
    else:
        structure = measured(sizes.micro_batch_size)
    if config.checkpoint.asynchronous == AUTO:
        seconds = sizes.total_sequences * sizes.sequence_length * structure.flops_per_token
        seconds /= hardware.expected_flops(precision)
        with_copy = peak_bytes(structure) + structure.checkpoint_bytes
        copies = config.checkpoint.saves_before_the_end and (
            hardware.device_type != "cpu"  # the copy is in host memory, which training hardly uses
            or (likely_saves(config, sizes, seconds) > 1 and with_copy <= limit_bytes)
        )
        config = with_values(config, {"checkpoint.asynchronous": copies})
        if config.checkpoint.copies_state:
            memory = replace(structure.memory, checkpoint=structure.checkpoint_bytes)
            structure = replace(structure, memory=memory)
    return Chosen(config, sizes, structure, lines)


def _micro_batch_line(sizes: Sizes, wanted: int, hardware: Hardware, peak_bytes: int, free_bytes: int) -> str:
    size, tokens = sizes.micro_batch_size, sizes.micro_batch_size * sizes.sequence_length
    needs = f"about {format_bytes(peak_bytes)} of {format_bytes(free_bytes)} free"
    if size < wanted:
        fits = "the largest that fits" if peak_bytes <= FILLED_RATIO * free_bytes else "the smallest"
        reason = f"{fits}, at {needs}; {sizes.micro_batch_sizes[sizes.micro_batch_sizes.index(size) + 1]} does not"
    elif size == sizes.micro_batch_sizes[-1]:
        reason = f"the whole global batch, at {needs}"
    else:
        device = "CPU" if hardware.device_type == "cpu" else "GPU"
        reason = f"{tokens:,} tokens keep a {device} busy, more would only take memory; {needs}"
    return f"micro_batch_size auto: {size} ({reason})"


def likely_saves(config: RunConfig, sizes: Sizes, seconds: float) -> int:
    """How many checkpoints a run writes if it takes up to three times as long as planned, the one at its end included.

    seconds: of training, as planned.
    """
    settings = config.checkpoint
    by_steps = (sizes.steps - 1) // settings.every_steps if settings.every_steps is not None else 0
    by_time = int(LIKELY_FACTOR * seconds / settings.every_seconds) if settings.every_seconds is not None else 0
    return 1 + max(0, by_steps) + by_time


def with_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """A copy with other values of some keys `section.key`, which are not checked again."""
    for name, value in values.items():
        section, _, key = name.partition(".")
        changed = getattr(config, section).model_copy(update={key: value})
        config = config.model_copy(update={section: changed})
    return config
