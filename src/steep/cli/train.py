"""`steep train`: run a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

from steep.cli.options import CONFIG, NO_CODE


def command(
    context: typer.Context,
    config: Path = CONFIG,
    resume: Optional[bool] = typer.Option(
        None,
        "--resume/--no-resume",
        help="--resume demands a checkpoint, --no-resume refuses one. Default: continue if the same run is there.",
        show_default=False,
    ),
    no_code: bool = NO_CODE,
) -> int:
    """Train a model. Any key of the configuration can be overridden: --optimizer.learning_rate 3e-4."""
    from steep.config.load import load_run_config

    run_config = load_run_config(config, context.obj or [])

    from steep.runtime.tuning import tune_process

    tune_process()  # before torch is imported

    from steep.train.loop import train

    return train(run_config, resume=resume, allow_code=not no_code).exit_code
