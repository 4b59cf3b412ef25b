"""JSONL: one JSON object per line, its text in a field. Plain, gzip or Zstandard.

In: a file, or a byte range of an uncompressed one (a line belongs to the range that holds its first byte).
Out: Documents and Rejected. Memory: the longest line. Lines of only white space hold no record and are not counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from steep.core.errors import DataError
from steep.sources.config import SourceConfig
from steep.sources.document import NO_FIELD, NOT_JSON, NOT_UTF8, Record, Rejected, Span, check_text
from steep.sources.files import BLOCK_BYTES, BYTE_ORDER_MARK, compression_of, open_binary, reading

ENDINGS = (".jsonl", ".ndjson", ".json")
DEFAULT_KEYS = ("text", "content")


def read(path: Path, config: SourceConfig, span: Optional[Span] = None) -> Iterator[Record]:
    """Yield the records of `path`, or of its bytes `span`. Raises DataError when the file itself cannot be read."""
    keys = DEFAULT_KEYS if config.text_key is None else (config.text_key,)
    start, stop = span or (0, None)
    with open_binary(path) as (stream, tell):
        number = _seek_line(stream, path, start)
        offset = stream.tell() if start else 0
        for line in stream:
            if stop is not None and offset >= stop:
                return
            content = line.removeprefix(BYTE_ORDER_MARK) if offset == 0 else line
            offset += len(line)
            number += 1
            if content and not content.isspace():
                position = tell() if stop is None else offset - start
                yield parse_line(content, keys, str(path), number, position)


def parse_line(line: bytes, keys: tuple[str, ...], file: str, number: int, position: int) -> Record:
    """The record in one line."""
    import orjson

    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return _why_not_json(line, error, file, number, position)
    if not isinstance(value, dict):
        return Rejected(file, number, NO_FIELD, f"a JSON {_json_type(value)}, not an object", position)
    for key in keys:
        if key in value:
            return check_text(value[key], file, number, position)
    wanted = " or ".join(map(repr, keys))
    found = ", ".join(map(repr, list(value)[:8])) or "none"
    return Rejected(file, number, NO_FIELD, f"no {wanted}; fields: {found}", position)


def split(path: Path, part_bytes: int) -> list[Span]:
    """Byte ranges of about `part_bytes` that can be read by themselves; none for a compressed file."""
    if compression_of(path):
        return []
    with reading(path):
        size = path.stat().st_size
    count = max(1, round(size / part_bytes))
    edges = [size * part // count for part in range(count + 1)]
    return list(itertools.pairwise(edges))


def _seek_line(stream: Any, path: Path, start: int) -> int:
    """Go to the first line that starts at or after byte `start`; returns the number of lines before it."""
    if start == 0:
        return 0
    if compression_of(path):
        raise DataError(f"{path}: a compressed file cannot be read from its middle")
    before, left = 0, start - 1
    while left:
        block = stream.read(min(left, BLOCK_BYTES))
        if not block:
            break
        before += block.count(b"\n")
        left -= len(block)
    rest = stream.readline()
    return before + (1 if rest.endswith(b"\n") else 0)


def _why_not_json(line: bytes, error: Exception, file: str, number: int, position: int) -> Rejected:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as problem:
        return Rejected(file, number, NOT_UTF8, f"byte 0x{line[problem.start]:02x} at offset {problem.start}", position)
    return Rejected(file, number, NOT_JSON, str(error), position)


def _json_type(value: Any) -> str:
    names = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
    return names[type(value)]
