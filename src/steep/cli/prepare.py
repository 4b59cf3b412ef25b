"""`steep prepare`: text -> token store."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

from steep.cli.options import refuse_overrides


def command(
    context: typer.Context,
    inputs: list[str] = typer.Argument(
        help="Files, folders or globs: text, .jsonl, .jsonl.gz, .jsonl.zst, .parquet.", show_default=False
    ),
    tokenizer: str = typer.Option(..., help="Hub id, folder, tokenizer.json, .gguf file.", show_default=False),
    out: Path = typer.Option(..., help="Folder of the token store.", show_default=False),
    format: str = typer.Option("auto", help="auto, plain_text, jsonl or parquet."),
    text_key: Optional[str] = typer.Option(
        None, help="Field or column of the text. Default: text, else content.", show_default=False
    ),
    document_separator: Optional[str] = typer.Option(
        None, help="Plain text: split documents here; blank_lines splits at empty lines.", show_default=False
    ),
    append_eos: bool = typer.Option(True, help="Put the end-of-text token after every document."),
    prepend_bos: Optional[bool] = typer.Option(
        None, help="Put the beginning-of-text token first. Default: as the tokenizer does.", show_default=False
    ),
    workers: Optional[int] = typer.Option(None, min=1, help="Processes. Default: one per core.", show_default=False),
    shard_bytes: str = typer.Option("256MiB", help="Input per shard."),
    on_bad_record: str = typer.Option("skip", help="skip (noted in rejected.jsonl) or stop."),
    tokenizer_backend: str = typer.Option(
        "auto", help="auto, huggingface or gigatoken (extra fast): how fast, never which ids."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace a store that was made from something else."),
) -> None:
    """Turn text into a token store. Killed at any instant, the same command continues where it stopped."""
    refuse_overrides(context)
    from steep.api import prepare
    from steep.core.progress import progress_when_needed

    with progress_when_needed("preparing", "bytes") as show:
        result = prepare(
            inputs,
            tokenizer=tokenizer,
            out=out,
            format=format,
            text_key=text_key,
            document_separator=document_separator,
            append_eos=append_eos,
            prepend_bos=prepend_bos,
            workers=workers,
            shard_bytes=shard_bytes,
            on_bad_record=on_bad_record,
            tokenizer_backend=tokenizer_backend,
            overwrite=overwrite,
            progress=lambda done_bytes, total_bytes, tokens: show(done_bytes, total_bytes),
        )
    typer.echo(str(result))
