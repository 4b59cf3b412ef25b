"""`steep config`: ready settings for a known model."""

from __future__ import annotations

import typer

import steep


def command(
    model: str = typer.Argument(help="A hub id, or a family such as smollm2, llama3, qwen3, gemma3, mistral or gpt2."),
) -> None:
    """Print a run file with settings that suit a model's family and size: steep config smollm2 > run.yaml."""
    typer.echo(steep.ready_config(model), nl=False)
