"""`steep report`: the HTML page of a run."""

from __future__ import annotations

from pathlib import Path

import typer

from steep.cli.options import existing_path, refuse_overrides


def command(
    context: typer.Context, run: Path = typer.Argument(help="The directory of a run.", show_default=False)
) -> None:
    """Write report.html, one self-contained page, into the directory of a run."""
    refuse_overrides(context)
    from steep.core.errors import ConfigError
    from steep.runtime.run_directory import is_run_directory

    if not is_run_directory(existing_path(run, "run directory")):
        raise ConfigError(f"{run}: is no run directory; it has no config.yaml and checkpoints/")

    from steep.reporting.page import write_report

    typer.echo(f"wrote {write_report(run)}")
