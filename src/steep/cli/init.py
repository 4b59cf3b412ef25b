"""`steep init`: a commented run file to start from."""

from __future__ import annotations

from pathlib import Path

import typer

import steep


def command(
    texts: list[str] = typer.Argument(help="Files, folders or globs of text, or token stores."),
    model: str = typer.Option(..., help="What to start from: hub id, folder, run or .gguf file."),
    out: Path = typer.Option(Path("run.yaml"), help="The run file; it must not exist."),
) -> None:
    """Write a commented run file for a model and texts, and the schema by which editors check it."""
    typer.echo(str(steep.init(texts, model, out=out)))
