"""`steep restore-instruct`: a trained base model follows instructions again."""

from __future__ import annotations

import typer

import steep
from steep.cli.options import MODEL
from steep.cli.packages import prepare_imports


def command(
    trained: str = MODEL,
    base: str = typer.Option(..., help="The base model of both."),
    instruct: str = typer.Option(..., help="The instruction-tuned model of that base."),
    out: str = typer.Option(..., help="The folder to write."),
    scale: float = typer.Option(1.0, help="Scale of the difference."),
) -> None:
    """Write trained + scale x (instruct - base), with the instruct model's tokenizer and chat template."""
    prepare_imports(None, trained, base, instruct)
    typer.echo(str(steep.restore_instruct(trained, base=base, instruct=instruct, out=out, scale=scale)))
