"""`steep push`: a trained model on a hub."""

from __future__ import annotations

from typing import Optional

import typer

import steep
from steep.cli.options import MODEL


def command(
    model: str = MODEL,
    repository: str = typer.Argument(..., help="USER/NAME; made if it is not there."),
    public: bool = typer.Option(False, "--public", help="Make the repository public; private otherwise."),
    revision: Optional[str] = typer.Option(None, help="A branch; default main."),
    dtype: Optional[str] = typer.Option(None, help="f32, bf16 (default) or f16."),
    message: Optional[str] = typer.Option(None, help="Of the commit."),
) -> None:
    """Export a model, verify it, and upload it with its model card."""
    typer.echo(str(steep.push(model, repository, public=public, revision=revision, dtype=dtype, message=message)))
