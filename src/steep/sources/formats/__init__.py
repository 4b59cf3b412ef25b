"""Formats of raw text, one file each; the file's name is the `format` of a source.

To add a format, add one file with the names of `TextFormat`. tests/contract/test_sources_contract.py checks every file here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Protocol

if TYPE_CHECKING:
    from steep.sources.config import SourceConfig
    from steep.sources.document import Record, Span


class TextFormat(Protocol):
    """What every file of this folder has."""

    ENDINGS: tuple[str, ...]
    """Endings of the format's files in lower case, without `.gz` and `.zst`. No two formats share one."""

    def read(self, path: Path, config: SourceConfig, span: Optional[Span] = None) -> Iterator[Record]:
        """Every record of a file, or of a part of it, in order: a document, or why it is not one.

        Raises DataError for a file that cannot be read.
        """

    def split(self, path: Path, part_bytes: int, config: Optional[SourceConfig] = None) -> list[Span]:
        """Parts of about `part_bytes` on disk that together hold every record once; empty if the file must be read whole."""


class RemoteFormat(TextFormat, Protocol):
    """What the format of something that is not a file on disk also has."""

    def identity(self, path: Path) -> tuple[int, str]:
        """(size in bytes, 0 if unknown; what names the content)."""
