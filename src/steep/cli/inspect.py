"""`steep inspect`: what is in a token store, checkpoint, run or model."""

from __future__ import annotations

import json as json_module
from typing import Optional

import typer

import steep
from steep.cli.completion import run_folders
from steep.cli.options import JSON


def command(
    path: str = typer.Argument(help="A token store, run, checkpoint or model folder.", autocompletion=run_folders),
    verify: bool = typer.Option(False, "--verify", help="Check every byte against the checksums."),
    sequence: Optional[int] = typer.Option(None, min=0, help="For a run: the documents and text of this sequence."),
    tokenizer: Optional[str] = typer.Option(
        None, help="For a token store without one: hub id, folder, tokenizer.json, .gguf file."
    ),
    seed: int = typer.Option(0, help="Seed for choosing the documents of a token store to show."),
    format: str = typer.Option(
        "auto", help="The tool that wrote the token store: auto, megatron, nanogpt, llm_c, automodel, datatrove."
    ),
    json: bool = JSON,
) -> None:
    """Show what is in a token store, run, checkpoint or model folder."""
    found = steep.inspect(path, sequence=sequence, verify=verify, tokenizer=tokenizer, seed=seed, format=format)
    if json:
        typer.echo(json_module.dumps(found, indent=2, ensure_ascii=False))
    else:
        from steep.inspection import as_text, store_as_text  # numpy is heavy

        typer.echo(store_as_text(found) if found["kind"] == "token store" else as_text(found))
