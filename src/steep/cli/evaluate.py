"""`steep evaluate`: scores of a model on texts."""

from __future__ import annotations

from typing import Any, Optional

import typer

import steep
from steep.cli.completion import run_folders
from steep.cli.options import ALLOW_CODE, DEVICE, JSON, MODEL, show
from steep.cli.packages import prepare_imports
from steep.core.errors import ConfigError


def command(
    model: str = MODEL,
    texts: Optional[list[str]] = typer.Argument(
        None, help="Texts as PATH or NAME=PATH. Default: the run's held-out texts."
    ),
    against: Optional[str] = typer.Option(None, help="Another model, or: base.", autocompletion=run_folders),
    tokens: Optional[str] = typer.Option(
        None, help="At most this many tokens of each text. Default: the run's, else 200k."
    ),
    batch_size: int = typer.Option(8, min=1, help="Sequences per forward pass. Does not change the score."),
    sequence_length: Optional[int] = typer.Option(None, min=2, help="Default: the run's, else 1024."),
    text_key: Optional[str] = typer.Option(None, help="JSONL field or Parquet column."),
    harness: Optional[str] = typer.Option(
        None, help="Tasks of lm-eval, joined by commas, instead of texts (extra eval)."
    ),
    harness_path: Optional[str] = typer.Option(None, help="A folder of lm-eval task files."),
    limit: Optional[int] = typer.Option(None, min=1, help="Only this many documents of each lm-eval task."),
    device: str = DEVICE,
    precision: str = typer.Option("auto", help="auto, fp32, mixed_bf16 or bf16."),
    allow_code: Optional[bool] = ALLOW_CODE,
    json: bool = JSON,
) -> None:
    """Perplexity and bits per byte of a model on held-out texts, beside another model's; or tasks of lm-eval."""
    _check_harness(harness, {"--harness-path": harness_path, "--limit": limit}, {
        "texts": texts, "--tokens": tokens, "--sequence-length": sequence_length, "--text-key": text_key})  # fmt: skip
    if harness is not None:
        found: Any = steep.evaluate_tasks(
            model,
            harness,
            folder=harness_path,
            limit=limit,
            against=against,
            batch_size=batch_size,
            device=device,
            precision=precision,
            allow_code=allow_code,
        )
    else:
        prepare_imports(None, model, against)
        found = steep.evaluate(
            model,
            texts,
            against=against,
            tokens=tokens,
            batch_size=batch_size,
            sequence_length=sequence_length,
            device=device,
            precision=precision,
            text_key=text_key,
            allow_code=allow_code,
        )
    show(found, json)


def _check_harness(harness: str | None, of_harness: dict[str, Any], of_texts: dict[str, Any]) -> None:
    """Refuse options of one kind of evaluation that the other ignores. Raises ConfigError."""
    useless = [name for name, value in (of_harness if harness is None else of_texts).items() if value]
    if useless:
        what = "needs --harness TASKS" if harness is None else "applies to texts, not to the tasks of lm-eval"
        raise ConfigError(f"evaluate: {', '.join(useless)} {what}; remove it, or run the command twice")
