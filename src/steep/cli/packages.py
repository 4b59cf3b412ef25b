"""Which optional packages a command uses. The others are left out of its process: their import is slow and prints warnings."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from steep.runtime.optional_packages import OPTIONAL_PACKAGES, leave_out_packages

if TYPE_CHECKING:
    from steep.config.run import RunConfig


def prepare_imports(config: Optional[RunConfig] = None, *models: Optional[str]) -> None:
    """Leave out what neither the run nor the models (as the command line names them) use. Call it before torch is imported."""
    used = set() if config is None else set(_of_run(config))
    for model in models:
        used |= set(_of_model(model)) if model else set()
    leave_out_packages(used)


def prepare_text_imports(tokenizer: str, texts: Sequence[str]) -> None:
    """Leave out torch as well, for a command that reads text with a tokenizer; of .gguf files transformers needs torch for it."""
    path = Path(tokenizer).expanduser()
    gguf = path.suffix == ".gguf" or (path.is_dir() and next(path.glob("*.gguf"), None) is not None)
    streamed = any(
        text.startswith("hub:") for text in texts
    )  # the package datasets imports torch where it is installed
    leave_out_packages((), torch=gguf or streamed)
    gc.set_threshold(
        100_000
    )  # imports and a vocabulary make many objects and no garbage: a tenth of the time went into looking


def _of_run(config: RunConfig) -> Iterator[str]:
    from steep.core.plugins import plugin_constant  # these are light, but pydantic is not
    from steep.core.section import Target
    from steep.models.config import QUANTIZING_PACKAGES
    from steep.optim.config import PACKAGE

    if '"_target_"' in json.dumps(config.to_mapping(), default=str):
        yield from OPTIONAL_PACKAGES  # a target may import anything
    if (method := getattr(config.model, "quantize", None)) is not None:
        yield QUANTIZING_PACKAGES[method]
    if not isinstance(config.optimizer, Target):
        yield plugin_constant(PACKAGE, config.optimizer.name, "PACKAGE") or ""


def _of_model(reference: str) -> Iterator[str]:
    from steep.core.errors import SteepError  # as above
    from steep.evaluation.model_reference import config_of_run, run_of
    from steep.models.reference import quantization_of, resolve_reference

    try:
        folder = resolve_reference(reference)
        run = run_of(reference)
        if run is not None:
            yield from _of_run(config_of_run(run))
    except SteepError:
        return  # the command itself says what is wrong, and loads nothing
    quantization = quantization_of(folder) if folder is not None else None
    if quantization is not None:
        yield str(quantization.get("quant_method"))
