"""`steep.prepare`: text at paths and a tokenizer's name to a token store. What does the work is `prepare_sources`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Optional, Union

from steep.config.checks import data_paths_exist, model_files_exist
from steep.config.sections import checked_section
from steep.core.errors import ConfigError, DataError, ModelError
from steep.core.public import public
from steep.runtime.ranks import join_ranks
from steep.sources.config import TEXT_FORMATS, SourceConfig
from steep.sources.hints import say_hints
from steep.sources.inputs import STANDARD_INPUT
from steep.store.config import PrepareConfig
from steep.store.export_tokens import SHARD_TOKENS, write_format
from steep.store.formats import writable_formats
from steep.store.prepare import Progress, prepare_sources
from steep.store.prepare_result import PrepareResult
from steep.store.reader import open_store
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.open import load_tokenizer

PathLike = Union[str, os.PathLike[str]]
Number = Union[int, str]
"""A count or size, as a number or as text: 500_000_000, "500M", "64MiB"."""


@public
def prepare(
    inputs: Union[PathLike, Sequence[PathLike]], *, tokenizer: str, out: PathLike, format: Optional[str] = None,
    input_format: str = "auto", text_key: Optional[str] = None, document_separator: Optional[str] = None,
    append_eos: bool = True, prepend_bos: Optional[bool] = None, max_tokens: Optional[Number] = None,
    min_tokens: Optional[Number] = None, max_tokens_per_document: Optional[Number] = None,
    dedup: Optional[str] = None, check_against: Optional[Sequence[str]] = None,
    drop_contaminated: bool = False, workers: Optional[int] = None, tokenizer_backend: str = "auto",
    shard_bytes: Number = 256 * 2**20, shard_tokens: Optional[Number] = None, max_record_bytes: Number = 64 * 2**20,
    max_expansion: int = 200, max_expanded_bytes: Optional[Number] = None,
    on_bad_record: str = "skip", overwrite: bool = False, progress: Optional[Progress] = None,
) -> PrepareResult:  # fmt: skip
    """Turn text into a token store (Megatron .bin/.idx with a manifest). Interrupted, the same call continues.

    inputs: files, folders, globs, `hub:NAME:CONFIG:SPLIT`, or `-` for standard input. input_format: auto, code, csv, json, jsonl,
    parquet or plain_text. text_key, document_separator, max_record_bytes, max_expansion, max_expanded_bytes: as for a source of
    `data.train`.
    tokenizer: hub id, folder, tokenizer.json or .gguf file. append_eos, prepend_bos: as in the section `tokenizer`.
    out: the store's folder. format: `megatron`, `nanogpt`, `llm_c` or `automodel` also writes the tokens as that tool's files, in
    `out`/format. overwrite: replace a store that was made from something else.
    max_tokens, min_tokens, max_tokens_per_document, dedup, check_against, drop_contaminated, workers, tokenizer_backend,
    shard_bytes, shard_tokens, on_bad_record: as in the section `data.prepare`.
    progress: called with bytes done, bytes in all, tokens written.
    Raises ConfigError for arguments and DataError for inputs that cannot be used.
    """
    given = dict(locals())
    join_ranks()
    if format is not None and format not in writable_formats():
        hint = f" For the format of the input: --input-format {format}." if format in ("auto", *TEXT_FORMATS) else ""
        raise ConfigError(f"format {format!r}: steep writes {', '.join(writable_formats())}.{hint}")
    paths = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    keys = ("text_key", "document_separator", "max_record_bytes", "max_expansion", "max_expanded_bytes")
    named = {"path": [str(path) for path in paths], "format": input_format}
    source = checked_section(SourceConfig, {**named, **{key: given[key] for key in keys}})
    config = checked_section(PrepareConfig, {key: given[key] for key in PrepareConfig.model_fields})
    policy = TokenizerConfig(pretrained=tokenizer, append_eos=append_eos, prepend_bos=prepend_bos)
    _check_paths([*paths, *(check_against or [])], tokenizer)
    result = prepare_sources([source], load_tokenizer(policy), Path(out), config, progress, overwrite=overwrite)
    hints: list[str] = []
    say_hints(source, hints.append)
    result = replace(result, hints=tuple(hints))
    if format is None:
        return result
    folder = result.path / format
    if not folder.is_dir():  # it is whole or absent, and goes when the store is replaced
        write_format(open_store(result.path), folder, format, shard_tokens=config.shard_tokens or SHARD_TOKENS)
    return replace(result, files=tuple(sorted(folder.glob("*.bin"))))


def _check_paths(texts: Sequence[PathLike], tokenizer: str) -> None:
    """Raise DataError or ModelError for a path that leads nowhere: before the tokenizer is loaded, which takes a second."""
    named = [str(path) for path in texts if str(path) != STANDARD_INPUT]
    for problem in data_paths_exist({"data": {"train": [{"path": named}]}}):
        raise DataError(problem.message)
    for problem in model_files_exist({"tokenizer": {"pretrained": tokenizer}}):
        raise ModelError(f"--tokenizer {problem.message}")
