"""`steep export`: a trained model in the form that another program serves."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

from steep.cli.options import MODEL, NO_CODE, refuse_overrides


def command(
    context: typer.Context,
    run: str = MODEL,
    to: str = typer.Option("hf", help="hf: a folder for transformers and vLLM."),
    out: Optional[Path] = typer.Option(None, help="Default: <run>/export/<to>.", show_default=False),
    dtype: str = typer.Option("bfloat16", help="float32, bfloat16 or float16."),
    max_shard_size: str = typer.Option("5GB", help="Largest weight file."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an export that is there."),
    no_code: bool = NO_CODE,
) -> None:
    """Write a trained model for other programs, and verify it by loading it there."""
    refuse_overrides(context)
    from steep.api import export

    result = export(
        run,
        to=to,
        out=out,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        allow_code=not no_code,
    )
    typer.echo(str(result))
