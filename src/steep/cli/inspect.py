"""`steep inspect`: what is in a token store, checkpoint, run or model."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

from steep.cli.options import JSON, refuse_overrides


def command(
    context: typer.Context,
    path: str = typer.Argument(help="A token store, run, checkpoint or model folder.", show_default=False),
    verify: bool = typer.Option(False, "--verify", help="Check every byte against the checksums."),
    sequence: Optional[int] = typer.Option(
        None, min=0, help="Of a run: the documents and text of this sequence.", show_default=False
    ),
    json: bool = JSON,
) -> None:
    """Show what is in a token store, run, checkpoint or model folder."""
    refuse_overrides(context)
    from steep.inspection import as_text, inspect_path, inspect_sequence

    found = inspect_sequence(Path(path), sequence) if sequence is not None else inspect_path(path, verify=verify)
    if json:
        import json as json_module

        typer.echo(json_module.dumps(found, indent=2, ensure_ascii=False))
    else:
        typer.echo(as_text(found))
