"""`steep average`: the mean of checkpoints."""

from __future__ import annotations

from typing import Optional

import typer

import steep
from steep.cli.completion import run_folders
from steep.cli.packages import prepare_imports


def command(
    models: list[str] = typer.Argument(
        help="A run, or several checkpoints or models, oldest first.", autocompletion=run_folders
    ),
    last: int = typer.Option(5, min=2, help="Number of a run's newest checkpoints."),
    weights: str = typer.Option(
        "uniform", help="uniform, ema:DECAY such as ema:0.9, or ema: what train.ema_decay kept."
    ),
    text: Optional[list[str]] = typer.Option(None, help="Text to score, as PATH or NAME=PATH."),
    out: Optional[str] = typer.Option(None, help="Default: <run>/average/last_<N>."),
    no_score: bool = typer.Option(False, "--no-score", help="Do not score it."),
) -> None:
    """Average the last checkpoints of a run, or models of one architecture, and score the result beside the newest."""
    prepare_imports(None, *models)
    typer.echo(str(steep.average(models, last=last, weights=weights, texts=text, out=out, score=not no_score)))
