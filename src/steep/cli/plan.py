"""`steep plan`: what a run would do."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

import steep
from steep.cli.options import CONFIG, JSON, NO_CODE, show
from steep.cli.packages import prepare_imports


def command(
    context: typer.Context,
    config: Path = CONFIG,
    device: str = typer.Option("auto", help="Plan for: auto, cpu, cuda, or a GPU such as h100, a100, rtx4090."),
    fit: Optional[str] = typer.Option(
        None, metavar="SIZE", help="List the settings with which the run fits into this much memory, such as 24GiB."
    ),
    no_code: bool = NO_CODE,
    json: bool = JSON,
) -> None:
    """Print sizes, tokens, steps, memory by part and time of a run. Loads no weights; refuses what cannot work."""
    from steep.config.load import load_run_config  # pydantic is heavy

    run_config = load_run_config(config, context.obj or [])
    prepare_imports(run_config)
    if fit is None:
        show(steep.plan(run_config, device=device, allow_code=not no_code), json)
    else:
        show(steep.plan_fit(run_config, fit, device=device, allow_code=not no_code), json)
