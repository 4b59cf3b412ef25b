"""`steep generate`: a prompt continued."""

from __future__ import annotations

import sys
from typing import Any, Optional

import typer

from steep.cli.options import DEVICE, MODEL, NO_CODE, refuse_overrides


def command(
    context: typer.Context,
    model: str = MODEL,
    prompt: str = typer.Option(..., help="Text to continue; - reads standard input.", show_default=False),
    before: bool = typer.Option(False, "--before", help="Also show the model that the run started from."),
    max_new_tokens: int = typer.Option(128, min=1, help="Most tokens to write."),
    temperature: Optional[float] = typer.Option(None, min=0.0, help="Sample; 0 is greedy.", show_default=False),
    top_k: Optional[int] = typer.Option(None, min=1, help="Sample from the k likeliest.", show_default=False),
    top_p: Optional[float] = typer.Option(None, min=0.0, max=1.0, help="Sample from this mass.", show_default=False),
    repetition_penalty: Optional[float] = typer.Option(None, min=0.0, help="Above 1: repeat less.", show_default=False),
    seed: Optional[int] = typer.Option(None, help="Makes sampling repeatable.", show_default=False),
    device: str = DEVICE,
    precision: str = typer.Option("auto", help="auto, fp32, mixed_bf16 or bf16."),
    no_code: bool = NO_CODE,
) -> None:
    """Continue a prompt, streamed as it is written. Greedy unless a sampling option is given."""
    refuse_overrides(context)
    from steep.core.errors import ConfigError
    from steep.runtime.tuning import tune_process

    tune_process()
    from steep.api import generate
    from steep.cli.wrap import Wrapped

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise ConfigError("--prompt: the prompt is empty; give some text to continue")
    sampling = sampling_options(temperature, top_k, top_p, repetition_penalty)
    from steep.evaluation.loaded_model import base_model_reference, model_reference

    references = [("", model_reference(model))]
    if before:
        references = [("before:", base_model_reference(model)), ("after:", model_reference(model))]
    for title, reference in references:
        if title:
            typer.echo(title)
        with Wrapped(sys.stdout, first=text) as out:
            generate(
                reference,
                text,
                max_new_tokens=max_new_tokens,
                device=device,
                precision=precision,
                seed=seed,
                emit=out.write,
                allow_code=not no_code,
                **sampling,
            )


def sampling_options(
    temperature: Optional[float], top_k: Optional[int], top_p: Optional[float], repetition_penalty: Optional[float]
) -> dict[str, Any]:
    """Options for transformers' `generate`: greedy unless one that samples is given."""
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if options.get("temperature") == 0:
        del options["temperature"]
        return {**options, "do_sample": False}
    return {**options, "do_sample": any(name in options for name in ("temperature", "top_k", "top_p"))}
