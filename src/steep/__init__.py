"""steep: pretrain and continue to pretrain language models, from raw text to a servable checkpoint.

    import steep
    steep.train({"model": {"pretrained": "HuggingFaceTB/SmolLM2-135M"}, "data": {"train": [{"path": "corpus/"}]}})

The functions are those of `steep.api`, imported when first used, so that `import steep` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "average",
    "blend",
    "evaluate",
    "evaluate_tasks",
    "export",
    "generate",
    "lr_find",
    "plan",
    "plan_fit",
    "prepare",
    "restore_instruct",
    "tokenizer_extend",
    "tokenizer_fertility",
    "train",
]

PACKAGES = ("evaluate", "export", "train")
"""Functions that are also folders: see `steep.core.callable_module`."""

if TYPE_CHECKING:
    from steep.api import (
        average,
        blend,
        evaluate,
        evaluate_tasks,
        export,
        generate,
        lr_find,
        plan,
        plan_fit,
        prepare,
        restore_instruct,
        tokenizer_extend,
        tokenizer_fertility,
        train,
    )


def __getattr__(name: str) -> Any:
    if name in PACKAGES:
        return importlib.import_module(f"steep.{name}")
    if name in __all__:
        return getattr(importlib.import_module("steep.api"), name)
    raise AttributeError(f"module 'steep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
