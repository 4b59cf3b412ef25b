"""Options that several commands share, and the checks that come with them."""

from __future__ import annotations

import json
from typing import Any

import typer

from steep.core.errors import ConfigError

CONFIG = typer.Argument(help="YAML configuration of the run.", show_default=False)
MODEL = typer.Argument(help="A run, checkpoint, model folder, hub id or .gguf file.", show_default=False)
JSON = typer.Option(False, "--json", help="Print JSON for programs.")
NO_CODE = typer.Option(False, "--no-code", help="Refuse every _target_ outside steep, torch and transformers.")
DEVICE = typer.Option("auto", help="auto, cpu, cuda or cuda:1.")


def refuse_overrides(context: typer.Context) -> None:
    """For commands without a configuration, which would ignore an override silently. Raises ConfigError."""
    if context.obj:
        raise ConfigError(
            f"steep {context.info_name} takes no configuration overrides, but was given {' '.join(context.obj)}"
        )


def show(result: Any, as_json: bool, ensure_ascii: bool = True) -> None:
    """Print a result for people, or as JSON for programs."""
    mapping = result.to_mapping() if as_json else {}
    typer.echo(json.dumps(mapping, indent=2, ensure_ascii=ensure_ascii) if as_json else result.to_text())
