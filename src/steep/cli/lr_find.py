"""`steep lr-find`: which learning rate to use."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

import steep
from steep.cli.options import CONFIG, JSON, NO_CODE, show
from steep.cli.packages import prepare_imports
from steep.core.errors import ConfigError


def command(
    context: typer.Context,
    config: Path = CONFIG,
    rates: Optional[str] = typer.Option(
        None, help="As in 1e-5,3e-5,1e-4. Default: a tenth to ten times the configured rate."
    ),
    steps: int = typer.Option(20, min=5, help="Steps of each short run."),
    no_code: bool = NO_CODE,
    json: bool = JSON,
) -> None:
    """Train short runs from the base at several learning rates, score each, and propose one. Writes no checkpoint."""
    from steep.config.load import load_run_config  # pydantic is heavy

    run_config = load_run_config(config, context.obj or [])
    prepare_imports(run_config)
    show(steep.lr_find(run_config, rates=_rates(rates), steps=steps, allow_code=not no_code), json)


def _rates(text: Optional[str]) -> Optional[list[float]]:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--rates {text}: give numbers, as in 1e-5,3e-5,1e-4") from None
