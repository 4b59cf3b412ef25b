"""Figures about the tokens of a store: how often each id occurs, how long documents are, how many tokens a word takes.

In: an open store, and its tokenizer where there is one. Out: plain values. Large stores are sampled at fixed positions, and the
figures say how many tokens they cover. Memory: 8 bytes per id and per document.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from steep.store.reader import TokenStore
from steep.store.token_file import read_in_order
from steep.tokenizer.encode import TextTokenizer

COUNTED_TOKENS = 1 << 27
"""This many tokens of a larger store are counted, in pieces spread evenly over it."""
PIECE_TOKENS = 1 << 16
DECODED_TOKENS = 200_000
DECODED_TOKENS_OF_ONE = 20_000
FREQUENT_IDS = 10


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
                piece = shard.tokens[begin:stop].astype(np.int64)
            found = np.bincount(piece, minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
            looked_at += len(piece)
    return IdCounts(counts, looked_at, looked_at == store.num_tokens)


def frequent_ids(found: IdCounts, tokenizer: Optional[TextTokenizer]) -> list[dict[str, Any]]:
    """The most frequent ids, as text where there is a tokenizer."""
    order = np.argsort(-found.counts, kind="stable")[:FREQUENT_IDS]
    return [
        {
            "id": int(number),
            "text": None if tokenizer is None else tokenizer.decode([number]),
            "count": int(found.counts[number]),
            "share": round(int(found.counts[number]) / found.num_tokens, 6),
        }
        for number in order
        if found.counts[number]
    ]


def unknown_id(tokenizer: TextTokenizer) -> Optional[int]:
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
        {
            "from": 2 ** (k - 1) if k else 0,
            "to": 2**k - 1,
            "documents": int(documents[k]),
            "tokens": int(tokens[k]),
        }
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
        ids = first_ids(store, int(position * scale), DECODED_TOKENS_OF_ONE)
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


def first_ids(store: TokenStore, document: int, most: int) -> np.ndarray:
    """At most `most` ids from the start of a document: int64."""
    out = np.empty(min(int(store.document_lengths[document]), most), dtype=np.int64)
    store.read(document, 0, len(out), out)
    return out
