"""`steep blend`: models between the base and the trained one."""

from __future__ import annotations

from typing import Optional

import typer

import steep
from steep.cli.options import MODEL
from steep.cli.packages import prepare_imports
from steep.core.errors import ConfigError


def command(
    model: str = MODEL,
    texts: Optional[list[str]] = typer.Argument(
        None, help="Texts as PATH or NAME=PATH. Default: the run's held-out texts."
    ),
    base: Optional[str] = typer.Option(None, help="Default: the model that the run started from."),
    alphas: Optional[str] = typer.Option(None, help="Such as 0,0.5,1. Default: 0,0.25,0.5,0.75,1."),
    points: Optional[int] = typer.Option(None, min=2, help="This many alphas, evenly spaced."),
    cap: Optional[float] = typer.Option(
        None,
        min=0,
        help="Largest increase of bits per byte on general text, as a share of the base's. Default: the run's, else 0.02.",
    ),
    tokens: Optional[str] = typer.Option(None, help="At most this many tokens of each text."),
    out: Optional[str] = typer.Option(None, help="Default: <run>/blend/best."),
) -> None:
    """Blend the base and the trained weights, score each blend, and write the best one under the forgetting cap."""
    if alphas is not None and points is not None:
        raise ConfigError("give --alphas or --points, not both")
    prepare_imports(None, model, base)
    result = steep.blend(model, texts, base=base, alphas=_alphas(alphas, points), cap=cap, tokens=tokens, out=out)
    typer.echo(str(result))


def _alphas(text: Optional[str], points: Optional[int]) -> Optional[list[float]]:
    if points is not None:
        return [i / (points - 1) for i in range(points)]
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--alphas {text}: give numbers from 0 to 1, such as 0,0.5,1") from None
