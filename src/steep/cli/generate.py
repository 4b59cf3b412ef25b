"""`steep generate`: a prompt continued."""

from __future__ import annotations

import sys
from typing import Optional

import typer

import steep
from steep.cli.options import ALLOW_CODE, DEVICE, MODEL
from steep.cli.packages import prepare_imports
from steep.cli.wrap import Wrapped
from steep.core.errors import ConfigError


def command(
    model: str = MODEL,
    prompt: str = typer.Option(..., help="Text to continue; - reads standard input."),
    before: bool = typer.Option(False, "--before", help="Also show the model the run started from."),
    max_new_tokens: int = typer.Option(128, min=1, help="Largest number of new tokens."),
    temperature: Optional[float] = typer.Option(None, min=0.0, help="Sample; 0 is greedy."),
    top_k: Optional[int] = typer.Option(None, min=1, help="Sample from the k most likely tokens."),
    top_p: Optional[float] = typer.Option(
        None, min=0.0, max=1.0, help="Sample from the most likely tokens with this total probability."
    ),
    repetition_penalty: Optional[float] = typer.Option(None, min=0.0, help="Above 1: repeat less."),
    seed: Optional[int] = typer.Option(None, help="Makes sampling repeatable."),
    device: str = DEVICE,
    precision: str = typer.Option("auto", help="auto, fp32, mixed_bf16 or bf16."),
    allow_code: Optional[bool] = ALLOW_CODE,
) -> None:
    """Continue a prompt, printed as it is generated. Greedy unless a sampling option is given."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ConfigError("--prompt: the prompt is empty; give some text to continue")
    from steep.evaluation.model_reference import base_model_reference, model_reference  # pydantic is heavy

    prepare_imports(None, model)
    references = [("", model_reference(model))]
    if before:
        references = [("before:", base_model_reference(model)), ("after:", model_reference(model))]
    for title, reference in references:
        if title:
            typer.echo(title)
        with Wrapped(sys.stdout, first=text) as out:
            steep.generate(
                reference,
                text,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                device=device,
                precision=precision,
                seed=seed,
                emit=out.write,
                allow_code=allow_code,
            )
