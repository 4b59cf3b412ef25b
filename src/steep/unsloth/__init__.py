"""Runs code written for Unsloth's notebooks, with its import lines changed.

    from steep.unsloth import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments, is_bfloat16_supported

In: the calls of such a notebook. Out: a steep run, with its checkpoints, report and configuration, and the notebook's own model
object, trained. Main choice: every argument is either translated, accepted with one line that says why it has no effect here, or
refused; none is dropped silently, and no other package is patched. Weakness: instruction data and chat templates are outside of
steep, and are left to the user.

For machines without a GPU there are also `torch` and `gpu_mem_used`: see `steep.unsloth.cpu_fallback`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from steep.unsloth.arguments import UnslothTrainingArguments
from steep.unsloth.cpu_fallback import gpu_mem_used, torch_here
from steep.unsloth.model import FastLanguageModel, is_bfloat16_supported
from steep.unsloth.trainer import UnslothTrainer

if TYPE_CHECKING:
    import torch

__all__ = [
    "FastLanguageModel",
    "UnslothTrainer",
    "UnslothTrainingArguments",
    "gpu_mem_used",
    "is_bfloat16_supported",
    "torch",
]


def __getattr__(name: str) -> Any:
    if name == "torch":
        return torch_here()
    raise AttributeError(f"module 'steep.unsloth' has no attribute {name!r}")
