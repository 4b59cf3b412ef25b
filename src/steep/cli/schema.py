"""`steep schema`: the JSON Schema of the configuration, for editors."""

from __future__ import annotations

import json

import typer

from steep.cli.options import refuse_overrides


def command(context: typer.Context) -> None:
    """Print the JSON Schema of the configuration, so that editors complete and check it."""
    refuse_overrides(context)
    from steep.config.schema import json_schema  # pydantic is heavy

    typer.echo(json.dumps(json_schema(), indent=2))
