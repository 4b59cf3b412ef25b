"""steep: pretrain and continue to pretrain language models, from raw text to a servable checkpoint.

    import steep
    steep.train({"model": {"pretrained": "HuggingFaceTB/SmolLM2-135M"}, "data": {"train": [{"path": "corpus/"}]}})

Each function is imported when its name is first used, so that `import steep` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from steep.estimate.fit import plan_fit as plan_fit
    from steep.estimate.run_plan import plan as plan
    from steep.evaluation.evaluate_model import evaluate as evaluate
    from steep.evaluation.generate import generate as generate
    from steep.evaluation.harness import evaluate_tasks as evaluate_tasks
    from steep.exporters.push import push as push
    from steep.exporters.run import export as export
    from steep.inspection import inspect as inspect
    from steep.merge.average import average as average
    from steep.merge.blend import blend as blend
    from steep.merge.restore_instruct import restore_instruct as restore_instruct
    from steep.reporting.page import report as report
    from steep.reporting.plots import memory_plot as memory_plot
    from steep.starter import init as init
    from steep.starter import ready_config as ready_config
    from steep.store.prepare_text import prepare as prepare
    from steep.tokenizer.extend import tokenizer_extend as tokenizer_extend
    from steep.tokenizer.fertility import tokenizer_fertility as tokenizer_fertility
    from steep.training.loop import train as train
    from steep.training.lr_find import lr_find as lr_find

MODULES = {
    "average": "steep.merge.average",
    "blend": "steep.merge.blend",
    "evaluate": "steep.evaluation.evaluate_model",
    "evaluate_tasks": "steep.evaluation.harness",
    "export": "steep.exporters.run",
    "generate": "steep.evaluation.generate",
    "init": "steep.starter",
    "inspect": "steep.inspection",
    "lr_find": "steep.training.lr_find",
    "memory_plot": "steep.reporting.plots",
    "plan": "steep.estimate.run_plan",
    "plan_fit": "steep.estimate.fit",
    "prepare": "steep.store.prepare_text",
    "push": "steep.exporters.push",
    "ready_config": "steep.starter",
    "report": "steep.reporting.page",
    "restore_instruct": "steep.merge.restore_instruct",
    "tokenizer_extend": "steep.tokenizer.extend",
    "tokenizer_fertility": "steep.tokenizer.fertility",
    "train": "steep.training.loop",
}
"""The module of each function."""

__all__ = ["__version__", *MODULES]

TUNED = ("lr_find", "train")
"""Functions that are faster in a tuned process. It must be tuned before torch is imported, which these modules do."""


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module 'steep' has no attribute {name!r}")
    if name in TUNED:
        from steep.runtime.tuning import tune_process  # `import steep` stays instant

        tune_process()
    return getattr(importlib.import_module(MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
