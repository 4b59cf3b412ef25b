"""Plain UTF-8 text: one document per file, or split at a separator or at blank lines. Plain, gzip or Zstandard.

In: a file. Out: Documents and Rejected; text is kept as it stands, CRLF included, separators removed.
Memory: one document. Weakness: without a separator that is the whole file, several times over while it is encoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Optional

from steep.sources.config import SourceConfig
from steep.sources.document import Record, Span, decode_text
from steep.sources.files import BLOCK_BYTES, BYTE_ORDER_MARK, open_binary, skip_byte_order_mark

ENDINGS = (".txt", ".text", ".md", ".markdown", ".rst")
BLANK_LINES = "blank_lines"


def read(path: Path, config: SourceConfig, span: Optional[Span] = None) -> Iterator[Record]:
    """Yield the documents of `path`. `span` is accepted for the common interface; a text file is one part.

    A last piece of only white space (after a final separator) is no record; any other empty piece is rejected.
    Raises DataError when the file itself cannot be read.
    """
    separator = config.document_separator
    with open_binary(path) as (stream, tell):
        if separator is None:
            raw = stream.read().removeprefix(BYTE_ORDER_MARK)
            yield decode_text(raw, str(path), 1, tell(), numbered=False)
            return
        pieces = _paragraphs(stream) if separator == BLANK_LINES else _pieces(stream, separator.encode("utf-8"))
        for raw, line in pieces:
            yield decode_text(raw, str(path), line, tell())


def _pieces(stream: IO[bytes], separator: bytes) -> Iterator[tuple[bytes, int]]:
    """Split a stream at `separator`: (bytes, 1-based line at which they start)."""
    pending = bytearray()
    block = skip_byte_order_mark(stream) or stream.read(BLOCK_BYTES)
    line, searched = 1, 0
    while block:
        pending += block
        begin = 0
        while (found := pending.find(separator, max(begin, searched))) >= 0:
            piece = bytes(pending[begin:found])
            yield piece, line
            line += piece.count(b"\n") + separator.count(b"\n")
            begin, searched = found + len(separator), 0
        del pending[:begin]
        searched = max(0, len(pending) - len(separator) + 1)  # a document of many blocks is searched once
        block = stream.read(BLOCK_BYTES)
    if pending and not pending.isspace():
        yield bytes(pending), line


def _paragraphs(stream: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Runs of lines that are not blank: (bytes with their line endings, 1-based first line)."""
    lines: list[bytes] = []
    first = 1
    for number, line in enumerate(stream, 1):
        content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if content.isspace() or not content:
            if lines:
                yield b"".join(lines), first
            lines = []
        else:
            first = first if lines else number
            lines.append(content)
    if lines:
        yield b"".join(lines), first
