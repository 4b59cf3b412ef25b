"""`steep report`: the HTML page of a run."""

from __future__ import annotations

import typer

import steep


def command(run: str = typer.Argument(help="The directory of a run.")) -> None:
    """Write report.html, one self-contained page, into the directory of a run."""
    typer.echo(f"wrote {steep.report(run)}")
