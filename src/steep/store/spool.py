"""Standard input as a file: it can be neither split nor read again, so it is written to disk before it is prepared.

Memory: a megabyte. The copy stands in the store's folder of the unfinished and is removed at the end. A `prepare` that was
killed continues when the same text is piped in again.
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
    """How a source file is called in messages: its path, or what the copy in `folder` is a copy of."""
    return SHOWN_NAME if file == str(folder / SPOOL_FILE) else file


def spool_standard_input(source: SourceConfig, folder: Path) -> SourceConfig:
    """Copy standard input to `folder` if the source names it (`-`), and give the source that names the copy.

    Raises DataError if `-` stands beside other paths, without a format, or if nobody writes to standard input.
    """
    paths = paths_of(source)
    if STANDARD_INPUT not in paths:
        return source
    if len(paths) > 1:
        raise DataError("- is standard input and stands beside other paths; prepare it alone.")
    if source.format == "auto":
        raise DataError(
            "- is standard input, which has no ending that tells its format: add --input-format jsonl or plain_text."
        )
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError(
            "- is standard input, and nothing is piped into it. For example: zcat a.gz | steep prepare - ..."
        )
    with atomic_writer(folder / SPOOL_FILE) as file:
        shutil.copyfileobj(sys.stdin.buffer, file, _BLOCK_BYTES)
    return source.model_copy(update={"path": str(folder / SPOOL_FILE), "name": source.name or SHOWN_NAME})
