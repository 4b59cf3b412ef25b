"""manifest.json: what a token store holds. It is written last: a folder without it is not a store.

The ledger accounts for every record read: kept, or dropped with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

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
    settings: dict[str, Any], ledger: dict[str, Any], max_token_id: int, files: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """The content of manifest.json. Its `fingerprint` is equal for equal tokens in equal documents from the same tokenizer.

    files: path -> SHA-256 of each file beside the shards.
    """
    content = [[shard["documents"], shard["tokens"], shard["sha256_bin"], shard["sha256_idx"]] for shard in shards]
    manifest = {
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
        "files": files,
    }
    return {**manifest, "checksum": fingerprint(manifest)}


def has_manifest(folder: Path) -> bool:
    """Whether `folder` holds a finished token store (or claims to)."""
    return (folder / MANIFEST_FILE).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check manifest.json; one of an earlier steep has no `checksum`. Raises DataError."""
    path = folder / MANIFEST_FILE
    try:
        manifest = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: is not a manifest of a steep token store.")
    version = manifest.get("version")
    if isinstance(version, int) and version > VERSION:
        raise DataError(f"{path}: version {version} is newer than this steep reads ({VERSION}). Update steep.")
    noted = manifest.get("checksum")
    found = fingerprint({key: value for key, value in manifest.items() if key != "checksum"})
    wrong = "its content does not have the checksum that it lists" if noted not in (None, found) else _wrong(manifest)
    if wrong is not None:
        raise DataError(f"{path}: {wrong}; it was edited or damaged. {remedy(folder)}")
    return manifest


def remedy(folder: Path) -> str:
    """What to do about a store that is damaged."""
    return (
        f"Copy the store again from where it is whole, or delete {folder} and prepare its text again; a run does that by itself "
        "for a store in its cache."
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _wrong(manifest: dict[str, Any]) -> Optional[str]:
    """What a manifest says that cannot be, in words."""
    kinds: dict[str, type] = {"version": int, "fingerprint": str, "dtype": str, "tokenizer": dict, "ledger": dict,
                              "settings": dict, "sources": list, "shards": list}  # fmt: skip
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            return f"`{key}` is {manifest.get(key)!r:.60}"
    largest = manifest.get("max_token_id")
    if not isinstance(largest, int) or isinstance(largest, bool) or not -1 <= largest < 2**31:
        return f"`max_token_id` is {largest!r:.60}"
    for entry in [manifest, *manifest["shards"]]:
        if not isinstance(entry, dict):
            return f"an entry of `shards` is {entry!r:.60}"
        for key in ("documents", "tokens"):
            if not _is_count(entry.get(key)):
                return f"`{key}` is {entry.get(key)!r:.60}"
    for entry in manifest["shards"]:
        name = entry.get("name")
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            return f"the name of a shard is {name!r:.60}, which is not a plain file name"
        for key in ("sha256_bin", "sha256_idx", "sha256_documents"):
            if not isinstance(entry.get(key), str):
                return f"`{key}` of {name} is {entry.get(key)!r:.60}"
        if not isinstance(entry.get("xxh3_blocks", ""), str):
            return f"`xxh3_blocks` of {name} is not a string of checksums"
    files = manifest.get("files", {})
    if not isinstance(files, dict) or any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        return "`files` names something outside the store"
    fingerprints = [manifest["tokenizer"].get("fingerprint")]
    if not isinstance(fingerprints[0], str):
        return f"the tokenizer's `fingerprint` is {fingerprints[0]!r:.60}"
    content = [
        [entry[key] for key in ("documents", "tokens", "sha256_bin", "sha256_idx")] for entry in manifest["shards"]
    ]
    if manifest["fingerprint"] != fingerprint([content, fingerprints[0]]):
        return "its `fingerprint` is not that of its shards and tokenizer"
    return None
