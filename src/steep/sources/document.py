"""What every source yields: documents, and records that are not documents. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Optional, Union

NOT_UTF8 = "not UTF-8"
NOT_JSON = "not JSON"
NO_FIELD = "no text field"
WRONG_TYPE = "wrong type"
EMPTY = "empty"
NO_TOKENS = "no tokens"
TOO_LONG = "too long"

LinesBefore = Callable[[], int]
"""The number of lines before the part of the file that is read. Counted at the first call, since the file must be read up to
there."""


class Document(NamedTuple):
    """One text that was read."""

    text: str
    """The text, exactly as stored (line endings kept, a byte order mark at the start of a file removed)."""
    file: str
    row: int
    """1-based line (JSONL, plain text that is split) or row (Parquet) in the part that is read; 0: the file is the document."""
    position: int
    """How far the file had been read when this was yielded, in bytes on disk; for progress only, approximate."""
    lines_before: Optional[LinesBefore] = None

    @property
    def line(self) -> int:
        """1-based line or row of the file; 1 if the file is the document."""
        before = self.lines_before() if self.lines_before is not None else 0
        return max(1, self.row) + before

    @property
    def id(self) -> str:
        """`file:line`, or `file` if the file is the document."""
        return f"{self.file}:{self.line}" if self.row else self.file


@dataclass(frozen=True)
class Rejected:
    """A record that is not a document. The ledger counts it under `reason`."""

    file: str
    line: int
    """1-based line (Parquet: row) at which the record starts."""
    reason: str
    """One of the constants of this module."""
    detail: str = ""
    """What was found, for the person who fixes the file."""
    position: int = 0
    """As `Document.position`."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


Record = Union[Document, Rejected]

Span = tuple[int, int]
"""A part [start, stop) of a file that can be read by itself: bytes of a text file, row groups of a Parquet file, files of a
hub dataset."""


class Location(NamedTuple):
    """Where a record starts, before it is known whether it is a document."""

    file: str
    row: int
    """As `Document.row`."""
    position: int
    lines_before: Optional[LinesBefore] = None

    def reject(self, reason: str, detail: str = "") -> Rejected:
        """The record that starts here, rejected."""
        before = self.lines_before() if self.lines_before is not None else 0
        return Rejected(self.file, max(1, self.row) + before, reason, detail, self.position)


def check_text(value: object, location: Location) -> Record:
    """A Document if `value` is text that is not empty, else why not. White space alone counts as empty."""
    if not isinstance(value, str):
        return location.reject(
            WRONG_TYPE, f"the text is {'null' if value is None else type(value).__name__}, not a string"
        )
    if not value or value.isspace():
        return location.reject(EMPTY)
    return Document(value, *location)


def decode_text(raw: bytes, location: Location) -> Record:
    """As `check_text`, for bytes that should be UTF-8."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return location.reject(NOT_UTF8, "UTF-16 by its byte order mark; convert it with: iconv -f UTF-16 -t UTF-8")
        return location.reject(NOT_UTF8, f"byte 0x{raw[error.start]:02x} at offset {error.start} of the record")
    return check_text(text, location)


def text_record(value: object, location: Location, limit_bytes: int) -> Record:
    """The record of a cell: text, or bytes that should be UTF-8, of at most `limit_bytes` bytes."""
    size = len(value) if isinstance(value, (bytes, str)) else 0
    if isinstance(value, str) and 4 * size > limit_bytes:  # a character takes 1 to 4 bytes
        size = len(value.encode("utf-8"))
    if size > limit_bytes:
        return too_long(size, limit_bytes, location)
    return decode_text(value, location) if isinstance(value, bytes) else check_text(value, location)


def too_long(num_bytes: int, limit_bytes: int, location: Location, remedy: str = "") -> Rejected:
    """A record of more than `max_record_bytes`."""
    detail = f"{num_bytes:,} bytes; max_record_bytes is {limit_bytes:,}"
    return location.reject(TOO_LONG, f"{detail}; {remedy}" if remedy else detail)
