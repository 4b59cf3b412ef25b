"""Plain UTF-8 text: one document per file, or split at a separator or at blank lines. Plain, gzip or Zstandard.

In: a file, or a byte range of an uncompressed one that is split into documents (a document belongs to the range that holds
its first byte). Out: Documents and Rejected; text is kept as it is, CRLF included; separators are removed.
Memory: one document, at most `max_record_bytes`, several times over while it is encoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Optional, Union

from steep.sources.config import SourceConfig
from steep.sources.document import LinesBefore, Location, Record, Span, decode_text, too_long
from steep.sources.files import (
    BLOCK_BYTES,
    BYTE_ORDER_MARK,
    LinesBeforeOffset,
    bounded_lines,
    compression_of,
    open_binary,
    reading,
)
from steep.sources.formats.jsonl import byte_ranges, seek_line

ENDINGS = (".txt", ".text", ".md", ".markdown", ".rst")
BLANK_LINES = "blank_lines"

Piece = tuple[Union[bytes, int], int, int]
"""(bytes, or only their number if there are too many; 1-based line within the part; byte of the file) of a document."""


def read(path: Path, config: SourceConfig, span: Optional[Span] = None) -> Iterator[Record]:
    """Yield the documents of `path`, or of its bytes `span`.

    A last piece of only white space (after a final separator) is not a record; any other empty piece is rejected.
    Raises DataError when the file itself cannot be read.
    """
    separator, name, limit_bytes = config.document_separator, str(path), config.max_record_bytes
    start, stop = span or (0, None)
    with open_binary(path, config) as (stream, tell):
        if separator is None:
            yield _whole_file(stream, path, limit_bytes)
            return
        if separator == BLANK_LINES:
            offset = seek_line(stream, path, start)
            pieces = _paragraphs(
                stream, limit_bytes, offset, follows_text=offset > 0 and _follows_text(path, offset, limit_bytes)
            )
        else:
            offset = _seek_separator(stream, path, start, separator.encode("utf-8"))
            pieces = _pieces(stream, separator.encode("utf-8"), limit_bytes, offset)
        lines_before: Optional[LinesBefore] = LinesBeforeOffset(path, offset) if offset else None
        for raw, line, begin in pieces:
            if stop is not None and begin >= stop:
                return
            size = raw if isinstance(raw, int) else len(raw)
            location = Location(name, line, tell() if stop is None else begin - start, lines_before, size)
            yield too_long(raw, limit_bytes, location) if isinstance(raw, int) else decode_text(raw, location)


def split(path: Path, part_bytes: int, config: Optional[SourceConfig] = None) -> list[Span]:
    """Byte ranges of about `part_bytes`; none where documents cannot be found from the middle: a file that is one
    document, a compressed file, or a separator that can overlap itself (its matches depend on where the search began)."""
    separator = None if config is None else config.document_separator
    if separator is None or compression_of(path):
        return []
    raw = separator.encode("utf-8")
    overlaps_itself = any(raw[:length] == raw[-length:] for length in range(1, len(raw)))  # as in "\n===\n"
    return [] if overlaps_itself and separator != BLANK_LINES else byte_ranges(path, part_bytes)


def _whole_file(stream: IO[bytes], path: Path, limit_bytes: int) -> Record:
    raw = stream.read(limit_bytes + 1)
    if len(raw) > limit_bytes:
        num_bytes = len(raw)
        while block := stream.read(BLOCK_BYTES):  # to the end, so that damage is noticed
            num_bytes += len(block)
        remedy = "split the file with document_separator (blank_lines, or a string such as <|endoftext|>), or raise it"
        return too_long(num_bytes, limit_bytes, Location(str(path), 0, num_bytes), remedy)
    return decode_text(raw.removeprefix(BYTE_ORDER_MARK), Location(str(path), 0, len(raw), num_bytes=len(raw)))


def _seek_separator(stream: IO[bytes], path: Path, start: int, separator: bytes) -> int:
    """Go to the first document that starts at or after byte `start`; returns that byte, or the end of the file."""
    if start == 0:
        return 0
    offset = max(0, start - len(separator))
    stream.seek(offset)
    pending = b""
    while block := stream.read(BLOCK_BYTES):
        pending += block
        found = pending.find(separator)
        if found >= 0:
            begin = offset + found + len(separator)
            stream.seek(begin)
            return begin
        kept = pending[max(0, len(pending) - len(separator) + 1) :]
        offset += len(pending) - len(kept)
        pending = kept
    return offset + len(pending)


def _follows_text(path: Path, offset: int, limit_bytes: int) -> bool:
    """Whether the line before the one that starts at byte `offset` belongs to a document. A line over the limit does,
    whatever it holds: a reader that comes from the start of the file sees only its length."""
    with reading(path), open(path, "rb") as file:
        stop = offset
        while stop:
            begin = max(0, stop - BLOCK_BYTES)
            file.seek(begin)
            block = file.read(stop - begin)
            line = block[:-1] if stop == offset else block
            cut = line.rfind(b"\n")
            content = line[cut + 1 :]
            if begin == 0 and cut < 0:
                content = content.removeprefix(BYTE_ORDER_MARK)
            # counted as in `bounded_lines`, with the line's end
            over_limit = offset - (begin + cut + 1) > limit_bytes + 1
            if over_limit or (content and not content.isspace()):
                return True
            if cut >= 0:
                return False
            stop = begin
    return False


def _pieces(stream: IO[bytes], separator: bytes, limit_bytes: int = 2**62, offset: int = 0) -> Iterator[Piece]:
    """Split a stream at `separator`. offset: the stream's position in the file, in bytes."""
    pending = bytearray()
    block = b"" if offset else stream.read(len(BYTE_ORDER_MARK))
    line, begin_at, searched, skipped, skipped_lines = 1, offset, 0, 0, 0
    mark_bytes = len(BYTE_ORDER_MARK) if block == BYTE_ORDER_MARK else 0
    if mark_bytes:
        block, begin_at = b"", -1  # the first document begins with the file: its range is that of byte 0
    block = block or stream.read(BLOCK_BYTES)
    while block:
        pending += block
        begin = 0
        while (found := pending.find(separator, max(begin, searched))) >= 0:
            piece = bytes(pending[begin:found])
            num_bytes = skipped + len(piece)
            yield (num_bytes if num_bytes > limit_bytes else piece), line, max(0, begin_at)
            line += skipped_lines + piece.count(b"\n") + separator.count(b"\n")
            begin_at = (mark_bytes if begin_at < 0 else begin_at) + num_bytes + len(separator)
            begin, searched, skipped, skipped_lines = found + len(separator), 0, 0, 0
        del pending[:begin]
        searched = max(0, len(pending) - len(separator) + 1)  # a document of many blocks is searched once
        if skipped + len(pending) > limit_bytes + len(separator):
            # too long whatever follows: only its end is looked for
            skipped += searched
            skipped_lines += pending.count(b"\n", 0, searched)
            del pending[:searched]
            searched = 0
        block = stream.read(BLOCK_BYTES)
    num_bytes = skipped + len(pending)
    if num_bytes > limit_bytes:
        yield num_bytes, line, max(0, begin_at)
    elif pending and not pending.isspace():
        yield bytes(pending), line, max(0, begin_at)


def _paragraphs(stream: IO[bytes], limit_bytes: int, offset: int, *, follows_text: bool) -> Iterator[Piece]:
    """Runs of lines that are not blank, with their line endings.

    offset: the stream's position in the file, in bytes, at the start of a line. follows_text: the line before it is
    not blank, so that the first lines belong to a document that began earlier.
    """
    lines: list[bytes] = []
    skipping, num_bytes, first, first_at, at = follows_text, 0, 1, offset, offset
    for number, line in enumerate(bounded_lines(stream, limit_bytes), 1):
        size = line if isinstance(line, int) else len(line)
        at += size
        if isinstance(line, bytes) and at == size:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if isinstance(line, bytes) and (not line or line.isspace()):
            if num_bytes:
                yield (num_bytes if num_bytes > limit_bytes else b"".join(lines)), first, first_at
            lines, num_bytes, skipping = [], 0, False
        elif not skipping:
            if not num_bytes:
                first, first_at = number, at - size
            num_bytes += line if isinstance(line, int) else len(line)
            if isinstance(line, bytes) and num_bytes <= limit_bytes:
                lines.append(line)
            else:
                lines.clear()
    if num_bytes:
        yield (num_bytes if num_bytes > limit_bytes else b"".join(lines)), first, first_at
