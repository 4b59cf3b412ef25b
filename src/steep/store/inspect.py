"""What a token store holds, as plain values: for `steep inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from steep.core.errors import DataError
from steep.store.reader import TokenStore, open_store
from steep.store.statistics import IdCounts, count_ids, fertility, first_ids, frequent_ids, length_histogram, unknown_id
from steep.tokenizer.encode import POLICY_FILE, TextTokenizer

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
NUM_EXAMPLES = 5
EXAMPLE_TOKENS = 64


def inspect_store(
    path: Union[str, Path],
    *,
    tokenizer: Optional[TextTokenizer] = None,
    seed: int = 0,
    format: str = "auto",
    verify: bool = False,
) -> dict[str, Any]:
    """Counts, tokenizer, ledger, lengths, fertility, most frequent and never used ids, and five random documents.

    tokenizer: for a store without one; it shows the text and finds the documents. seed: chooses the documents.
    format: as for `open_store`. verify: read every byte, compare with the checksums, and the tokenizer with its fingerprint.
    Values are plain JSON. Raises DataError when `path` is not a complete store or, with `verify`, is damaged; ModelError when
    the store's tokenizer is damaged.
    """
    eos_id, bos_id = (None, None) if tokenizer is None else (tokenizer.eos_id, tokenizer.bos_id)
    messages: list[str] = []
    store = open_store(path, format=format, eos_id=eos_id, bos_id=bos_id, say=messages.append)
    manifest = store.manifest
    known = tokenizer or _tokenizer_of(store)
    counts = count_ids(store, 0 if known is None else known.vocab_size)
    found = {
        "kind": "token store",
        "path": str(store.path),
        "written_by": "steep" if manifest else _writers(store),
        "messages": messages,
        "fingerprint": store.fingerprint,
        "documents": store.num_documents,
        "tokens": store.num_tokens,
        "shards": len(store.shards),
        "bytes": sum(shard.tokens.nbytes for shard in store.shards),
        "dtype": store.shards[0].tokens.dtype.name if store.shards else None,
        "max_token_id": store.max_token_id,
        "eos_id": store.eos_id,
        "bos_id": store.bos_id,
        "tokenizer": manifest.get("tokenizer"),
        "ledger": manifest.get("ledger"),
        "settings": manifest.get("settings"),
        "sources": manifest.get("sources", []),
        "bytes_per_token": _bytes_per_token(store),
        "fertility": None if known is None else fertility(store, known, seed),
        "length_quantiles": _length_quantiles(store.document_lengths),
        "length_histogram": length_histogram(store.document_lengths),
        "ids": _describe_ids(counts, known),
        "examples": _examples(store, known, seed),
    }
    if verify:
        found["verified"] = verify_store(store)
    return found


def verify_store(store: TokenStore) -> str:
    """Read every byte and say what was compared. Raises DataError naming the damaged file."""
    store.verify()
    if not store.manifest:
        return "sizes and indices agree and no id is negative; without a manifest there are no checksums"
    folder = store.tokenizer_directory
    if folder is not None and (folder / POLICY_FILE).is_file():
        own = TextTokenizer.load(folder).fingerprint
        if own != store.tokenizer_fingerprint:
            raise DataError(
                f"{folder}: is another tokenizer ({own[:12]}) than the one that made the store "
                f"({str(store.tokenizer_fingerprint)[:12]}); copy the store again."
            )
    return "every file equals its checksum, and the counts of .bin, .idx and manifest agree"


def _writers(store: TokenStore) -> str:
    formats = dict.fromkeys(shard.format for shard in store.shards)
    return f"another tool ({', '.join(formats)})" if formats else "another tool"


def _bytes_per_token(store: TokenStore) -> Optional[float]:
    if store.text_bytes is None or not store.num_tokens:
        return None
    return round(float(store.text_bytes.sum()) / store.num_tokens, 4)


def _describe_ids(found: IdCounts, tokenizer: Optional[TextTokenizer]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "counted_tokens": found.num_tokens,
        "whole_store": found.whole,
        "different": int(np.count_nonzero(found.counts)),
        "most_frequent": frequent_ids(found, tokenizer),
    }
    if tokenizer is None:
        return described
    unknown = unknown_id(tokenizer)
    if unknown is not None:
        count = int(found.counts[unknown])
        described["unknown"] = {"id": unknown, "count": count, "share": round(count / max(1, found.num_tokens), 6)}
    never = int(np.count_nonzero(found.counts[: tokenizer.vocab_size] == 0))
    described["never_used"] = {
        "ids": never,
        "of": tokenizer.vocab_size,
        "share": round(never / tokenizer.vocab_size, 6),
    }
    described["beyond_the_tokenizer"] = int(found.counts[tokenizer.vocab_size :].sum())
    return described


def _length_quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Document lengths in tokens; each value is the length of a document in the store."""
    if not len(lengths):
        return {}
    values = np.quantile(lengths, list(QUANTILES.values()), method="lower")
    return {name: int(value) for name, value in zip(QUANTILES, values, strict=True)}


def _tokenizer_of(store: TokenStore) -> Optional[TextTokenizer]:
    folder = store.tokenizer_directory
    if folder is None or not (folder / POLICY_FILE).is_file():
        return None
    return TextTokenizer.load(folder)


def _examples(store: TokenStore, tokenizer: Optional[TextTokenizer], seed: int) -> list[dict[str, Any]]:
    count = min(NUM_EXAMPLES, store.num_documents)
    numbers = np.random.default_rng(seed).choice(store.num_documents, count, replace=False).tolist() if count else []
    examples = []
    for number in sorted(numbers):
        ids = first_ids(store, number, EXAMPLE_TOKENS)
        text = None if tokenizer is None else tokenizer.decode(ids)
        length = int(store.document_lengths[number])
        examples.append({"document": number, "tokens": length, "first_ids": ids.tolist(), "text": text})
    return examples
