"""Choose among the documents that were read (limits, duplicates, contamination), and write the shards of those chosen.

In: the shards and notes of all work items, in input order. Out: the store's shards, the number dropped for each reason, and
one line per dropped document. Nothing depends on how many processes read, or in what order they finished.
Memory: about 40 bytes per document; tokens are copied in blocks. Meanwhile the tokens are on disk twice.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Optional

import numpy as np
import orjson

from steep.core.files import read_json
from steep.store.config import PrepareConfig
from steep.store.contamination import read_descriptions
from steep.store.duplicates import alike, repeated
from steep.store.formats.megatron import read_index
from steep.store.manifest import SIDECAR_SUFFIX
from steep.store.notes import EVALUATION, LOCATIONS, SIGNATURES, Locations, read_notes
from steep.store.prepare_folder import record_path, rejected_path, shown_name
from steep.store.shard_work import Preparation
from steep.store.work import WorkItem
from steep.store.writer import ShardWriter, describe_shard, open_shard

KEPT, UNDER_MIN, OVER_MAX, CONTAMINATED, DUPLICATE, NEAR_DUPLICATE, BEYOND = range(7)
REASONS = {
    UNDER_MIN: "under min_tokens",
    OVER_MAX: "over max_tokens_per_document",
    CONTAMINATED: "contaminated",
    DUPLICATE: "duplicate",
    NEAR_DUPLICATE: "near duplicate",
    BEYOND: "beyond max_tokens",
}


def kinds_of_notes(config: PrepareConfig) -> tuple[str, ...]:
    """What must be noted of each document for these settings."""
    kinds = []
    if config.chooses or config.check_against:
        kinds.append(LOCATIONS)
    if config.dedup == "minhash":
        kinds.append(SIGNATURES)
    if config.check_against:
        kinds.append(EVALUATION)
    return tuple(kinds)


@dataclass
class ItemDocuments:
    """The documents of one finished work item."""

    item: WorkItem
    entry: dict[str, Any]
    offsets: np.ndarray
    """(documents + 1,) int64, in tokens."""
    sidecar: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """(documents,) int64, in tokens."""
        return np.diff(self.offsets)


def read_item(preparation: Preparation, item: WorkItem) -> ItemDocuments:
    """The documents of a finished item."""
    path = preparation.shard_folder / item.name
    lengths = read_index(path.with_name(f"{item.name}.idx")).lengths
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    sidecar = np.load(path.with_name(item.name + SIDECAR_SUFFIX), allow_pickle=False)
    return ItemDocuments(item, read_json(record_path(preparation.out, item.name)), offsets, sidecar)


def reasons_by_itself(preparation: Preparation, documents: ItemDocuments, config: PrepareConfig) -> np.ndarray:
    """(documents,) uint8: why a document is dropped regardless of the others; KEPT where it is not."""
    lengths = documents.lengths
    reasons = np.zeros(len(lengths), dtype=np.uint8)
    if config.drop_contaminated and config.check_against:
        reasons[read_notes(preparation.folder, documents.item.name, EVALUATION)["runs"] > 0] = CONTAMINATED
    if config.max_tokens_per_document is not None:
        reasons[lengths > config.max_tokens_per_document] = OVER_MAX
    if config.min_tokens is not None:
        reasons[lengths < config.min_tokens] = UNDER_MIN
    return reasons


@dataclass
class Choice:
    """What becomes of every document that was read."""

    items: list[ItemDocuments]
    """Up to the item in which `max_tokens` was reached."""
    reasons: np.ndarray
    """(documents,) uint8, over all items."""
    originals: Optional[np.ndarray] = None
    """(documents,) int64: for a duplicate, the document that is kept instead."""
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_tokens: dict[str, int] = field(default_factory=dict)
    dropped_bytes: dict[str, int] = field(default_factory=dict)

    def parts(self) -> Iterator[tuple[ItemDocuments, int, np.ndarray]]:
        """(item, number of its first document, (documents,) uint8 reasons)."""
        start = 0
        for documents in self.items:
            stop = start + len(documents.sidecar)
            yield documents, start, self.reasons[start:stop]
            start = stop


def choose_documents(preparation: Preparation, items: list[WorkItem], config: PrepareConfig) -> Choice:
    """Decide on every document of finished `items`: limits and contamination, then duplicates, then `max_tokens`."""
    documents = [read_item(preparation, item) for item in items]
    lengths = np.concatenate([part.lengths for part in documents])
    hashes = np.concatenate([part.sidecar["content_hash"] for part in documents]).astype(np.uint64)
    reasons = np.concatenate([reasons_by_itself(preparation, part, config) for part in documents])
    originals = None
    if config.dedup == "exact":
        originals = repeated(hashes, reasons == KEPT)
        reasons[originals >= 0] = DUPLICATE
    elif config.dedup == "minhash":
        signatures = [read_notes(preparation.folder, item.name, SIGNATURES) for item in items]
        originals = alike(signatures, hashes, reasons == KEPT)
        reasons[originals >= 0] = NEAR_DUPLICATE
    if config.max_tokens is not None:
        kept_tokens = np.cumsum(np.where(reasons == KEPT, lengths, 0))
        stop = int(np.searchsorted(kept_tokens, config.max_tokens)) + 1
        ends = np.cumsum([len(part.sidecar) for part in documents])
        documents = documents[: int(np.searchsorted(ends, stop)) + 1]  # the items that hold the first `stop` documents
        size = sum(len(part.sidecar) for part in documents)
        reasons, lengths = reasons[:size], lengths[:size]
        beyond = reasons[stop:]
        beyond[np.isin(beyond, (KEPT, DUPLICATE, NEAR_DUPLICATE))] = BEYOND
    choice = Choice(documents, reasons, originals)
    text_bytes = np.concatenate([part.sidecar["text_bytes"] for part in documents])
    for number, reason in REASONS.items():
        chosen = reasons == number
        if chosen.any():
            choice.dropped[reason] = int(chosen.sum())
            choice.dropped_tokens[reason] = int(lengths[chosen].sum())
            choice.dropped_bytes[reason] = int(text_bytes[chosen].sum())
    return choice


def count_duplicates(documents: list[ItemDocuments], kept: np.ndarray) -> dict[str, int]:
    """The number of kept documents, and of their tokens, that repeat an earlier one word for word.

    kept: (documents,) bool over all items.
    """
    hashes = np.concatenate([part.sidecar["content_hash"] for part in documents]).astype(np.uint64)
    is_repeated = repeated(hashes, kept) >= 0
    lengths = np.concatenate([part.lengths for part in documents])
    return {"documents": int(is_repeated.sum()), "tokens": int(lengths[is_repeated].sum())}


def write_shards(preparation: Preparation, choice: Choice, shard_tokens: Optional[int]) -> list[dict[str, Any]]:
    """Write the kept documents as the store's shards and return their entries, each with its `max_token_id`.

    shard_tokens: as in the configuration; None makes one shard of each item with a kept document.
    """
    entries: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        writer: Optional[ShardWriter] = None

        def close() -> None:
            nonlocal writer
            if writer is not None:
                stack.close()
                entry = describe_shard(preparation.out, f"shard_{len(entries):05d}", writer)
                entries.append({**entry, "max_token_id": writer.max_token_id})
                writer = None

        for documents, _, reasons in choice.parts():
            tokens = np.empty(0, dtype=preparation.dtype)
            if documents.entry["shard"]["tokens"]:  # an empty file cannot be mapped
                path = preparation.shard_folder / f"{documents.item.name}.bin"
                tokens = np.memmap(path, dtype=preparation.dtype, mode="r")
            for begin, end in _runs(reasons == KEPT):
                while begin < end:
                    if writer is None:
                        name = f"shard_{len(entries):05d}"
                        writer = stack.enter_context(open_shard(preparation.out, name, preparation.dtype))
                    stop = _last_that_fits(documents.offsets, begin, end, writer.num_tokens, shard_tokens)
                    if stop > begin:
                        first, last = documents.offsets[begin], documents.offsets[stop]
                        lengths = np.diff(documents.offsets[begin : stop + 1])
                        writer.add_stored(tokens[first:last], lengths, documents.sidecar[begin:stop])
                    begin = stop
                    if begin < end:
                        close()
            if shard_tokens is None:
                close()
        close()
    return entries


def write_rejected(preparation: Preparation, choice: Choice, config: PrepareConfig, file: IO[bytes]) -> None:
    """Write rejected.jsonl: for each item its rejected records, then its dropped documents."""
    locations = Locations()
    kept_number = np.cumsum(choice.reasons == KEPT) - 1
    for documents, start, reasons in choice.parts():
        with open(rejected_path(preparation.out, documents.item.name), "rb") as rejected:
            shutil.copyfileobj(rejected, file)
        dropped = np.flatnonzero(reasons)
        if not len(dropped):
            continue
        notes = read_notes(preparation.folder, documents.item.name, LOCATIONS)
        for document in dropped.tolist():
            name, line = locations.find(documents.entry["source_files"], notes[document])
            reason = int(reasons[document])
            if choice.originals is not None and reason in (DUPLICATE, NEAR_DUPLICATE):
                original = kept_number[choice.originals[start + document]]
                how = "the same text as" if reason == DUPLICATE else "nearly the text of"
                detail = f"{how} document {original:,} of the store"
            else:
                detail = _detail(preparation, config, documents, document, reason)
            shown = shown_name(name, preparation.folder)
            content = {"file": shown, "line": line, "reason": REASONS[reason], "detail": detail,
                       "bytes": int(documents.sidecar["text_bytes"][document])}  # fmt: skip
            file.write(orjson.dumps(content) + b"\n")


def report_contamination(preparation: Preparation, documents: list[ItemDocuments], file: IO[bytes]) -> dict[str, Any]:
    """List every contaminated document in `file` and return the sums for the ledger."""
    described = read_descriptions(preparation.folder)
    found = {"documents": 0, "tokens": 0}
    by_text = [0] * len(described)
    locations = Locations()
    for part in documents:
        notes = read_notes(preparation.folder, part.item.name, EVALUATION)
        where = read_notes(preparation.folder, part.item.name, LOCATIONS)
        lengths = part.lengths
        for document in np.flatnonzero(notes["runs"]).tolist():
            name, line = locations.find(part.entry["source_files"], where[document])
            text = int(notes["text"][document])
            content = {"file": shown_name(name, preparation.folder), "line": line, "tokens": int(lengths[document]),
                       "shared_runs": int(notes["runs"][document]), "evaluation_text": described[text]["text"]}  # fmt: skip
            file.write(orjson.dumps(content) + b"\n")
            found["documents"] += 1
            found["tokens"] += int(lengths[document])
            by_text[text] += 1
    texts = [{**entry, "contaminated": count} for entry, count in zip(described, by_text, strict=True)]
    return {**found, "run_words": 13, "texts": texts}


def _last_that_fits(offsets: np.ndarray, begin: int, end: int, filled: int, shard_tokens: Optional[int]) -> int:
    """The end of the documents from `begin` that fit a shard with `filled` tokens; an empty shard takes at least one."""
    if shard_tokens is None:
        return end
    room = offsets[begin] + shard_tokens - filled
    fits = int(np.searchsorted(offsets[begin : end + 1], room, side="right")) - 1
    return min(end, begin + max(fits, 0 if filled else 1))


def _runs(kept: np.ndarray) -> Iterator[tuple[int, int]]:
    """[start, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(kept, prepend=False, append=False))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _detail(
    preparation: Preparation, config: PrepareConfig, documents: ItemDocuments, document: int, reason: int
) -> str:
    tokens = int(documents.offsets[document + 1] - documents.offsets[document])
    if reason == UNDER_MIN:
        return f"{tokens:,} tokens; min_tokens is {config.min_tokens:,}"
    if reason == OVER_MAX:
        return f"{tokens:,} tokens; max_tokens_per_document is {config.max_tokens_per_document:,}"
    if reason == BEYOND:
        return f"the store already has {config.max_tokens:,} tokens"
    notes = read_notes(preparation.folder, documents.item.name, EVALUATION)[document]
    text = read_descriptions(preparation.folder)[int(notes["text"])]["text"]
    return f"shares {int(notes['runs']):,} runs of 13 words with {text}"
