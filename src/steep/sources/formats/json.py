"""JSON: an array of records, or of texts; also objects one after the other, over several lines each, or a single one.

In: a file, plain, gzip or Zstandard. Out: Documents and Rejected, numbered as in the array. A file with a record on each
line is JSON Lines under another ending, and is read as such. Memory: the longest record, at most `max_record_bytes`; a longer
one is passed over. The ends of records are found by their brackets, so that a damaged record is one rejected record, unless
its brackets or quotes are not in pairs: what follows it then belongs to it.
Weakness: an array is read by one process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Optional, Union

from steep.sources.config import SourceConfig
from steep.sources.document import (
    NO_FIELD,
    NOT_JSON,
    Location,
    Record,
    Rejected,
    Span,
    check_text,
    field_text,
    too_long,
)
from steep.sources.files import BLOCK_BYTES, BYTE_ORDER_MARK, open_binary
from steep.sources.formats import jsonl

ENDINGS = (".json",)
LOOKED_AT_BYTES = 1 << 16
_START = re.compile(rb"[^\s,]")
_MARK = re.compile(rb'["{}\[\]]')
_END_OF_BARE = re.compile(rb"[,\]\s]")
_BACKSLASH = ord("\\")


def read(path: Path, config: SourceConfig, span: Optional[Span] = None) -> Iterator[Record]:
    """Yield the records of `path`, or of its bytes `span` if it is JSON Lines. Raises DataError when it cannot be read."""
    if span is not None or is_lines(path, config):
        yield from jsonl.read(path, config, span)
        return
    limit_bytes, name, number = config.max_record_bytes, str(path), 0
    with open_binary(path, config) as (stream, tell):
        values = Values(stream, limit_bytes)
        for number, raw in enumerate(values.read(), 1):
            if isinstance(raw, int):
                yield too_long(raw, limit_bytes, Location(name, number, tell()))
            else:
                yield parse_value(raw, config.text_keys, Location(name, number, tell(), num_bytes=len(raw)))
        if values.is_cut_off:
            yield Location(name, number + 1, tell()).reject(NOT_JSON, "the array does not end: the file is cut off")


def split(path: Path, part_bytes: int, config: Optional[SourceConfig] = None) -> list[Span]:
    """Byte ranges if the file is JSON Lines; none of an array."""
    return jsonl.split(path, part_bytes, config) if is_lines(path, config) else []


def parse_value(raw: bytes, keys: tuple[str, ...], location: Location) -> Record:
    """The record in one value: an object with the text in a field, or the text itself."""
    value = jsonl.parse_json(raw, location)
    if isinstance(value, Rejected):
        return value
    if isinstance(value, str):
        record = check_text(value, location)
    elif isinstance(value, dict):
        record = field_text(value, keys, location)
        inner = next(
            (key for key, item in value.items() if isinstance(item, list) and item and type(item[0]) is dict), ""
        )
        if isinstance(record, Rejected) and record.reason == NO_FIELD and inner and not record.other_field:
            remedy = f"records inside of it are reached with: jq -c '.{inner}[]' file.json > file.jsonl"
            return location.reject(NO_FIELD, f"{record.detail}; {remedy}")
    else:
        return location.reject(NO_FIELD, f"a JSON {jsonl.JSON_TYPES[type(value)]}, neither an object nor a text")
    return jsonl.whole_characters(record, location)


def is_lines(path: Path, config: Optional[SourceConfig]) -> bool:
    """Whether the file begins with a line that is an object, complete or damaged: JSON Lines.

    An array, a text, or an object that goes on in the next line is not. No line end in the first 64 KiB: one long line.
    """
    with open_binary(path, config) as (stream, _):
        start = stream.read(LOOKED_AT_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()
    if not start.startswith(b"{"):
        return not start.startswith((b"[", b'"'))
    line = start.partition(b"\n")[0].decode("utf-8", "replace").rstrip()
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return b"\n" not in start or error.pos < len(line)
    except RecursionError:
        return True
    return True


class Values:
    """The values of an array, or of a file of values, each as it is written. In: a binary stream. Source: RFC 8259."""

    def __init__(self, stream: IO[bytes], limit_bytes: int):
        self._stream, self._limit_bytes = stream, limit_bytes
        self._pieces: list[bytes] = []
        self._size = 0
        self._depth = 0
        self._in_text = self._escaped = self._in_array = self._inside = False

    @property
    def is_cut_off(self) -> bool:
        """After all were read: whether the array lacks its end, and no value is incomplete, which would tell as well."""
        return self._in_array

    def read(self) -> Iterator[Union[bytes, int]]:
        """Every value; of one over `limit_bytes` only its size. The last may be incomplete."""
        for number, block in enumerate(iter(partial(self._stream.read, BLOCK_BYTES), b"")):
            begin = at = len(BYTE_ORDER_MARK) if not number and block.startswith(BYTE_ORDER_MARK) else 0
            while at < len(block):
                if not self._inside:
                    begin = at = self._seek_value(block, at)
                    continue
                at = self._seek_end(block, at)
                if not self._inside:
                    yield self._take(block[begin:at])
            if self._inside:
                self._keep(block[begin:])
        if self._inside:
            self._in_array = False
            yield self._take(b"")

    def _seek_value(self, block: bytes, at: int) -> int:
        """The byte at which a value begins, or the end of the block. Steps into an array and out of it."""
        while (found := _START.search(block, at)) is not None:
            at = found.start()
            if block[at : at + 1] == (b"]" if self._in_array else b"["):
                self._in_array = not self._in_array
                at += 1
                continue
            self._inside, self._depth, self._in_text, self._escaped = True, 0, False, False
            return at
        return len(block)

    def _seek_end(self, block: bytes, at: int) -> int:
        """The byte after the value that `at` is inside, or the end of the block if it goes on."""
        is_first = not self._size and not self._depth and not self._in_text
        while at < len(block):
            if self._in_text:
                at = self._seek_quote(block, at)
                if self._in_text:
                    return at
            elif self._depth or (is_first and block[at] in b'"{['):
                found = _MARK.search(block, at)
                if found is None:
                    return len(block)
                at, mark = found.end(), found.group()
                self._in_text = mark == b'"'
                self._depth += (mark in b"{[") - (mark in b"}]")
            else:
                found = _END_OF_BARE.search(block, at + is_first)
                if found is None:
                    return len(block)
                self._inside = False
                return found.start()
            is_first = False
            if not self._depth and not self._in_text:
                self._inside = False
                return at
        return at

    def _seek_quote(self, block: bytes, at: int) -> int:
        """The byte after the text's last quote, or the end of the block. A quote after an odd number of backslashes is text."""
        at += self._escaped
        self._escaped = False
        while True:
            found = block.find(b'"', at)
            end = first = len(block) if found < 0 else found
            while first > at and block[first - 1] == _BACKSLASH:
                first -= 1
            is_escaped = (end - first) % 2 == 1
            if found < 0:
                self._escaped = is_escaped
                return end
            at = found + 1
            if not is_escaped:
                self._in_text = False
                return at

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size <= self._limit_bytes:
            self._pieces.append(piece)
        else:
            self._pieces.clear()

    def _take(self, piece: bytes) -> Union[bytes, int]:
        self._keep(piece)
        value = b"".join(self._pieces) if self._size <= self._limit_bytes else self._size
        self._pieces.clear()
        self._size = 0
        return value
