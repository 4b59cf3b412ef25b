"""`steep demo`: the whole way on this machine, without a model hub."""

from __future__ import annotations

from pathlib import Path

import typer

from steep.cli.packages import prepare_imports


def command(
    short: bool = typer.Option(False, "--short", help="A few steps, under a minute."),
    directory: Path = typer.Option(Path("runs"), help="Where the run goes."),
    fresh: bool = typer.Option(True, help="Start over; --no-fresh continues a demo that was interrupted."),
) -> int:
    """Continue pretraining a small model on Python's own documentation: a few minutes on a CPU, no model hub needed."""
    prepare_imports()
    from steep.demo import run_demo  # pydantic is heavy

    return run_demo(directory, typer.echo, short=short, fresh=fresh).exit_code
