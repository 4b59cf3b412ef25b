"""`steep tokenizer`: whether a tokenizer fits a text, and what more tokens would save."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

import steep
from steep.cli.options import JSON, show
from steep.cli.packages import prepare_text_imports

TEXTS = typer.Argument(..., help="Text files, folders or globs, as for prepare.")
TOKENIZER = typer.Option(..., help="Hub id, folder, tokenizer.json, .gguf file, or run.")


def fertility(
    texts: list[str] = TEXTS,
    tokenizer: str = TOKENIZER,
    general: Optional[str] = typer.Option(None, help="Text of another kind to compare with."),
    json: bool = JSON,
) -> None:
    """Bytes per token, tokens per word, the most expensive words, and whether to extend."""
    prepare_text_imports(tokenizer, [*texts, general or ""])
    show(steep.tokenizer_fertility(texts, tokenizer=tokenizer, general=general), json, ensure_ascii=False)


def extend(
    texts: list[str] = TEXTS,
    tokenizer: str = TOKENIZER,
    tokens: int = typer.Option(1000, min=1, help="Number of new tokens."),
    out: Path = typer.Option(..., help="Folder to write; it must not exist."),
) -> None:
    """Continue the tokenizer's own BPE on the texts, and write the tokenizer with the new tokens."""
    prepare_text_imports(tokenizer, texts)
    typer.echo(steep.tokenizer_extend(texts, tokenizer=tokenizer, tokens=tokens, out=out).to_text())
