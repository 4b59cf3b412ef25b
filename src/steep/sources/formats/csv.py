"""CSV and TSV: a header, then one record per row, its text in a column. Plain, gzip or Zstandard.

In: a file. Out: Documents and Rejected, each at the line on which its row begins. Rows are read by Python's csv module, strictly:
fields may be quoted, with line ends and doubled quotes inside; a row with other than the header's number of fields is rejected,
since an unquoted comma or line end would have cut its text. `.tsv` has tabs; `.csv` commas, else semicolons, tabs or bars, if
that is what the header needs for the text's column. Memory: the longest row, at most `max_record_bytes`.
Weakness: a quote that is never closed takes what follows up to the next quote with it; a file is read by one process.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, Optional

from steep.core.errors import DataError
from steep.sources.config import SourceConfig
from steep.sources.document import NOT_CSV, Location, Record, Span, check_text, decode_text, no_column, too_long
from steep.sources.files import BYTE_ORDER_MARK, bounded_lines, content_suffix, open_binary

ENDINGS = (".csv", ".tsv", ".tab")
DELIMITERS = (",", ";", "\t", "|")
BATCH_BYTES = 1 << 20
"""Rows are parsed in batches of about this size."""
NEVER_CLOSED = "a quote that opens here is never closed"
UTF16_MARKS = ("\udcff\udcfe", "\udcfe\udcff")  # as decoded below


class Row(NamedTuple):
    """One row, or why it is none."""

    fields: list[str]
    """Bytes that are not UTF-8 are surrogates (PEP 383)."""
    line: int
    """1-based, where it begins."""
    num_bytes: int
    error: str = ""
    is_utf8: bool = True


def read(path: Path, config: SourceConfig, span: Optional[Span] = None) -> Iterator[Record]:
    """Yield the rows of `path`. Raises DataError for a file that cannot be read or has no such column."""
    limit_bytes = config.max_record_bytes
    with open_binary(path, config) as (stream, tell):
        lines = _Lines(stream, limit_bytes)
        first, delimiter = _header(path, lines, config.text_keys)
        lines.begin_data()
        column = next((key for key in config.text_keys if key in first), None)
        if column is None and first:
            rows = next(_batches(lines, delimiter))
            raise DataError(f"{path}: {no_column(first, [row.fields for row in rows], config.text_keys)}")
        number = 0 if column is None else first.index(column)
        for batch in _batches(lines, delimiter):
            position = tell()
            for row in batch:
                location = Location(str(path), row.line, position, None, row.num_bytes)
                yield _record(row, len(first), number, location, limit_bytes)


def split(path: Path, part_bytes: int, config: Optional[SourceConfig] = None) -> list[Span]:
    """Nothing: whether a line end is inside quotes is known only from the start."""
    return []


def _record(row: Row, columns: int, column: int, location: Location, limit_bytes: int) -> Record:
    if row.num_bytes > limit_bytes:
        return too_long(row.num_bytes, limit_bytes, location)
    if row.error:
        return location.reject(NOT_CSV, row.error)
    if len(row.fields) != columns:
        what = "a field with the delimiter or a line end in it must be in quotes"
        return location.reject(NOT_CSV, f"{len(row.fields)} fields, the header has {columns}; {what}")
    text = row.fields[column]
    return check_text(text, location) if row.is_utf8 else decode_text(text.encode("utf-8", "surrogateescape"), location)


def _header(path: Path, lines: _Lines, keys: tuple[str, ...]) -> tuple[list[str], str]:
    """The names of the columns, empty for a file without a row, and the delimiter. Raises DataError for what is not CSV."""
    known = ["\t"] if content_suffix(path) in (".tsv", ".tab") else DELIMITERS
    with _long_fields(lines.limit_bytes):
        row = _next_row(lines, csv.reader(lines, strict=True, delimiter=known[0]))
        if row is None:
            return [], known[0]
        if "".join(lines.of_row[:1]).startswith(UTF16_MARKS):
            raise DataError(f"{path}: is UTF-16 by its byte order mark; convert it with: iconv -f UTF-16 -t UTF-8")
        headers = {}
        for delimiter in known:
            with contextlib.suppress(csv.Error):
                headers[delimiter] = next(csv.reader(lines.of_row, strict=True, delimiter=delimiter), [])
    if not any(headers.values()):
        raise DataError(f"{path}: its first row must name the columns, and it is not CSV: {row.error}")
    fitting = [delimiter for delimiter, names in headers.items() if any(key in names for key in keys)]
    chosen = fitting[0] if fitting else max(headers, key=lambda delimiter: len(headers[delimiter]))
    return headers[chosen], chosen


def _batches(lines: _Lines, delimiter: str) -> Iterator[list[Row]]:
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    row: Optional[Row] = Row([], 0, 0)
    while row is not None:
        batch: list[Row] = []
        num_bytes = 0
        with _long_fields(lines.limit_bytes):
            while num_bytes < BATCH_BYTES and (row := _next_row(lines, reader)) is not None:
                batch.append(row)
                num_bytes += row.num_bytes
        yield batch


def _next_row(lines: _Lines, reader: Iterator[list[str]]) -> Optional[Row]:
    """The next row that is not a blank line; None at the end."""
    while True:
        line = lines.begin_row()
        fields, error = None, ""
        try:
            fields = next(reader, None)
        except csv.Error as problem:
            error = str(problem).partition(" - ")[0]
            if error == "unexpected end of data":
                lines.skip_to_quote()
                error = NEVER_CLOSED
        if fields is None and not error and not lines.num_bytes:
            return None
        if fields != []:
            return Row(fields or [], line, lines.num_bytes, error, lines.is_utf8)


@contextlib.contextmanager
def _long_fields(limit_bytes: int) -> Iterator[None]:
    """Let the csv module take any field that `_Lines` gives it: its own limit is 128 KiB, for the whole process."""
    before = csv.field_size_limit(2 * limit_bytes)  # a line may end just under the limit, and the next is as long again
    try:
        yield
    finally:
        csv.field_size_limit(before)


class _Lines:
    """The lines of a file as the csv module takes them, with what is known of the row that is being read.

    They end, for the moment, where a row is longer than `limit_bytes`: the csv module then gives up that row.
    """

    def __init__(self, stream: IO[bytes], limit_bytes: int):
        self._lines = bounded_lines(stream, limit_bytes)
        self._number = 0
        self._is_data = False
        self.limit_bytes = limit_bytes
        self.begin_row()

    def begin_data(self) -> None:
        """The header is known: from here on the lines of a row are not kept."""
        self._is_data = True

    def begin_row(self) -> int:
        """Forget the row before. Returns the 1-based number of the next line."""
        self.num_bytes, self.is_utf8 = 0, True
        self.of_row: list[str] = []
        return self._number + 1

    def skip_to_quote(self) -> None:
        """Pass over what the open quote of the row still takes: up to a line with one quote, or any odd number."""
        for line in self._lines:
            self._number += 1
            self.num_bytes += line if isinstance(line, int) else len(line)
            if isinstance(line, bytes) and line.count(b'"') % 2:
                return

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self.num_bytes > self.limit_bytes:
            raise StopIteration
        line = next(self._lines)
        self._number += 1
        if isinstance(line, int):
            self.num_bytes += line
            raise StopIteration
        self.num_bytes += len(line)
        if self._number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            self.is_utf8, text = False, line.decode("utf-8", "surrogateescape")
        if not self._is_data:
            self.of_row.append(text)
        return text
