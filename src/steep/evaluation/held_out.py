"""How well a model predicts a held-out text. In: documents, and a function from batches to token losses. Out: a Score.

Documents are laid end to end and cut into sequences, and attention stays inside each document; every token but the first of
a document is predicted once (the first too where documents begin with BOS). Sums are taken per token in float64, so the score
depends on the batch size only through the rounding of the model itself. Weakness: where a sequence ends inside a document,
the rest starts without the context before it, so scores at short sequence lengths are higher than a sliding window would give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from steep.batch import IGNORE_INDEX, Batch
from steep.core.errors import DataError
from steep.data.held_out_text import HeldOutText, ScoredStore
from steep.loader import make_batch
from steep.metrics import bits_per_byte
from steep.order.data_order import OrderedSequence
from steep.order.packing import ConcatPacking

TokenLosses = Callable[[Batch], torch.Tensor]
"""From a batch to the (B, T) fp32 losses of its labels in nats, 0 where there is no label."""


@dataclass(frozen=True)
class Score:
    """How well a model predicts one text."""

    text: str
    nats_per_token: float
    """Mean over every predicted token, the end-of-text tokens included: what training minimizes."""
    perplexity: float
    """exp(nats_per_token)."""
    bits_per_byte: float | None
    """Over the UTF-8 bytes of the documents, without the loss of end-of-text tokens. None where the store does not record the
    bytes and there is no tokenizer to decode them."""
    tokens: int
    """Predicted tokens."""
    documents: int
    text_bytes: int | None

    def to_mapping(self) -> dict[str, Any]:
        """The score as JSON values."""
        return asdict(self)

    def __repr__(self) -> str:
        bits = "" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f} bits/byte, "
        size = f"{self.tokens:,} tokens of {self.documents:,} documents"
        return f"Score({self.text}: {bits}perplexity {self.perplexity:.3f}, {size})"


def first_documents(text: HeldOutText, tokens: int) -> list[NDArray[np.int64]]:
    """Whole documents of each part in order, each one that still fits in `tokens`; where none fits, the shortest one.

    A document longer than the remaining budget is skipped, so one long document does not end the selection.
    """
    chosen: list[NDArray[Any]] = []
    left = tokens if text.most_tokens is None else min(tokens, text.most_tokens)
    for store, documents in text.parts:
        taken = []
        for document, length in zip(documents.tolist(), store.document_lengths[documents].tolist(), strict=True):
            if length <= left:
                taken.append(document)
                left -= length
                if left == 0:
                    break
        chosen.append(np.array(taken, dtype=np.int64))
    if text.parts and not any(map(len, chosen)):
        store, documents = text.parts[0]
        chosen[0] = documents[[int(np.argmin(store.document_lengths[documents]))]]
    return chosen


def score_text(
    token_losses: TokenLosses,
    text: HeldOutText,
    *,
    tokens: int,
    batch_size: int,
    sequence_length: int,
    eos_id: int | None,
    decode: Callable[[Sequence[int]], str] | None = None,
    advance: Callable[[int], None] = lambda count: None,
    chosen: list[NDArray[Any]] | None = None,
) -> Score:
    """Score the first documents of `text`. Raises DataError where there is nothing to predict.

    chosen: the documents of each part; default `first_documents`, by this tokenizer's tokens. decode: ids to text, to count the
    bytes of stores that do not record them. advance: called with the number of tokens after every batch.
    """
    chosen = first_documents(text, tokens) if chosen is None else chosen
    nats_all = nats_text = 0.0
    predicted = 0
    for batch in _batches(text, chosen, sequence_length, batch_size):
        losses_N = token_losses(batch).detach().double().cpu().reshape(-1)  # N = B*T
        labels_N = batch.labels.reshape(-1)
        is_label_N = labels_N != IGNORE_INDEX
        is_text_N = is_label_N & (labels_N != eos_id)
        nats_all += float(losses_N.sum())
        nats_text += float(losses_N[is_text_N].sum()) if eos_id is not None else float(losses_N.sum())
        predicted += int(is_label_N.sum())
        advance(batch.input_ids.numel())
    if predicted == 0:
        raise DataError(f"held-out text {text.name!r}: no token to predict in its {sum(map(len, chosen))} documents")
    text_bytes = _text_bytes(text, chosen, decode)
    nats_per_token = nats_all / predicted
    return Score(
        text=text.name,
        nats_per_token=nats_per_token,
        perplexity=math.exp(nats_per_token) if nats_per_token < 700 else math.inf,  # float64 ends at exp(709)
        bits_per_byte=bits_per_byte(nats_text, text_bytes) if text_bytes else None,  # nats / ln 2 / bytes
        tokens=predicted,
        documents=sum(map(len, chosen)),
        text_bytes=text_bytes,
    )


def _batches(
    text: HeldOutText, chosen: list[NDArray[np.int64]], sequence_length: int, batch_size: int
) -> Iterator[Batch]:
    """Every chosen document in the order it is stored, `batch_size` sequences at a time."""
    stores = [store for store, _ in text.parts]
    waiting: list[OrderedSequence] = []
    for part, documents in enumerate(chosen):
        packing = ConcatPacking(documents, stores[part].document_lengths[documents], sequence_length)
        for k in range(packing.num_sequences):
            waiting.append(OrderedSequence(part, packing.sequence(k)))
            if len(waiting) == batch_size:
                yield make_batch(waiting, stores, sequence_length)
                waiting = []
    if waiting:
        yield make_batch(waiting, stores, sequence_length)


def _text_bytes(
    text: HeldOutText, chosen: list[NDArray[np.int64]], decode: Callable[[Sequence[int]], str] | None
) -> int | None:
    total = 0
    for (store, _), documents in zip(text.parts, chosen, strict=True):
        if store.text_bytes is not None:
            total += int(store.text_bytes[documents].sum())
        elif decode is not None:
            total += sum(len(decode(tokens_of(store, int(document))).encode()) for document in documents)
        else:
            return None
    return total


def tokens_of(store: ScoredStore, document: int, most: int | None = None) -> list[int]:
    """The tokens of a document, the first `most` of them if that is given."""
    out = np.empty(int(store.document_lengths[document]), dtype=np.int64)[:most]
    store.read(document, 0, len(out), out)
    return out.tolist()
