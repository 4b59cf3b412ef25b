"""`steep report`: the HTML page of a run."""

from __future__ import annotations

import typer

import steep
from steep.cli.options import refuse_overrides


def command(
    context: typer.Context, run: str = typer.Argument(help="The directory of a run.", show_default=False)
) -> None:
    """Write report.html, one self-contained page, into the directory of a run."""
    refuse_overrides(context)
    typer.echo(f"wrote {steep.report(run)}")
