"""What every source yields: documents, and records that are none. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Union

NOT_UTF8 = "not UTF-8"
NOT_JSON = "not JSON"
NO_FIELD = "no text field"
WRONG_TYPE = "wrong type"
EMPTY = "empty"
NO_TOKENS = "no tokens"


class Document(NamedTuple):
    """One text that was read."""

    text: str
    """The text, exactly as stored (line endings kept, a byte order mark at the start of a file removed)."""
    id: str
    """Where it stands: `file:line` (JSONL, plain text that is split) or `file:row` (Parquet), 1-based; else `file`."""
    position: int
    """How far the file had been read when this was yielded, in bytes on disk; for progress only, approximate."""


@dataclass(frozen=True)
class Rejected:
    """One record that is no document. The ledger counts it under `reason`."""

    file: str
    line: int
    """1-based line (Parquet: row) at which the record starts."""
    reason: str
    """One of the constants of this module."""
    detail: str = ""
    """What was found, for the person who mends the file."""
    position: int = 0
    """As `Document.position`."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


Record = Union[Document, Rejected]

Span = tuple[int, int]
"""A part [start, stop) of a file that is read by itself: bytes of a JSONL file, row groups of a Parquet file."""


def check_text(value: object, file: str, line: int, position: int, *, numbered: bool = True) -> Record:
    """A Document if `value` is text with something in it, else why not. White space alone counts as empty."""
    if not isinstance(value, str):
        found = "null" if value is None else type(value).__name__
        return Rejected(file, line, WRONG_TYPE, f"the text is {found}, not a string", position)
    if not value or value.isspace():
        return Rejected(file, line, EMPTY, "", position)
    return Document(value, f"{file}:{line}" if numbered else file, position)


def decode_text(raw: bytes, file: str, line: int, position: int, *, numbered: bool = True) -> Record:
    """The same for bytes that should be UTF-8."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Rejected(file, line, NOT_UTF8, _describe_bytes(raw, error), position)
    return check_text(text, file, line, position, numbered=numbered)


def _describe_bytes(raw: bytes, error: UnicodeDecodeError) -> str:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16 by its byte order mark; convert it with: iconv -f UTF-16 -t UTF-8"
    return f"byte 0x{raw[error.start]:02x} at offset {error.start} of the record"
