"""Options that several commands share, and how they print a result."""

from __future__ import annotations

import json
from typing import Any

import typer

from steep.cli.completion import run_folders

CONFIG = typer.Argument(help="YAML configuration of the run.")
MODEL = typer.Argument(help="A run, checkpoint, model folder, hub id or .gguf file.", autocompletion=run_folders)
JSON = typer.Option(False, "--json", help="Print JSON for programs.")
NO_CODE = typer.Option(
    False, "--no-code", help="Refuse every _target_ but constructors of models, layers and optimizers."
)
ALLOW_CODE = typer.Option(
    None,
    "--allow-code/--no-code",
    help="Run the code that builds the model of a run, or refuse all of it. Default: run what was trained with here.",
)
DEVICE = typer.Option("auto", help="auto, cpu, cuda or cuda:1.")


def show(result: Any, as_json: bool, ensure_ascii: bool = True) -> None:
    """Print a result for people, or as JSON for programs."""
    text = json.dumps(result.to_mapping(), indent=2, ensure_ascii=ensure_ascii) if as_json else result.to_text()
    typer.echo(text)
