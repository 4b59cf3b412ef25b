"""`steep demo`: the whole way on this machine, without a model hub."""

from __future__ import annotations

from pathlib import Path

import typer

import steep
from steep.cli.options import refuse_overrides


def command(
    context: typer.Context,
    short: bool = typer.Option(False, "--short", help="A few steps, under a minute."),
    directory: Path = typer.Option(Path("runs"), help="Where the run goes."),
    fresh: bool = typer.Option(True, help="Start over; --no-fresh continues a demo that was interrupted."),
) -> int:
    """Continue pretraining a small model on Python's own documentation: a few minutes on a CPU, no model hub needed."""
    refuse_overrides(context)
    from steep.config.load import load_run_config
    from steep.demo import (
        SHORT,
        choose_model,
        demo_config,
        demo_size,
        remove_demo,
        sized,
        train_tokenizer,
        write_domain_text,
        write_general_text,
    )
    from steep.runtime.tuning import tune_process

    tune_process()
    texts = directory / "demo-texts"
    domain, general = write_domain_text(texts, short=short), write_general_text(texts, short=short)
    typer.echo(f"domain text: {domain.description}\ngeneral text: {general.description}")
    model = choose_model(typer.echo, ask_hub=not short)
    tokenizer = train_tokenizer([domain.path], texts / "tokenizer") if "config" in model else None
    mapping = demo_config(model, domain, general, directory, tokenizer, "demo-short" if short else "demo")

    from steep.training.loop import train

    probe = steep.plan(sized(mapping, SHORT))
    config = load_run_config(mapping=sized(mapping, demo_size(probe.seconds / probe.tokens, typer.echo, short=short)))
    run = directory / config.run.name
    if fresh and run.exists():
        remove_demo(run, texts)
    typer.echo((probe if short else steep.plan(config)).to_text())
    result = train(config)
    if result.status == "done":
        checkpoint = (run / "checkpoints" / "LATEST").read_text().strip()
        folder = run / "checkpoints" / checkpoint / "model" / "consolidated"
        typer.echo(f'load it: AutoModelForCausalLM.from_pretrained("{folder}")')
    return result.exit_code
