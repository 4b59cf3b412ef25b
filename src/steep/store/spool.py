"""Standard input as a file: it can be neither split nor read twice, so it is written to disk before it is prepared.

Memory: a megabyte. The copy lies in the store's unfinished folder and is removed at the end. A killed `prepare` continues
when the same text is piped in again.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from steep.core.errors import DataError
from steep.core.files import atomic_writer
from steep.sources.config import SourceConfig
from steep.sources.inputs import STANDARD_INPUT, paths_of

SPOOL_FILE = "standard_input"
SHOWN_NAME = "standard input"
_BLOCK_BYTES = 1 << 20


def shown_name(file: str, folder: Path) -> str:
    """A source file's name in messages: its path, or `standard input` for the copy in `folder`."""
    return SHOWN_NAME if file == str(folder / SPOOL_FILE) else file


def spool_standard_input(source: SourceConfig, folder: Path) -> SourceConfig:
    """Copy standard input to `folder` if the source names it (`-`), and return the source with the copy's path.

    Raises DataError if `-` is given with other paths or without a format, or if nothing is piped in.
    """
    paths = paths_of(source)
    if STANDARD_INPUT not in paths:
        return source
    if len(paths) > 1:
        raise DataError("- is standard input and was given with other paths; prepare it by itself.")
    if source.format == "auto":
        raise DataError(
            "- is standard input, whose format cannot be read from a file name: add --input-format jsonl or plain_text."
        )
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError(
            "- is standard input, and nothing is piped into it. For example: zcat a.gz | steep prepare - ..."
        )
    with atomic_writer(folder / SPOOL_FILE) as file:
        shutil.copyfileobj(sys.stdin.buffer, file, _BLOCK_BYTES)
    return source.model_copy(update={"path": str(folder / SPOOL_FILE), "name": source.name or SHOWN_NAME})
