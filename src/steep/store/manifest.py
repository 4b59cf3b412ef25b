"""manifest.json: what a token store holds. It is written last: a folder without it is not a store.

The ledger accounts for every record read: kept, or dropped with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from steep.core.errors import DataError
from steep.core.files import read_json
from steep.core.fingerprint import fingerprint

MANIFEST_FILE = "manifest.json"
PREPARE_FOLDER = ".prepare"
"""In the folder of a store while it is not finished."""
FORMAT = "steep token store"
VERSION = 1
TOKENIZER_FOLDER = "tokenizer"
REJECTED_FILE = "rejected.jsonl"
CONTAMINATED_FILE = "contaminated.jsonl"
SIDECAR_SUFFIX = ".documents.npy"
SUMMED_IF_THERE = ("dropped_bytes", "other_fields", "dropped_tokens", "exact_duplicates")


def add_ledgers(ledgers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sum of ledgers, reasons in alphabetical order."""
    total: dict[str, Any] = {"records_read": 0, "documents_kept": 0, "dropped": {}, "text_bytes": 0, "tokens": 0}
    for ledger in ledgers:
        for key in ("records_read", "documents_kept", "text_bytes", "tokens"):
            total[key] += ledger[key]
        for key in ("dropped", *(key for key in SUMMED_IF_THERE if key in ledger)):
            counts = total.setdefault(key, {})
            for name, count in ledger[key].items():
                counts[name] = counts.get(name, 0) + count
    total["dropped"] = dict(sorted(total["dropped"].items()))
    return total


def make_manifest(
    *, shards: list[dict[str, Any]], dtype: str, tokenizer: dict[str, Any], sources: list[dict[str, Any]],
    settings: dict[str, Any], ledger: dict[str, Any], max_token_id: int,
) -> dict[str, Any]:  # fmt: skip
    """The content of manifest.json. Its `fingerprint` is equal for equal tokens in equal documents from the same tokenizer."""
    content = [[shard["documents"], shard["tokens"], shard["sha256_bin"], shard["sha256_idx"]] for shard in shards]
    return {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint([content, tokenizer["fingerprint"]]),
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "dtype": dtype,
        "max_token_id": max_token_id,
        "tokenizer": tokenizer,
        "ledger": ledger,
        "settings": settings,
        "sources": sources,
        "shards": shards,
    }


def has_manifest(folder: Path) -> bool:
    """Whether `folder` holds a finished token store (or claims to)."""
    return (folder / MANIFEST_FILE).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check manifest.json. Raises DataError."""
    path = folder / MANIFEST_FILE
    try:
        manifest = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: is not a manifest of a steep token store.")
    if manifest["version"] > VERSION:
        raise DataError(
            f"{path}: version {manifest['version']} is newer than this steep reads ({VERSION}). Update steep."
        )
    return manifest
