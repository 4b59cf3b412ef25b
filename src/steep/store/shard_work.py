"""Turn one work item into one shard: read, encode, write, account for every record.

Runs inside a worker process, or in the calling process when there is one worker. Memory: one batch of documents
(1,000 documents or a million characters, at least one document) and its encodings, and 20 bytes per document of the shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import IO, Any, Optional

import numpy as np
import orjson

from steep.core.errors import DataError
from steep.core.files import atomic_writer, read_json, write_json
from steep.sources.config import SourceConfig
from steep.sources.document import NO_TOKENS, Document, Record, Rejected
from steep.sources.dropped import DroppedCount
from steep.sources.inputs import load_format
from steep.store.contamination import EvaluationRuns
from steep.store.file_hashes import check_unchanged
from steep.store.manifest import PREPARE_FOLDER, SIDECAR_SUFFIX
from steep.store.notes import EVALUATION, Notes, open_notes
from steep.store.prepare_folder import record_path, rejected_path, shown_name
from steep.store.work import Part, WorkItem
from steep.store.writer import ShardWriter, describe_shard, disk_errors, open_shard
from steep.tokenizer.encode import REFERENCE_BACKEND, EncodedTexts, TextEncoder, TextTokenizer

BATCH_DOCUMENTS = 1000
BATCH_CHARACTERS = 1_000_000

Report = Callable[[int, int], None]
"""Called with bytes on disk read and tokens written so far, both of this item."""


@dataclass(frozen=True)
class Preparation:
    """What all items of one `prepare` share."""

    out: Path
    sources: list[SourceConfig]
    dtype: np.dtype
    stop_on_bad_record: bool
    backends: dict[int, str] = field(default_factory=dict)
    """Source number -> the tokenizer backend that gives the reference's ids for it; absent: the reference. It decides the
    speed, never what is written."""
    notes: tuple[str, ...] = ()
    """What is noted of each document for the choice after all have been read; kinds from `notes`."""
    chooses: bool = False
    """Shards are not yet the store's: they stay in the unfinished folder until documents have been chosen."""

    @property
    def folder(self) -> Path:
        """What is removed when the store is finished."""
        return self.out / PREPARE_FOLDER

    @property
    def shard_folder(self) -> Path:
        """Where the shard of an item is written."""
        return self.folder if self.chooses else self.out

    @cached_property
    def evaluation_runs(self) -> Optional[EvaluationRuns]:
        """What documents are compared with, if anything."""
        return EvaluationRuns(self.folder) if EVALUATION in self.notes else None

    def to_json(self) -> dict[str, Any]:
        """For the pipe to a worker."""
        sources = [source.model_dump(include=set(SourceConfig.model_fields)) for source in self.sources]
        stop = self.stop_on_bad_record
        return {
            "out": str(self.out), "sources": sources, "dtype": self.dtype.name, "stop_on_bad_record": stop,
            "backends": list(self.backends.items()), "notes": list(self.notes), "chooses": self.chooses,
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Preparation:
        """The inverse of `to_json`."""
        sources = [SourceConfig.model_validate(source) for source in value["sources"]]
        dtype, backends = np.dtype(value["dtype"]), {int(source): name for source, name in value["backends"]}
        stop, notes = value["stop_on_bad_record"], tuple(value["notes"])
        return cls(Path(value["out"]), sources, dtype, stop, backends, notes, value["chooses"])


def is_finished(preparation: Preparation, item: WorkItem) -> bool:
    """Whether the shard of an item is whole."""
    path = record_path(preparation.out, item.name)
    if not path.is_file():
        return False
    shard = read_json(path)["shard"]
    files = [preparation.shard_folder / f"{item.name}{suffix}" for suffix in (".bin", ".idx", SIDECAR_SUFFIX)]
    return all(file.is_file() for file in files) and files[0].stat().st_size == shard["bytes"]


def process_item(preparation: Preparation, item: WorkItem, tokenizer: TextTokenizer, report: Report) -> None:
    """Write the shard of one item and, last, its entry. Raises DataError for what cannot be read or written."""
    with disk_errors(preparation.out):
        with (
            atomic_writer(rejected_path(preparation.out, item.name), sync_folder=False) as rejected_file,
            open_notes(preparation.folder, item.name, preparation.notes, preparation.evaluation_runs) as notes,
            open_shard(preparation.shard_folder, item.name, preparation.dtype) as writer,
        ):
            sink = _Sink(preparation, writer, rejected_file, tokenizer, notes)
            for backend, records in _records_by_backend(preparation, item):
                encoder = tokenizer.encoder(backend)
                for batch, position in _batches(records):
                    sink.take(batch, encoder)
                    report(min(position, item.bytes), writer.num_tokens)
        entry = {
            "shard": describe_shard(preparation.shard_folder, item.name, writer),
            "ledger": sink.ledger(),
            "max_token_id": writer.max_token_id,
            "first_rejected": sink.first_rejected,
            "source_files": notes.source_files,
        }
        write_json(record_path(preparation.out, item.name), entry)
    report(item.bytes, writer.num_tokens)


class _Sink:
    """Takes the records of one shard: each becomes tokens or is listed as rejected, and is counted once."""

    def __init__(
        self,
        preparation: Preparation,
        writer: ShardWriter,
        rejected_file: IO[bytes],
        tokenizer: TextTokenizer,
        notes: Notes,
    ):
        self._writer, self._rejected_file, self._tokenizer = writer, rejected_file, tokenizer
        self._stop, self._folder = preparation.stop_on_bad_record, preparation.folder
        self._notes = notes
        self._dropped = DroppedCount()
        self.records_read = 0
        self.first_rejected: dict[str, str] = {}

    def take(self, batch: list[Record], encoder: TextEncoder) -> None:
        """Encode and write a batch of records, in order."""
        self.records_read += len(batch)
        documents = [record for record in batch if isinstance(record, Document)]
        encoded = encoder.encode([document.text for document in documents])
        for record in _rejected(batch, documents, encoded):
            self._reject(record)
        kept = [document for document, length in zip(documents, encoded.lengths, strict=True) if length]
        ids = EncodedTexts(encoded.ids, encoded.lengths[encoded.lengths > 0])
        self._writer.add_documents(self._tokenizer.with_ends(ids), [document.text for document in kept])
        self._notes.add(kept)

    def ledger(self) -> dict[str, Any]:
        """Every record that was read, kept or dropped."""
        return {
            "records_read": self.records_read,
            "documents_kept": len(self._writer.lengths),
            **self._dropped.to_ledger(),
            "text_bytes": sum(self._writer.text_bytes),
            "tokens": self._writer.num_tokens,
        }

    def _reject(self, record: Rejected) -> None:
        record = replace(record, file=shown_name(record.file, self._folder))
        if self._stop:
            raise DataError(
                f"{record}\n  on_bad_record is `stop`; `skip` notes such records in rejected.jsonl and continues."
            )
        self._dropped.add(record)
        self.first_rejected.setdefault(record.reason, str(record))
        content = {"file": record.file, "line": record.line, "reason": record.reason, "detail": record.detail,
                   "bytes": record.num_bytes}  # fmt: skip
        self._rejected_file.write(orjson.dumps(content) + b"\n")


def _rejected(batch: list[Record], documents: list[Document], encoded: EncodedTexts) -> Iterator[Rejected]:
    """The records of a batch that are not documents, and those of which the tokenizer leaves nothing, in order."""
    if len(documents) == len(batch) and encoded.lengths.all():
        return
    lengths = iter(encoded.lengths.tolist())
    for record in batch:
        if isinstance(record, Rejected):
            yield record
        elif not next(lengths):
            size, nothing = len(record.text.encode("utf-8")), "the tokenizer's normalization leaves nothing of it"
            yield Rejected(record.file, record.line, NO_TOKENS, nothing, num_bytes=size)


def _records_by_backend(preparation: Preparation, item: WorkItem) -> Iterator[tuple[str, Iterator[tuple[Record, int]]]]:
    """Every record of an item, with the bytes of the item read so far, in runs that one tokenizer backend encodes.
    Each run must be read to its end before the next."""
    starts = accumulate((part.bytes for part in item.parts), initial=0)
    parts = zip(item.parts, starts, strict=False)  # there is one more start: the end
    for backend, run in groupby(parts, key=lambda pair: preparation.backends.get(pair[0].source, REFERENCE_BACKEND)):
        yield backend, chain.from_iterable(_records(preparation, part, start) for part, start in run)


def _records(preparation: Preparation, part: Part, start: int) -> Iterator[tuple[Record, int]]:
    """Every record of a part, with the bytes of the item read so far."""
    read = load_format(part.format).read
    for record in read(Path(part.path), preparation.sources[part.source], part.span):
        yield record, start + min(record.position, part.bytes)
    if part.state is not None:
        check_unchanged(Path(part.path), *part.state)


def _batches(records: Iterator[tuple[Record, int]]) -> Iterator[tuple[list[Record], int]]:
    """Runs of records that are encoded together, with the position of the last."""
    batch: list[Record] = []
    characters = 0
    position = 0
    for record, at in records:
        batch.append(record)
        position = at
        characters += len(record.text) if isinstance(record, Document) else 0
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch, position
            batch, characters = [], 0
    if batch:
        yield batch, position
