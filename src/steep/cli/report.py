"""`steep report`: the HTML page of a run."""

from __future__ import annotations

import typer

import steep
from steep.cli.completion import run_folders


def command(run: str = typer.Argument(help="The directory of a run.", autocompletion=run_folders)) -> None:
    """Write report.html, one self-contained page, into the directory of a run."""
    typer.echo(f"wrote {steep.report(run)}")
