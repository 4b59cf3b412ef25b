"""What every source yields: documents, and records that are not documents. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Union

NOT_UTF8 = "not UTF-8"
NOT_JSON = "not JSON"
NOT_CSV = "not CSV"
NO_FIELD = "no text field"
WRONG_TYPE = "wrong type"
EMPTY = "empty"
NO_TOKENS = "no tokens"
TOO_LONG = "too long"

CHAT_FIELDS = {"messages": ("role", "content"), "conversations": ("from", "value"), "conversation": ("role", "content")}
"""Fields with the turns of a chat, and what the fields of a turn are usually called there."""
CHAT = " (a chat)"
CHAT_REFUSED = "chat records are not read as text; write each as one text first"
PAIRS = (("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("prompt", "response"),
         ("question", "answer"))  # fmt: skip
"""Fields that together make one text of an instruction record; the longer one alone would be half of it."""
PAIR = " (an instruction)"
PAIR_REFUSED = "instruction records are not read as text, since one field is half of it; write each as one text first"

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
    num_bytes: int = 0
    """Size of the record as it is stored, decompressed; of a Parquet row, its text. 0 where it has none."""
    other_field: str = ""
    """Of a record without the text field: the field that probably holds its text, with `CHAT` or `PAIR` after it where
    the records have to be written as texts first."""

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
    num_bytes: int = 0
    """As `Rejected.num_bytes`."""

    def reject(self, reason: str, detail: str = "", other_field: str = "") -> Rejected:
        """The record that starts here, rejected."""
        before = self.lines_before() if self.lines_before is not None else 0
        line = max(1, self.row) + before
        return Rejected(self.file, line, reason, detail, self.position, self.num_bytes, other_field)

    def accept(self, text: str) -> Document:
        """The record that starts here, a document."""
        return Document(text, self.file, self.row, self.position, self.lines_before)


def check_text(value: object, location: Location) -> Record:
    """A Document if `value` is text that is not empty, else why not. White space alone counts as empty."""
    if not isinstance(value, str):
        return location.reject(
            WRONG_TYPE, f"the text is {'null' if value is None else type(value).__name__}, not a string"
        )
    if not value or value.isspace():
        return location.reject(EMPTY)
    return location.accept(value)


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
    location = location._replace(num_bytes=size)
    if size > limit_bytes:
        return too_long(size, limit_bytes, location)
    return decode_text(value, location) if isinstance(value, bytes) else check_text(value, location)


def too_long(num_bytes: int, limit_bytes: int, location: Location, remedy: str = "") -> Rejected:
    """A record of more than `max_record_bytes`."""
    detail = f"{num_bytes:,} bytes; max_record_bytes is {limit_bytes:,}"
    return location._replace(num_bytes=num_bytes).reject(TOO_LONG, f"{detail}; {remedy}" if remedy else detail)


def field_text(record: Mapping[Any, object], keys: tuple[str, ...], location: Location) -> Record:
    """The record of an object whose text is in the first of `keys` that it has."""
    for key in keys:
        if key in record:
            return check_text(record[key], location)
    return without_text(record, keys, location)


def without_text(
    record: Mapping[Any, object], keys: tuple[str, ...], location: Location, what: str = "fields"
) -> Rejected:
    """A record that has none of `keys`, with the field that probably holds its text: its longest string."""
    found = ", ".join(map(repr, list(record)[:8])) or "none"
    texts = [(len(value), name) for name, value in record.items() if isinstance(value, str) and isinstance(name, str)]
    chat = next((name for name in CHAT_FIELDS if isinstance(record.get(name), list)), None)
    pair = next((pair for pair in PAIRS if all(isinstance(record.get(name), str) for name in pair)), None)
    other = max(texts, default=(0, ""))[1]
    if chat:
        other = f"{chat}{CHAT}"
    elif pair:
        other = f"{' '.join(pair)}{PAIR}"
    advice = "" if not other else f"; {advice_for(other)}"
    return location.reject(NO_FIELD, f"no {' or '.join(map(repr, keys))}; {what}: {found}{advice}", other)


def no_column(names: Sequence[str], rows: Iterable[Sequence[object]], keys: tuple[str, ...]) -> str:
    """What is wrong with a table without a column of `keys`, and the column that probably holds the text: that with most
    characters in `rows`."""
    lengths = [0] * len(names)
    for row in rows:
        for number, value in enumerate(row[: len(names)]):
            lengths[number] += len(value) if isinstance(value, str) else 0
    best = max(range(len(names)), key=lengths.__getitem__)
    advice = f"set text_key: {names[best]}" if lengths[best] else "set text_key to the one with the text"
    if any(name in CHAT_FIELDS for name in names):
        advice = CHAT_REFUSED
    elif any(set(pair) <= set(names) for pair in PAIRS):
        advice = PAIR_REFUSED
    return f"has no column {' or '.join(map(repr, keys))}; {advice} (columns: {', '.join(map(repr, names))})."


def needs_writing(other_field: str) -> bool:
    """Whether the records have to be written as texts first, so that no `text_key` would read them."""
    return other_field in _TO_WRITE


def advice_for(other_field: str) -> str:
    """What to do about records whose text is in `other_field` (`Rejected.other_field`)."""
    return _TO_WRITE.get(other_field) or f"set text_key: {other_field}"


def _chat_advice(field: str) -> str:
    who, what = CHAT_FIELDS[field]
    turns = rf'[.{field}[] | "\(.{who}): \(.{what})"] | join("\n\n")'
    return f"{CHAT_REFUSED}, for example: jq -c '{{text: ({turns})}}' chat.jsonl > text.jsonl"


def _pair_advice(first: str, last: str) -> str:
    parts = rf'[.{first}, .input, .{last}] | map(select(. != null and . != "")) | join("\n\n")'
    return f"{PAIR_REFUSED}, for example: jq -c '{{text: ({parts})}}' records.jsonl > text.jsonl"


_TO_WRITE = {
    **{f"{field}{CHAT}": _chat_advice(field) for field in CHAT_FIELDS},
    **{f"{' '.join(pair)}{PAIR}": _pair_advice(*pair) for pair in PAIRS},
}
"""By `Rejected.other_field`: how to write records as texts."""
