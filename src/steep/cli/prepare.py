"""`steep prepare`: text -> token store."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

import steep
from steep.cli.packages import prepare_text_imports
from steep.core.progress import progress_when_needed


def command(
    inputs: list[str] = typer.Argument(
        help="Files, folders or globs: text, code, .jsonl, .json, .csv, .tsv, each also .gz or .zst; .parquet; "
        "hub:NAME:CONFIG:SPLIT; - for standard input."
    ),
    tokenizer: str = typer.Option(..., help="Hub id, folder, tokenizer.json, .gguf file."),
    out: Path = typer.Option(..., help="Folder of the token store."),
    format: Optional[str] = typer.Option(
        None, help="Also write the tokens as files of megatron, nanogpt, llm_c or automodel, in OUT/FORMAT."
    ),
    input_format: str = typer.Option("auto", help="auto, code, csv, json, jsonl, parquet or plain_text."),
    text_key: Optional[str] = typer.Option(None, help="Field or column of the text. Default: text, else content."),
    document_separator: Optional[str] = typer.Option(
        None, help="Plain text: split documents here; blank_lines splits at empty lines."
    ),
    append_eos: bool = typer.Option(True, help="Put the end-of-text token after every document."),
    prepend_bos: Optional[bool] = typer.Option(
        None, help="Put the beginning-of-text token first. Default: as the tokenizer does."
    ),
    max_tokens: Optional[str] = typer.Option(None, help="Stop at this many tokens, in input order, such as 500M."),
    min_tokens: Optional[str] = typer.Option(None, help="Drop shorter documents."),
    max_tokens_per_document: Optional[str] = typer.Option(None, help="Drop longer documents."),
    dedup: Optional[str] = typer.Option(
        None, help="exact or minhash: keep the first of equal, or nearly equal, documents."
    ),
    check_against: Optional[list[str]] = typer.Option(
        None, help="Evaluation texts: list the documents that share 13 words in a row with one."
    ),
    drop_contaminated: bool = typer.Option(False, "--drop-contaminated", help="Drop what --check-against finds."),
    workers: Optional[int] = typer.Option(None, min=1, help="Processes. Default: one per core."),
    tokenizer_backend: str = typer.Option("auto", help="auto, huggingface or gigatoken; the ids are the same."),
    shard_tokens: Optional[str] = typer.Option(
        None, help="Shards of at most this many tokens. Default: 256 MiB of input each."
    ),
    max_record_bytes: str = typer.Option("64MiB", help="Reject longer lines, documents and cells."),
    max_expansion: int = typer.Option(
        200, min=1, help="Refuse a .gz or .zst file that grows by more than this factor."
    ),
    max_expanded_bytes: Optional[str] = typer.Option(None, help="Refuse a .gz or .zst file with more text."),
    on_bad_record: str = typer.Option("skip", help="skip (noted in rejected.jsonl) or stop."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace a store that was made from something else."),
) -> None:
    """Turn text into a token store. If it is killed, the same command continues where it stopped."""
    prepare_text_imports(tokenizer, [*inputs, *(check_against or [])])
    with progress_when_needed("preparing", "bytes") as show:
        result = steep.prepare(
            inputs,
            tokenizer=tokenizer,
            out=out,
            format=format,
            input_format=input_format,
            text_key=text_key,
            document_separator=document_separator,
            append_eos=append_eos,
            prepend_bos=prepend_bos,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            max_tokens_per_document=max_tokens_per_document,
            dedup=dedup,
            check_against=check_against or None,
            drop_contaminated=drop_contaminated,
            workers=workers,
            tokenizer_backend=tokenizer_backend,
            shard_tokens=shard_tokens,
            max_record_bytes=max_record_bytes,
            max_expansion=max_expansion,
            max_expanded_bytes=max_expanded_bytes,
            on_bad_record=on_bad_record,
            overwrite=overwrite,
            progress=lambda done_bytes, total_bytes, tokens: show(done_bytes, total_bytes),
        )
    typer.echo(str(result))
