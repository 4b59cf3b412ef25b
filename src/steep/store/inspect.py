"""What is in a token store, as plain values: for `steep inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from steep.store.reader import TokenStore, open_store
from steep.tokenizer.encode import POLICY_FILE, TextTokenizer

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
NUM_EXAMPLES = 5
EXAMPLE_TOKENS = 64


def inspect_store(path: Union[str, Path]) -> dict[str, Any]:
    """Counts, tokenizer, ledger, quantiles of document length (tokens) and five documents, evenly spread.

    Values are plain JSON. `examples` hold the first 64 tokens as ids, and as text when the tokenizer is beside the store.
    Raises DataError when `path` is no whole store, ModelError when the tokenizer beside it is damaged.
    """
    store = open_store(path)
    manifest = store.manifest
    return {
        "kind": "token store",
        "path": str(store.path),
        "written_by": "steep" if manifest else "another tool (no manifest.json)",
        "fingerprint": store.fingerprint,
        "documents": store.num_documents,
        "tokens": store.num_tokens,
        "shards": len(store.shards),
        "bytes": sum(shard.tokens.nbytes for shard in store.shards),
        "dtype": store.shards[0].tokens.dtype.name if store.shards else None,
        "max_token_id": store.max_token_id,
        "tokenizer": manifest.get("tokenizer"),
        "ledger": manifest.get("ledger"),
        "settings": manifest.get("settings"),
        "sources": manifest.get("sources", []),
        "bytes_per_token": _bytes_per_token(store),
        "length_quantiles": _length_quantiles(store.document_lengths),
        "examples": _examples(store, _tokenizer_of(store)),
    }


def _bytes_per_token(store: TokenStore) -> Optional[float]:
    if store.text_bytes is None or not store.num_tokens:
        return None
    return round(float(store.text_bytes.sum()) / store.num_tokens, 4)


def _length_quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Document lengths in tokens; each value is the length of a document that is there."""
    if not len(lengths):
        return {}
    values = np.quantile(lengths, list(QUANTILES.values()), method="lower")
    return {name: int(value) for name, value in zip(QUANTILES, values, strict=True)}


def _tokenizer_of(store: TokenStore) -> Optional[TextTokenizer]:
    folder = store.tokenizer_directory
    if folder is None or not (folder / POLICY_FILE).is_file():
        return None
    return TextTokenizer.load(folder)


def _examples(store: TokenStore, tokenizer: Optional[TextTokenizer]) -> list[dict[str, Any]]:
    count = min(NUM_EXAMPLES, store.num_documents)
    numbers = [store.num_documents * index // count for index in range(count)]
    examples = []
    for number in numbers:
        length = int(store.document_lengths[number])
        ids = np.empty(min(length, EXAMPLE_TOKENS), dtype=np.int64)
        store.read(number, 0, len(ids), ids)
        text = None if tokenizer is None else tokenizer.decode(ids)
        examples.append({"document": number, "tokens": length, "first_ids": ids.tolist(), "text": text})
    return examples
