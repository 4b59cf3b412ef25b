"""Text that is tokenized while it is trained on, for corpora that should not be prepared first.

In: a source with `stream: true` and a tokenizer. Out: what the order and the loader ask of any source: the ranges of its j-th
sequence, and a store to read them from. Of R virtual readers, reader r takes the parts r, r + R, r + 2R, ... of the input in an
order of the seed and the epoch, and lays documents end to end. Sequence j is the next one of reader j mod R.
So the order depends only on the input and the seed, not on batches, ranks or restarts. The state is one cursor per reader.
Weakness: documents of a part stay in file order; at a resume, a part is read again up to its cursor; the size is not known, so a
run needs its length in steps or tokens.
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steep.core.errors import DataError
from steep.core.fingerprint import fingerprint
from steep.core.say import Say, say_nothing
from steep.core.units import counted
from steep.order.packing import TokenRange
from steep.order.permutation import Permutation
from steep.sources.config import SourceConfig
from steep.sources.document import Document, Record, Rejected, Span
from steep.sources.dropped import DroppedCount, dropped_line, reasons_dropped
from steep.sources.inputs import expand_inputs, load_format
from steep.store.work import source_name
from steep.tokenizer.encode import TextTokenizer

READERS = 64
"""Virtual readers. Part of the order: never change it."""
PART_BYTES = 64 * 2**20
"""Files that can be cut are cut into parts of about this size. Part of the order."""
ENDLESS = 2**60
"""Sequences of one epoch, for a source of unknown size."""
KEPT_SEQUENCES = 1 << 14
"""Sequences whose tokens and cursors are kept, unless the run says how many its loader reads ahead."""
READ_AS = ("format", "text_key", "document_separator", "max_record_bytes")
"""Settings of a source that change the documents read from the same files."""
ENCODED_CHARACTERS = 200_000
LOOKED_AT_PARTS, LOOKED_AT_RECORDS = 10, 100
"""What is read of a stream before a run, to say which of its records would be dropped."""
MOST_EMPTY_EPOCHS = 64
"""A part may hold no record (one is longer than the part). A reader that finds nothing for more epochs than this gives up."""


Piece = tuple[int, NDArray[np.int64]]
"""Where a document's ids in one sequence begin in it, and the ids, with the next one if the document continues."""


@dataclass(frozen=True)
class StreamPart:
    """A file, or a span of one, that one reader reads from start to end."""

    path: str
    format: str
    span: Span | None = None


@dataclass
class Cursor:
    """The position of a reader before a sequence: `tokens` of the record before `record` are still to come."""

    epoch: int = 0
    part: int = 0
    """Parts of this reader in the epoch that it has finished."""
    record: int = 0
    """Records of the part that it has read, including one that it is still cutting."""
    tokens: int = 0
    documents: int = 0
    """Documents of all epochs that were begun."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Records that were not documents, by reason; the next two as in `DroppedCount`."""
    dropped_bytes: dict[str, int] = field(default_factory=dict)
    other_fields: dict[str, int] = field(default_factory=dict)
    checksum: int = 0
    """CRC-32 of the ids of the document that `tokens` belong to, so that a changed text is noticed; 0 without one."""


def parts_of(source: SourceConfig) -> list[StreamPart]:
    """The parts of a source, fixed by its files. Raises DataError."""
    found = []
    for file in expand_inputs(source):
        is_large = not file.path.is_file() or file.path.stat().st_size > PART_BYTES
        spans: list[Span] = load_format(file.format).split(file.path, PART_BYTES, source) if is_large else []
        found += [StreamPart(str(file.path), file.format, span) for span in (spans or [None])]  # type: ignore[list-item]
    return found


