"""Held-out documents that are also trained on. In: stores of held-out texts, a run's sources. Out: one line for each text.

Documents are compared by the hashes of their content that every store keeps. Weakness: only whole equal documents are found;
`prepare.check_against` finds those that share a run of 13 words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from steep.order.data_order import OrderedSource
from steep.store.cut_store import CutStore
from steep.store.reader import TokenStore
from steep.store.stream import StreamSource

MOST_FOREIGN_TOKENS = 20_000_000
"""Stores that other tools wrote have no hashes; larger ones are not read through for this."""


def overlap_lines(
    held_out: Mapping[str, Sequence[TokenStore]],
    sources: Iterable[OrderedSource],
    stores: Iterable[TokenStore | StreamSource],
) -> list[str]:
    """A warning for each held-out text of which documents are trained on. sources, stores: of training, in the same order."""
    pairs = [
        (source, store)
        for source, store in zip(sources, stores, strict=True)
        if isinstance(store, TokenStore) and _has_hashes(store)
    ]
    return [line for name, texts in held_out.items() if (line := _line(name, texts, pairs))]


def _line(name: str, texts: Sequence[TokenStore], pairs: Sequence[tuple[OrderedSource, TokenStore]]) -> str:
    documents = found_documents = found_tokens = 0
    where = []
    for text in texts:
        documents += text.num_documents
        if not _has_hashes(text) or not text.num_documents:
            continue
        wanted = np.unique(text.content_hashes)
        found = np.zeros(len(wanted), dtype=bool)
        for source, store in pairs:
            if bool(store.manifest) != bool(text.manifest):  # one has hashes of text, the other of ids
                continue
            hashes = store.content_hashes[_trained(source, store)]
            at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
            here = at[wanted[at] == hashes]
            found[here] = True
            where += [source.name] if len(here) else []
        also = np.isin(text.content_hashes, wanted[found])
        found_documents += int(also.sum())
        found_tokens += int(text.document_lengths[also].sum())
    if not found_documents:
        return ""
    tokens = sum(text.num_tokens for text in texts)
    which = f"{found_documents:,} of its {documents:,} documents" if found_documents < documents else "all of it"
    return (
        f"warning: data.validation.{name}: {which} ({found_tokens:,} of {tokens:,} tokens) is also trained on, in "
        f"{' and '.join(dict.fromkeys(where))}, so its score says what is remembered, not what is learned; take it out of one of "
        "the two"
    )


def _trained(source: OrderedSource, store: TokenStore) -> np.ndarray:
    """The documents of the store that are trained on, whole or in part."""
    if source.documents is None:
        return np.arange(store.num_documents)
    if not isinstance(store, CutStore):
        return source.documents
    return np.unique(store.origins(source.documents))


def trained_documents(source: OrderedSource, store: TokenStore | StreamSource) -> int:
    """How many documents of a source are trained on, whole or in part; pieces of one document count once."""
    return len(_trained(source, store)) if isinstance(store, CutStore) else source.num_documents


def _has_hashes(store: TokenStore) -> bool:
    return bool(store.manifest) or store.num_tokens <= MOST_FOREIGN_TOKENS
