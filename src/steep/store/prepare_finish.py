"""The end of `prepare`: shards are joined, documents are chosen, and the manifest makes the folder a store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from steep.core.errors import DataError
from steep.core.files import atomic_writer, sha256_file, write_json
from steep.sources.dropped import advice_on_dropped
from steep.sources.inputs import STANDARD_INPUT
from steep.store.config import PrepareConfig
from steep.store.manifest import (
    CONTAMINATED_FILE,
    MANIFEST_FILE,
    REJECTED_FILE,
    SIDECAR_SUFFIX,
    TOKENIZER_FOLDER,
    add_ledgers,
    make_manifest,
)
from steep.store.prepare_folder import SPOOL_FILE, remove_store
from steep.store.select_documents import (
    KEPT,
    Choice,
    choose_documents,
    count_duplicates,
    report_contamination,
    write_rejected,
    write_shards,
)
from steep.store.shard_work import Preparation, is_finished
from steep.store.work import HashedInput, WorkItem, source_name
from steep.tokenizer.encode import TextTokenizer


def finish_store(
    preparation: Preparation, items: list[WorkItem], settings: dict[str, Any], inputs: list[HashedInput], config: PrepareConfig,
    tokenizer: TextTokenizer,
) -> dict[str, Any]:  # fmt: skip
    """Choose among the documents that were read, write the manifest, and return its content.

    settings: those that decide the bytes of the store. Raises DataError if no document is left.
    """
    out = preparation.out
    choice = choose_documents(preparation, [item for item in items if is_finished(preparation, item)], config)
    ledger = add_ledgers(documents.entry["ledger"] for documents in choice.items)
    if not (choice.reasons == KEPT).any():
        message = _nothing_kept(ledger, choice)
        remove_store(out)  # so that the next call, with other settings, starts afresh
        raise DataError(message)
    shards = _final_shards(preparation, choice, config)
    ledger |= _chosen(choice, ledger, shards)
    if len(choice.items) < len(items):
        unused = sum(item.bytes for item in items[len(choice.items) :])
        ledger["not_used"] = {"bytes": unused, "reason": "max_tokens was reached"}
    _write_lists(preparation, choice, config, ledger)
    backends = [tokenizer.encoder(name).description for _, name in sorted(preparation.backends.items())]
    sources = [
        {
            "source": source_name(preparation.sources[file.source]),
            "number": file.source,
            "path": STANDARD_INPUT if file.path == preparation.folder / SPOOL_FILE else str(file.path),
            "format": file.format,
            "size": file.size,
            "sha256": file.sha256,
        }
        for file in inputs
    ]
    manifest = make_manifest(
        shards=[{key: value for key, value in shard.items() if key != "max_token_id"} for shard in shards],
        dtype=preparation.dtype.name,
        tokenizer={"fingerprint": tokenizer.fingerprint, **tokenizer.policy, "vocab_size": tokenizer.vocab_size,
                   "description": tokenizer.description, "backends": backends},
        sources=sources,
        settings=settings,
        ledger=ledger,
        max_token_id=max(shard["max_token_id"] for shard in shards),
        files=_files_beside_shards(out),
    )  # fmt: skip
    write_json(out / MANIFEST_FILE, manifest)
    shutil.rmtree(preparation.folder)
    return manifest


def _files_beside_shards(out: Path) -> dict[str, str]:
    """Path -> SHA-256 of the lists and of the tokenizer's files."""
    lists = [path for path in (out / REJECTED_FILE, out / CONTAMINATED_FILE) if path.is_file()]
    tokenizer = sorted(path for path in (out / TOKENIZER_FOLDER).rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): sha256_file(path) for path in [*lists, *tokenizer]}


def _chosen(choice: Choice, ledger: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    """What the choice changes in the ledger."""
    changed = {
        "documents_kept": sum(shard["documents"] for shard in shards),
        "dropped": dict(sorted({**ledger["dropped"], **choice.dropped}.items())),
        "text_bytes": sum(int(part.sidecar["text_bytes"][why == KEPT].sum()) for part, _, why in choice.parts()),
        "tokens": sum(shard["tokens"] for shard in shards),
        "exact_duplicates": count_duplicates(choice.items, choice.reasons == KEPT),
    }
    if choice.dropped:
        changed["dropped_bytes"] = dict(sorted({**ledger.get("dropped_bytes", {}), **choice.dropped_bytes}.items()))
        changed["dropped_tokens"] = dict(sorted(choice.dropped_tokens.items()))
    return changed


def _write_lists(preparation: Preparation, choice: Choice, config: PrepareConfig, ledger: dict[str, Any]) -> None:
    """Write contaminated.jsonl, whose sums go into the ledger, and rejected.jsonl, where there is something to list."""
    out = preparation.out
    if config.check_against:
        with atomic_writer(out / CONTAMINATED_FILE) as file:
            ledger["contamination"] = report_contamination(preparation, choice.items, file)
        if not ledger["contamination"]["documents"]:
            (out / CONTAMINATED_FILE).unlink()
    if ledger["dropped"]:
        with atomic_writer(out / REJECTED_FILE) as file:
            write_rejected(preparation, choice, config, file)


def _final_shards(preparation: Preparation, choice: Choice, config: PrepareConfig) -> list[dict[str, Any]]:
    """The store's shards: those of the items, or new ones of the chosen documents."""
    if preparation.chooses:
        return write_shards(preparation, choice, config.shard_tokens)
    shards = []
    for shard, entry in ((documents.entry["shard"], documents.entry) for documents in choice.items):
        if shard["documents"]:
            shards.append({**shard, "max_token_id": entry["max_token_id"]})
            continue
        for suffix in (".bin", ".idx", SIDECAR_SUFFIX):
            (preparation.out / f"{shard['name']}{suffix}").unlink(missing_ok=True)
    return shards


def _nothing_kept(ledger: dict[str, Any], choice: Choice) -> str:
    dropped = {**ledger["dropped"], **choice.dropped}
    if not dropped:
        return "the input holds no documents: every file is empty."
    reason, count = max(dropped.items(), key=lambda pair: pair[1])
    if reason in choice.dropped:
        return (
            f"no document is left: of {ledger['records_read']:,} records {count:,} were dropped as {reason!r}. "
            "Change that setting."
        )
    found = (documents.entry["first_rejected"] for documents in choice.items)
    advice = advice_on_dropped(ledger)
    example = next(first[reason] for first in found if reason in first)
    return (
        f"the input holds no documents: all {ledger['records_read']:,} records were rejected, {count:,} as "
        f"{reason!r}. {advice[:1].upper()}{advice[1:]}{advice and '. '}The first of those: {example.replace(f'; {advice}', '')}"
    )