class Reader:
    """One virtual reader: an endless series of sequences, each with the cursor before it."""

    def __init__(
        self, parts: list[StreamPart], source: SourceConfig, tokenizer: TextTokenizer, sequence_length: int,
        number: int, readers: int, seed: int, cursor: Cursor, on_dropped: Callable[[Rejected], None] = lambda record: None,
    ):  # fmt: skip
        """on_dropped: told of each record that is not a document, when it is read."""
        self._parts, self._source, self._tokenizer, self._length = parts, source, tokenizer, sequence_length
        self._number, self._readers, self._seed = number, readers, seed
        self._cursor, self._on_dropped = cursor, on_dropped

    def sequences(self) -> Iterator[tuple[Cursor, list[Piece]]]:
        """(cursor before it, its pieces) of one sequence after the other."""
        before, room = self._copy(), self._length
        pieces: list[Piece] = []
        rest = self._cursor.tokens
        for ids in self._documents():
            start = len(ids) - rest if rest else 0
            rest = checksum = 0
            while start < len(ids):
                count = min(room, len(ids) - start)
                pieces.append((start, ids[start : start + count + 1]))
                start += count
                room -= count
                self._cursor.tokens = len(ids) - start
                checksum = checksum or (zlib.crc32(ids.tobytes()) if self._cursor.tokens else 0)
                self._cursor.checksum = checksum if self._cursor.tokens else 0
                if not room:
                    yield before, pieces
                    before, pieces, room = self._copy(), [], self._length

    def _copy(self) -> Cursor:
        return replace(self._cursor)

    def _documents(self) -> Iterator[NDArray[np.int64]]:
        """The ids of every document from the cursor on; a document that the cursor is inside comes whole."""
        cursor = self._cursor
        skip = cursor.record - (1 if cursor.tokens else 0)
        empty_epochs = 0
        while True:
            order = Permutation(len(self._parts), self._seed, "stream", cursor.epoch)(np.arange(len(self._parts)))
            mine = [self._parts[number] for number in order[self._number :: self._readers].tolist()]
            empty = True
            while cursor.part < len(mine):
                for ids, records, dropped in self._encoded(mine[cursor.part], skip):
                    continued = bool(cursor.tokens) and cursor.record == records
                    if cursor.tokens and not (continued and _is_the_rest(cursor, ids)):
                        raise DataError(
                            f"{mine[cursor.part].path}: record {cursor.record:,} is not the one that the checkpoint was inside: "
                            "the file has changed. Restore it to continue exactly, or start another run with --run.name."
                        )
                    if not continued:
                        cursor.documents += ids is not None
                        if dropped.dropped:  # new dictionaries: copies of the cursor have the old
                            sums = _sum_dropped([vars(cursor), vars(dropped)])
                            cursor.dropped, cursor.dropped_bytes = dict(sums.dropped), dict(sums.dropped_bytes)
                            cursor.other_fields = dict(sums.other_fields)
                    cursor.record = records
                    if ids is not None:
                        empty = False
                        yield ids
                cursor.part, cursor.record, cursor.tokens, skip = cursor.part + 1, 0, 0, 0
            empty_epochs = empty_epochs + 1 if empty else 0
            if empty_epochs > MOST_EMPTY_EPOCHS:
                ledger = _ledger(cursor.documents, _sum_dropped([vars(cursor)]))
                line = dropped_line(mine[0].path, ledger, read="read again and again")
                raise DataError(
                    f"a stream of {counted(len(self._parts), 'part')}, {mine[0].path} among them, holds no document"
                    f"{f'; {line}' if line else ''}"
                )
            cursor.epoch, cursor.part = cursor.epoch + 1, 0

    def _encoded(self, part: StreamPart, skip: int) -> Iterator[tuple[NDArray[np.int64] | None, int, DroppedCount]]:
        """(ids, records of the part up to and with this one, what was dropped since the last); ids None at the end."""
        number, dropped = skip, DroppedCount()
        records = load_format(part.format).read(Path(part.path), self._source, part.span)
        for batch in _batches(islice(records, skip, None)):
            texts = [record.text for record in batch if isinstance(record, Document)]
            encoded = iter(self._tokenizer.encode_documents(texts))
            for record in batch:
                number += 1
                if not isinstance(record, Document):
                    dropped.add(record)
                    self._on_dropped(record)
                    continue
                yield next(encoded), number, dropped
                if dropped.dropped:
                    dropped = DroppedCount()
        yield None, number, dropped


def _is_the_rest(cursor: Cursor, ids: NDArray[np.int64] | None) -> bool:
    """Whether `ids` are of the document that the cursor is inside."""
    return ids is not None and cursor.tokens <= len(ids) and cursor.checksum in (0, zlib.crc32(ids.tobytes()))


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += len(record.text) if isinstance(record, Document) else 0
        if characters >= ENCODED_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Lengths:
    """Document lengths as the loader needs them: whether one more token follows what was read."""

    def __init__(self, pieces: Mapping[int, Piece]):
        self._pieces = pieces

    def __getitem__(self, key: int) -> int:
        start, ids = self._pieces[key]
        return start + len(ids)


