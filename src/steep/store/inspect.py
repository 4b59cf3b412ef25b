"""What a token store holds, as plain values: for `steep inspect`.

In: an open store, and its tokenizer where there is one. Large stores are sampled at fixed positions, and the figures say how
many tokens they cover. Memory: 8 bytes per id and per document.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from steep.core.errors import DataError
from steep.store.reader import TokenStore, open_store
from steep.store.token_file import read_in_order
from steep.tokenizer.encode import POLICY_FILE, TextTokenizer

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
NUM_EXAMPLES = 5
EXAMPLE_TOKENS = 64
COUNTED_TOKENS = 1 << 27
"""This many tokens of a larger store are counted, in pieces spread evenly over it."""
PIECE_TOKENS = 1 << 16
DECODED_TOKENS = 200_000
DECODED_TOKENS_OF_ONE = 20_000
FREQUENT_IDS = 10


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
    sizes = store.text_bytes if store.num_tokens else None
    formats = ", ".join(dict.fromkeys(shard.format for shard in store.shards))
    verified = verify_store(store) if verify else None  # before anything of it is used
    known = tokenizer or _tokenizer_of(store)
    counts = count_ids(store, 0 if known is None else known.vocab_size)
    found = {
        "kind": "token store",
        "path": str(store.path),
        "written_by": "steep" if manifest else f"another tool{f' ({formats})' if formats else ''}",
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
        "bytes_per_token": None if sizes is None else round(float(sizes.sum()) / store.num_tokens, 4),
        "fertility": None if known is None else fertility(store, known, seed),
        "length_quantiles": _length_quantiles(store.document_lengths),
        "length_histogram": length_histogram(store.document_lengths),
        "ids": _describe_ids(counts, known),
        "examples": _examples(store, known, seed),
    }
    return found if verified is None else {**found, "verified": verified}


def verify_store(store: TokenStore) -> str:
    """Read every byte and say what was compared. Raises DataError naming the damaged file."""
    store.verify()
    if not store.manifest:
        return "sizes and indices agree and no id is negative; without a manifest there are no checksums"
    own = _tokenizer_of(store)
    if own is not None and own.fingerprint != store.tokenizer_fingerprint:
        raise DataError(
            f"{store.tokenizer_directory}: is another tokenizer ({own.fingerprint[:12]}) than the one that made the store "
            f"({str(store.tokenizer_fingerprint)[:12]}); copy the store again."
        )
    if any("xxh3_blocks" not in entry for entry in store.manifest["shards"]):
        return (
            "every file equals its checksum; an earlier steep wrote the store without checksums of its blocks, so a run cannot "
            "compare them while it reads (prepare the text again to have them)"
        )
    return "every file equals its checksum, and the counts of .bin, .idx and manifest agree"


def _describe_ids(found: IdCounts, tokenizer: Optional[TextTokenizer]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "counted_tokens": found.num_tokens,
        "whole_store": found.whole,
        "different": int(np.count_nonzero(found.counts)),
        "most_frequent": [
            {
                "id": number,
                "text": None if tokenizer is None else tokenizer.decode([number]),
                "count": int(found.counts[number]),
                "share": round(int(found.counts[number]) / found.num_tokens, 6),
            }
            for number in np.argsort(-found.counts, kind="stable")[:FREQUENT_IDS].tolist()
            if found.counts[number]
        ],
    }
    if tokenizer is None:
        return described
    unknown = _unknown_id(tokenizer)
    if unknown is not None:
        count = int(found.counts[unknown])
        described["unknown"] = {"id": unknown, "count": count, "share": round(count / max(1, found.num_tokens), 6)}
    never = int(np.count_nonzero(found.counts[: tokenizer.vocab_size] == 0))
    share = round(never / tokenizer.vocab_size, 6)
    described["never_used"] = {"ids": never, "of": tokenizer.vocab_size, "share": share}
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
        ids = _first_ids(store, number, EXAMPLE_TOKENS)
        text = None if tokenizer is None else tokenizer.decode(ids)
        length = int(store.document_lengths[number])
        examples.append({"document": number, "tokens": length, "first_ids": ids.tolist(), "text": text})
    return examples


@dataclass(frozen=True)
class IdCounts:
    """How often each id occurs in what was looked at."""

    counts: np.ndarray
    """(ids,) int64."""
    num_tokens: int
    """Tokens looked at."""
    whole: bool
    """Whether that is the whole store."""


def count_ids(store: TokenStore, vocab_size: int = 0) -> IdCounts:
    """Count the ids of a store, or of pieces spread evenly over it. vocab_size: the least number of counts to return."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    every = max(1, -(-store.num_tokens // COUNTED_TOKENS))
    looked_at = 0
    for shard in store.shards:
        step = PIECE_TOKENS * every
        for begin in range(0, len(shard.tokens), step):
            stop = begin + (PIECE_TOKENS if every > 1 else step)
            with read_in_order(shard.tokens):
                piece = shard.read(begin, stop).astype(np.int64)
            found = np.bincount(piece, minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
            looked_at += len(piece)
    return IdCounts(counts, looked_at, looked_at == store.num_tokens)


def _unknown_id(tokenizer: TextTokenizer) -> Optional[int]:
    """The id for text outside the vocabulary; None for tokenizers without one, such as byte-level BPE."""
    model = json.loads(tokenizer.backend.to_str())["model"]
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    token = model.get("unk_token")
    return None if token is None else tokenizer.backend.token_to_id(token)


def length_histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Documents and tokens by length: 0, 1, 2-3, 4-7 and so on, from the shortest to the longest in the store."""
    if not len(lengths):
        return []
    bins = np.frexp(lengths.astype(np.float64))[1]  # 2^(k-1) <= length < 2^k
    documents = np.bincount(bins)
    tokens = np.bincount(bins, weights=lengths.astype(np.float64))
    first = int(np.flatnonzero(documents)[0])
    return [
        {"from": 2**k // 2, "to": 2**k - 1, "documents": int(documents[k]), "tokens": int(tokens[k])}
        for k in range(first, len(documents))
    ]


def fertility(store: TokenStore, tokenizer: TextTokenizer, seed: int = 0) -> Optional[dict[str, Any]]:
    """Tokens per word and bytes per token of random documents, decoded; None without tokens.

    Words are what white space separates. BOS and EOS do not count. Documents are taken in random order until 200,000 tokens.
    """
    order = np.random.default_rng(seed).permutation(min(store.num_documents, 10_000))
    scale = store.num_documents / max(1, len(order))
    tokens = words = num_bytes = documents = 0
    for position in order:
        ids = _first_ids(store, int(position * scale), DECODED_TOKENS_OF_ONE)
        ids = ids[~np.isin(ids, [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None])]
        text = tokenizer.decode(ids)
        tokens, documents = tokens + len(ids), documents + 1
        words, num_bytes = words + len(text.split()), num_bytes + len(text.encode("utf-8"))
        if tokens >= DECODED_TOKENS:
            break
    if not tokens:
        return None
    return {
        "tokens_per_word": round(tokens / words, 4) if words else None,
        "bytes_per_token": round(num_bytes / tokens, 4),
        "of_documents": documents,
        "of_tokens": tokens,
    }


def _first_ids(store: TokenStore, document: int, most: int) -> np.ndarray:
    """(at most `most`,) int64: ids from the start of a document."""
    out = np.empty(min(int(store.document_lengths[document]), most), dtype=np.int64)
    store.read(document, 0, len(out), out)
    return out
