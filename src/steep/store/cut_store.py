"""A token store some of whose documents are used in pieces. In: a store and the pieces. Out: a store with more documents.

A document that is partly held out is never read whole: its pieces are documents of their own, so nothing joins what stands on
both sides of a held-out block, and the token after a piece is not its label.
"""

from __future__ import annotations

from functools import cached_property
from typing import Optional

import numpy as np

from steep.store.reader import TokenStore

UNKNOWN_BYTES = -1
"""`text_bytes` of a piece: only a tokenizer knows."""


class CutStore(TokenStore):
    """The documents of `store`, numbered as there, and after them pieces of some of them.

    pieces: (P, 3) int64, document, first token and tokens of each. `num_documents`, `num_tokens` and `content_hashes` are those
    of the store, without the pieces.
    """

    def __init__(self, store: TokenStore, pieces: np.ndarray):
        self.__dict__.update(store.__dict__)  # files stay open once, and nothing is read again
        self.__dict__.pop("text_bytes", None)  # if `store` has read them, they would hide those of the pieces
        self._whole, self._pieces = store, pieces
        self.piece_of = pieces[:, 0]
        """(P,) int64, the document of each piece."""
        self.document_lengths = np.concatenate([store.document_lengths, pieces[:, 2]])
        """(num_documents + P,) int64."""
        ends = pieces[:, 1] + pieces[:, 2] == store.document_lengths[pieces[:, 0]]
        self.open_ended = frozenset((store.num_documents + np.flatnonzero(~ends)).tolist())

    def read(self, document: int, start: int, count: int, out: np.ndarray) -> None:
        """As `TokenStore.read`, of pieces too."""
        if document < self.num_documents:
            self._whole.read(document, start, count, out)
            return
        whole, first, tokens = map(int, self._pieces[document - self.num_documents])
        if start < 0 or count < 0 or start + count > tokens:
            raise IndexError(f"tokens [{start}, {start + count}) of {tokens} in a piece of document {whole}")
        self._whole.read(whole, first + start, count, out)

    @cached_property
    def text_bytes(self) -> Optional[np.ndarray]:
        """(num_documents + P,) int64, `UNKNOWN_BYTES` for pieces; None for stores that other tools wrote."""
        known = self._whole.text_bytes
        return None if known is None else np.concatenate([known, np.full(len(self._pieces), UNKNOWN_BYTES)])

    def origins(self, documents: np.ndarray) -> np.ndarray:
        """(n,) the documents of the store that (n,) documents or pieces belong to."""
        found = documents.copy()
        pieces = documents >= self.num_documents
        found[pieces] = self._pieces[documents[pieces] - self.num_documents, 0]
        return found

    def origin(self, document: int, start: int) -> tuple[int, int]:
        """The document of the store that token `start` of a document or piece belongs to, and where it stands there."""
        if document < self.num_documents:
            return document, start
        whole, first, _ = map(int, self._pieces[document - self.num_documents])
        return whole, first + start
