"""`steep schema`: the JSON Schema of the configuration, for editors."""

from __future__ import annotations

import json

import typer


def command() -> None:
    """Print the JSON Schema of the configuration, so that editors complete and check it."""
    from steep.config.schema import json_schema  # pydantic is heavy

    typer.echo(json.dumps(json_schema(), indent=2))
