"""`steep evaluate`: scores of a model on texts."""

from __future__ import annotations

from typing import Optional

import typer

from steep.cli.options import DEVICE, JSON, MODEL, NO_CODE, refuse_overrides


def command(
    context: typer.Context,
    model: str = MODEL,
    texts: Optional[list[str]] = typer.Argument(
        None, help="Texts as PATH or NAME=PATH. Default: the run's validation texts.", show_default=False
    ),
    against: Optional[str] = typer.Option(None, help="Another model, or: base.", show_default=False),
    tokens: Optional[str] = typer.Option(
        None, help="At most so many tokens of each text. Default: the run's, else 200k.", show_default=False
    ),
    batch_size: int = typer.Option(8, min=1, help="Sequences per forward pass. Does not change the score."),
    sequence_length: Optional[int] = typer.Option(
        None, min=2, help="Default: the run's, else 1024.", show_default=False
    ),
    text_key: Optional[str] = typer.Option(None, help="JSONL field or Parquet column.", show_default=False),
    device: str = DEVICE,
    precision: str = typer.Option("auto", help="auto, fp32, mixed_bf16 or bf16."),
    no_code: bool = NO_CODE,
    json: bool = JSON,
) -> None:
    """Perplexity and bits per byte of a model on held-out texts, beside another model's."""
    refuse_overrides(context)
    from steep.runtime.tuning import tune_process

    tune_process()
    from steep.api import evaluate

    result = evaluate(
        model,
        texts,
        against=against,
        tokens=tokens,
        batch_size=batch_size,
        sequence_length=sequence_length,
        device=device,
        precision=precision,
        text_key=text_key,
        allow_code=not no_code,
    )
    if json:
        import json as json_module

        typer.echo(json_module.dumps(result.to_mapping(), indent=2))
    else:
        typer.echo(result.to_text())
