"""What a person names as a model: a run, checkpoint, folder, hub id or .gguf file. Out: what to load. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from pydantic import ValidationError

from steep.config.run import RunConfig
from steep.config.settled import as_saved, parse_saved
from steep.core.errors import ConfigError, ModelError
from steep.core.files import read_text
from steep.core.section import Target
from steep.models.config import ModelConfig
from steep.models.reference import resolve_reference
from steep.runtime.run_directory import is_run_directory
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.open import tokenizer_reference

Reference = Union[str, os.PathLike[str]]
"""A run, checkpoint, model folder, hub id or .gguf file."""


@dataclass(frozen=True)
class ModelReference:
    """What to load: a model and the tokenizer that goes with it."""

    reference: str
    model: ModelConfig | Target
    tokenizer: TokenizerConfig
    run: Path | None = None


def model_reference(reference: str | os.PathLike[str]) -> ModelReference:
    """What a run, checkpoint, model folder, hub id or .gguf file stands for, with the tokenizer policy of its run."""
    reference = os.fspath(reference)
    run = run_of(reference)
    if run is None:
        return ModelReference(reference, ModelConfig(pretrained=reference), TokenizerConfig(pretrained=reference))
    config = config_of_run(run)
    if isinstance(config.model, Target) and not _is_consolidated(reference):
        own = tokenizer_reference(config.tokenizer, config.model)
        return ModelReference(reference, config.model, config.tokenizer.model_copy(update={"pretrained": own}), run)
    tokenizer = config.tokenizer.model_copy(update={"pretrained": reference})
    return ModelReference(reference, ModelConfig(pretrained=reference), tokenizer, run)


def base_model_reference(reference: str | os.PathLike[str]) -> ModelReference:
    """The model that a run started from, with the run's tokenizer. Raises ConfigError, ModelError where there is none."""
    run = run_of(os.fspath(reference))
    if run is None:
        raise ConfigError(
            f"{reference} is not in a run directory, so the model it started from is unknown; name a model"
        )
    config = config_of_run(run)
    if isinstance(config.model, Target) or config.model.pretrained is None:
        raise ModelError(f"the run {run} started from fresh weights, so it has no base; name a model to compare with")
    own = tokenizer_reference(config.tokenizer, config.model)
    return ModelReference(
        config.model.pretrained, config.model, config.tokenizer.model_copy(update={"pretrained": own})
    )


def _is_consolidated(reference: str) -> bool:
    """Whether the newest checkpoint holds a folder that transformers loads."""
    try:
        return resolve_reference(reference) is not None
    except ModelError:
        return False


def run_of(reference: str | os.PathLike[str]) -> Path | None:
    """The run directory that a reference names or lies in; None for any other model."""
    path = Path(reference)
    if not path.exists():
        return None
    return next((folder for folder in [path, *path.resolve().parents] if is_run_directory(folder)), None)


def config_of_run(run: Path) -> RunConfig:
    """The configuration of a finished run; its data may be gone. Raises ConfigError."""
    path = run / "config.yaml"
    try:
        return RunConfig.model_validate(as_saved(parse_saved(read_text(path), path)))
    except (OSError, ValidationError) as error:
        raise ConfigError(f"{path} is not a configuration of this version of steep: {error}") from None
