"""`steep train`: run a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

import steep
from steep.cli.options import CONFIG, NO_CODE
from steep.cli.packages import prepare_imports


def command(
    context: typer.Context,
    config: Path = CONFIG,
    resume: Optional[bool] = typer.Option(
        None,
        "--resume/--no-resume",
        help="--resume requires a checkpoint, --no-resume refuses one. Default: continue if the same run exists.",
    ),
    accept_data_change: bool = typer.Option(
        False,
        "--accept-data-change",
        help="Continue although the training data has changed: from here on with the new data, from its beginning.",
    ),
    no_code: bool = NO_CODE,
) -> int:
    """Train a model. Any key of the configuration can be overridden: --optimizer.learning_rate 3e-4."""
    from steep.config.load import load_run_config  # pydantic is heavy

    run_config = load_run_config(config, context.obj or [])
    prepare_imports(run_config)
    result = steep.train(run_config, resume=resume, accept_data_change=accept_data_change, allow_code=not no_code)
    return result.exit_code
