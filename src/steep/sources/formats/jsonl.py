"""JSONL: one JSON object per line, its text in a field. Plain, gzip or Zstandard.

In: a file, or a byte range of an uncompressed one (a line belongs to the range that holds its first byte).
Out: Documents and Rejected. Memory: the longest line, at most `max_record_bytes`; a longer one is skipped and rejected.
Lines of only white space are not records and are not counted. Of a key that occurs twice in an object, the last counts.
A number that no JSON parser has to take (NaN, 1e400) does not cost a record its text.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import orjson

from steep.core.errors import DataError
from steep.sources.config import SourceConfig
from steep.sources.document import (
    NO_FIELD,
    NOT_JSON,
    NOT_UTF8,
    Document,
    LinesBefore,
    Location,
    Record,
    Rejected,
    Span,
    field_text,
    too_long,
)
from steep.sources.files import (
    BYTE_ORDER_MARK,
    LinesBeforeOffset,
    bounded_lines,
    compression_of,
    open_binary,
    reading,
    skip_line,
)

ENDINGS = (".jsonl", ".ndjson")
JSON_TYPES = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


def read(path: Path, config: SourceConfig, span: Optional[Span] = None) -> Iterator[Record]:
    """Yield the records of `path`, or of its bytes `span`. Raises DataError when the file itself cannot be read."""
    keys, name, limit_bytes = config.text_keys, str(path), config.max_record_bytes
    start, stop = span or (0, None)
    with open_binary(path, config) as (stream, tell):
        is_compressed = bool(compression_of(path))
        offset = seek_line(stream, path, start)
        lines_before: Optional[LinesBefore] = LinesBeforeOffset(path, offset) if offset else None
        row = 0
        for line in bounded_lines(stream, limit_bytes):
            if stop is not None and offset >= stop:
                return
            row += 1
            if line == b"\n":  # millions of them are a way to keep a reader busy
                offset += 1
                continue
            content = line.removeprefix(BYTE_ORDER_MARK) if offset == 0 and isinstance(line, bytes) else line
            offset += line if isinstance(line, int) else len(line)
            position = tell() if is_compressed else offset - start
            if isinstance(content, int):
                yield too_long(content, limit_bytes, Location(name, row, position, lines_before))
                continue
            if not content or content.isspace():
                continue
            text = _usual_text(content, keys)
            if text is not None:
                yield Document(text, name, row, position, lines_before)
            else:
                yield parse_line(content, keys, Location(name, row, position, lines_before))


def parse_line(line: bytes, keys: tuple[str, ...], location: Location) -> Record:
    """The record in one line."""
    location = location._replace(num_bytes=len(line))
    value = parse_json(line, location)
    if isinstance(value, Rejected):
        return value
    if not isinstance(value, dict):
        remedy = "; a file that is one array is read with format: json" if isinstance(value, list) else ""
        return location.reject(NO_FIELD, f"a JSON {JSON_TYPES[type(value)]}, not an object{remedy}")
    return whole_characters(field_text(value, keys, location), location)


def parse_json(raw: bytes, location: Location) -> Any:
    """The value in `raw`, or a Rejected.

    What orjson refuses and Python's parser takes, at a third of the speed, is taken: NaN, Infinity, 1e400, thousands of
    digits, half of a surrogate pair. They do not cost a record its text if they stand in another field.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        try:
            return json.loads(raw.decode("utf-8"), parse_int=float)  # an int of more than 4,300 digits would be refused
        except UnicodeDecodeError as problem:
            return location.reject(NOT_UTF8, f"byte 0x{raw[problem.start]:02x} at offset {problem.start}")
        except (ValueError, RecursionError):
            return location.reject(NOT_JSON, str(error)[:200])


def whole_characters(record: Record, location: Location) -> Record:
    """The record, rejected if its text holds half of a surrogate pair, which no tokenizer can encode."""
    try:
        if isinstance(record, Document):
            record.text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(error.object[error.start]):04X}"
        return location.reject(NOT_JSON, f"half of a surrogate pair, {half}, at character {error.start} of the text")
    return record


def _usual_text(line: bytes, keys: tuple[str, ...]) -> Optional[str]:
    """The text of a valid record; None for any other, which `parse_line` then examines."""
    try:
        value = orjson.loads(line)
        for key in keys:
            if key in value:
                text = value[key]
                return text if type(text) is str and text and not text.isspace() else None
    except (orjson.JSONDecodeError, TypeError, IndexError):
        return None
    return None


def split(path: Path, part_bytes: int, config: Optional[SourceConfig] = None) -> list[Span]:
    """Byte ranges of about `part_bytes`; none for a compressed file."""
    return [] if compression_of(path) else byte_ranges(path, part_bytes)


def byte_ranges(path: Path, part_bytes: int) -> list[Span]:
    """The bytes of a file in equal ranges of about `part_bytes`. Raises DataError if it cannot be read."""
    with reading(path):
        size = path.stat().st_size
    count = max(1, round(size / part_bytes))
    edges = [size * part // count for part in range(count + 1)]
    return list(itertools.pairwise(edges))


def seek_line(stream: Any, path: Path, start: int) -> int:
    """Go to the first line that starts at or after byte `start`; returns the byte at which it starts."""
    if start == 0:
        return 0
    if compression_of(path):
        raise DataError(f"{path}: a compressed file cannot be read from its middle")
    stream.seek(start - 1)
    return start - 1 + skip_line(stream)