class StreamSource:
    """A streamed source as an order and as a store. Each piece of a document counts as a document here, numbered in order."""

    num_sequences = ENDLESS
    num_documents = 0
    num_tokens = 0
    text_bytes = None

    def __init__(
        self, source: SourceConfig, tokenizer: TextTokenizer, sequence_length: int, seed: int,
        kept_sequences: int = KEPT_SEQUENCES,
    ):  # fmt: skip
        self._kept_sequences = kept_sequences
        self._source, self._tokenizer = source, tokenizer
        self._sequence_length, self._seed = sequence_length, seed
        self._parts = parts_of(source)
        self.num_readers = min(READERS, len(self._parts))
        self.path = Path(self._parts[0].path)
        self.max_token_id = tokenizer.vocab_size - 1
        read_as = source.model_dump(include=set(READ_AS), exclude_defaults=True)
        identities = [_identity(part) for part in self._parts]
        self.fingerprint = fingerprint([tokenizer.fingerprint, identities, *([read_as] if read_as else [])])
        self._pieces: dict[int, Piece] = {}
        self._made: OrderedDict[int, tuple[Cursor, list[TokenRange]]] = OrderedDict()
        self._named = 0
        self.say: Say = say_nothing
        """Told how many records were dropped so far, at the 1st, 10th, 100th and so on, from the loader's thread."""
        self.name = source_name(source)
        self._lock = threading.Lock()  # the loader reads ahead in a thread while a checkpoint asks for cursors
        self.document_lengths = _Lengths(self._pieces)
        self.begin_at([])

    def begin_at(self, cursors: list[dict[str, Any]], sequences: int = 0) -> dict[str, Any]:
        """Continue at `cursors` of this source, taken at `sequences`; from the start without any. Returns their ledger."""
        found = [Cursor(**cursor) for cursor in cursors] or [Cursor() for _ in range(self.num_readers)]
        self._iterators = [
            Reader(
                self._parts, self._source, self._tokenizer, self._sequence_length, number, self.num_readers, self._seed, cursor,
                self._count_dropped,
            ).sequences()
            for number, cursor in enumerate(found)
        ]  # fmt: skip
        self._next = [_first(number, sequences, self.num_readers) for number in range(self.num_readers)]
        self._made.clear()
        self._pieces.clear()
        self._so_far = _sum_dropped(map(vars, found))
        return _ledger(sum(cursor.documents for cursor in found), self._so_far)

    def _count_dropped(self, record: Rejected) -> None:
        self._so_far.add(record)
        lost = self._so_far.dropped.total()
        if lost == 10 ** (len(str(lost)) - 1):
            self.say(
                f"{self.name}: {counted(lost, 'record')} of the stream dropped so far: "
                f"{reasons_dropped(self._so_far.to_ledger())}; the last is {record}"
            )

    def first_records(self) -> dict[str, Any]:
        """The ledger of the first records of the input, read only to see whether they are documents. Raises DataError."""
        found, documents = DroppedCount(), 0
        for part in self._parts[:LOOKED_AT_PARTS]:
            records = load_format(part.format).read(Path(part.path), self._source, part.span)
            for record in islice(records, LOOKED_AT_RECORDS):
                if isinstance(record, Document):
                    documents += 1
                else:
                    found.add(record)
        return _ledger(documents, found)

    def cursors(self, sequences: int) -> list[dict[str, Any]]:
        """The position of each reader after the first `sequences` of this source, as JSON."""
        numbers = (_first(reader, sequences, self.num_readers) for reader in range(self.num_readers))
        with self._lock:
            return [vars(self._sequence(number)[0]) for number in numbers]

    def ledger(self, sequences: int) -> dict[str, Any]:
        """What became of the records up to there: documents begun, and records that were not documents, by reason."""
        cursors = self.cursors(sequences)
        return _ledger(sum(cursor["documents"] for cursor in cursors), _sum_dropped(cursors))

    def files(self) -> dict[str, str]:
        """Its files, and what is known of their content without reading them."""
        return {part.path: str(_identity(part)[1]) for part in self._parts}

    def ranges(self, number: int) -> list[TokenRange]:
        """The ranges of a sequence. They must be asked for in order, except the latest `kept_sequences`. Raises DataError."""
        with self._lock:
            return self._sequence(number)[1]

    def read(self, document: int, start: int, count: int, out: NDArray[Any]) -> None:
        """Copy tokens [start, start + count) of a piece that `ranges` named into `out`."""
        first, ids = self._pieces[document]
        out[:] = ids[start - first : start - first + count]

    def _sequence(self, number: int) -> tuple[Cursor, list[TokenRange]]:
        reader = number % self.num_readers
        while self._next[reader] <= number:
            self._make(reader)
        if number not in self._made:
            raise DataError(
                f"{self.path}: sequence {number:,} of a stream was asked for after it had passed. A stream is read once, from "
                "its start; prepare the text to a token store to read any sequence at any time."
            )
        return self._made[number]

    def _make(self, reader: int) -> None:
        cursor, pieces = next(self._iterators[reader])
        number = self._next[reader]
        self._next[reader] += self.num_readers
        counts = [len(ids) for _, ids in pieces]
        counts[-1] -= (
            sum(counts) - self._sequence_length
        )  # all that were read, except the one that follows the last piece
        ranges = []
        for (start, ids), count in zip(pieces, counts, strict=True):
            self._pieces[self._named] = (start, ids)
            ranges.append(TokenRange(self._named, start, count))
            self._named += 1
        self._made[number] = (cursor, ranges)
        while len(self._made) > self._kept_sequences:
            _, (_, old) = self._made.popitem(last=False)
            for token_range in old:
                del self._pieces[token_range.document]


def _sum_dropped(cursors: Iterable[dict[str, Any]]) -> DroppedCount:
    found = DroppedCount()
    for cursor in cursors:
        found.include(cursor)
    return found


def _ledger(documents: int, found: DroppedCount) -> dict[str, Any]:
    return {"records_read": documents + found.dropped.total(), "documents_kept": documents, **found.to_ledger()}


def _first(reader: int, sequences: int, readers: int) -> int:
    """The first sequence of `reader` that is not among the first `sequences`."""
    return sequences + (reader - sequences) % readers


def _identity(part: StreamPart) -> list[Any]:
    """What identifies a part's content without reading it: name, size and span. Weakness: a rewritten file of the same size."""
    path = Path(part.path)
    size = path.stat().st_size if path.is_file() else 0
    return [path.name, size, part.span]
