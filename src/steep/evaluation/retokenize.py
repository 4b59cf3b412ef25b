"""Held-out text in the tokens of another model. In: what of a text is scored, in one tokenizer. Out: the same in another one.

The text of a run's store, or the part of a document of which only one tokenizer knows the ends, is decoded by it and encoded by
the other. Weaknesses: what a tokenizer normalizes away is missing for the other too, and a character that is cut at the end of a
part is replaced in its text.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from steep.data.held_out_text import HeldOutText
from steep.evaluation.held_out import Beginnings, tokens_of
from steep.store.cut_store import UNKNOWN_BYTES, CutStore
from steep.tokenizer.encode import TextTokenizer


class RetokenizedStore:
    """Documents in memory, as a store that can be scored."""

    def __init__(self, documents: list[NDArray[np.int64]], text_bytes: list[int]):
        self._documents = documents
        self.document_lengths = np.array([len(document) for document in documents], dtype=np.int64)
        self.text_bytes = np.array(text_bytes, dtype=np.int64)

    def read(self, document: int, start: int, count: int, out: NDArray[np.int64]) -> None:
        """Tokens [start, start + count) of `document` into `out`."""
        out[:] = self._documents[document][start : start + count]


def is_of_parts(text: HeldOutText, chosen: list[Beginnings]) -> bool:
    """Whether parts of documents are scored, so that documents are not enough to say what."""
    return any(
        isinstance(store, CutStore) or bool((part.tokens < store.document_lengths[part.documents]).any())
        for (store, _), part in zip(text.parts, chosen, strict=True)
    )


def retokenized(
    text: HeldOutText, chosen: list[Beginnings], ours: TextTokenizer, other: TextTokenizer
) -> tuple[HeldOutText, list[Beginnings]]:
    """What is scored of a text in `ours`, in the tokens of `other`, with its bytes."""
    documents, sizes = [], []
    for (store, _), part in zip(text.parts, chosen, strict=True):
        for document, count in zip(part.documents.tolist(), part.tokens.tolist(), strict=True):
            ids = tokens_of(store, document, count)
            words = ours.decode_text(ids)
            found = other.encode(words)
            if other.prepend_bos and other.bos_id is not None:
                found = [other.bos_id, *found]
            if other.append_eos and other.eos_id is not None and ids and ids[-1] == ours.eos_id:
                found = [*found, other.eos_id]
            documents.append(np.array(found, dtype=np.int64))
            known = store.text_bytes
            whole = known is not None and count == store.document_lengths[document]
            size = int(known[document]) if whole and known is not None else UNKNOWN_BYTES
            sizes.append(len(words.encode()) if size == UNKNOWN_BYTES else size)
    store = RetokenizedStore(documents, sizes)
    numbers = np.arange(len(documents))
    return HeldOutText(text.name, [(store, numbers)], role=text.role), [Beginnings(numbers, store.document_lengths)]
