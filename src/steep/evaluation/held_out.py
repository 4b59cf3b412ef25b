"""How well a model predicts a held-out text. In: documents, and a function from batches to token losses. Out: a Score.

Documents are laid end to end and cut into sequences, and attention stays inside each document; every token but the first of
a document is predicted once (the first too where documents begin with BOS). Sums are taken per token in float64, so the score
depends on the batch size only through the rounding of the model itself. Weaknesses: where a sequence ends inside a document,
the rest starts without the context before it, so scores at short sequence lengths are higher than a sliding window would give;
the bytes of a part of a document are those of its decoded tokens, where a character that is cut counts as three bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

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
from steep.store.cut_store import UNKNOWN_BYTES

TokenLosses = Callable[[Batch], torch.Tensor]
"""From a batch to the (B, T) fp32 losses of its labels in nats, 0 where there is no label."""

FEW_DOCUMENTS = 16
"""A text of fewer documents is divided into blocks, so that the spread of its score can be seen."""
MOST_PARTS, FEWEST_PART_TOKENS = 64, 32
FEWEST_BEGINNING_TOKENS, MOST_BEGINNING_TOKENS = 128, 1024
"""The beginning of a document that does not fit has an eighth of what is left, between these; more where documents are fewer."""


class Beginnings(NamedTuple):
    """What is scored of some documents of one store: the first tokens of each, mostly all of them."""

    documents: NDArray[np.int64]
    """(n,) their numbers."""
    tokens: NDArray[np.int64]
    """(n,) how many of each."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all of them."""
        return int(self.tokens.sum())


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
    part_nats: list[float] = field(default_factory=list, repr=False)
    """Nats of the text's tokens in each of up to `MOST_PARTS` parts: what the error of a change is drawn from
    (`change_error`). Parts are documents, groups of neighbouring ones, or, of few documents, blocks of them."""

    def to_mapping(self) -> dict[str, Any]:
        """The score as JSON values."""
        return asdict(self)

    def __repr__(self) -> str:
        bits = "" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f} bits/byte, "
        size = f"{self.tokens:,} tokens of {self.documents:,} documents"
        return f"Score({self.text}: {bits}perplexity {self.perplexity:.3f}, {size})"


def choose_beginnings(text: HeldOutText, tokens: int) -> list[Beginnings]:
    """What is scored of each part of a text: at most `tokens` tokens, always the same ones.

    Whole documents in order, each one that still fits. If these are less than half of `tokens`, the beginnings of documents that
    did not fit are added: up to eight, or as many as give each `MOST_BEGINNING_TOKENS`, spread evenly over them.
    """
    left = tokens if text.most_tokens is None else min(tokens, text.most_tokens)
    limit = left
    whole: list[list[tuple[int, int]]] = []
    too_long: list[tuple[int, int, int]] = []  # part, document, tokens
    for part, (store, documents) in enumerate(text.parts):
        whole.append([])
        for document, length in zip(documents.tolist(), store.document_lengths[documents].tolist(), strict=True):
            if length <= left:
                whole[part].append((document, length))
                left -= length
            else:
                too_long.append((part, document, length))
            if left == 0:
                break
    if too_long and left > limit / 2:
        each = min(max(left // 8, FEWEST_BEGINNING_TOKENS), MOST_BEGINNING_TOKENS)
        count = min(len(too_long), max(1, left // each))
        for number in range(count):
            part, document, length = too_long[number * len(too_long) // count]
            whole[part].append((document, min(length, left // count)))
    tables = [np.array(sorted(rows), dtype=np.int64).reshape(-1, 2) for rows in whole]
    return [Beginnings(table[:, 0], table[:, 1]) for table in tables]


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
    chosen: list[Beginnings] | None = None,
) -> Score:
    """Score at most `tokens` tokens of `text`. Raises DataError where there is nothing to predict.

    chosen: what of each part; default `choose_beginnings`, by this tokenizer's tokens. decode: ids to text, to count the bytes
    where the store does not know them. advance: called with the number of tokens after every batch, padding left out.
    """
    chosen = choose_beginnings(text, tokens) if chosen is None else chosen
    nats_all = nats_text = 0.0
    predicted = 0
    part_nats = np.zeros(MOST_PARTS)
    for batch, parts_N, num_tokens in _batches(text, chosen, sequence_length, batch_size):
        losses_N = token_losses(batch).detach().double().cpu().reshape(-1)  # N = B*T
        labels_N = batch.labels.reshape(-1)
        is_label_N = labels_N != IGNORE_INDEX
        is_text_N = is_label_N & (labels_N != eos_id) if eos_id is not None else is_label_N
        nats_all += float(losses_N.sum())
        nats_text += float(losses_N[is_text_N].sum()) if eos_id is not None else float(losses_N.sum())
        part_nats += np.bincount(parts_N[is_text_N.numpy()], losses_N[is_text_N].numpy(), minlength=MOST_PARTS)
        predicted += int(is_label_N.sum())
        advance(num_tokens)
    documents = sum(len(part.documents) for part in chosen)
    if predicted == 0:
        raise DataError(f"held-out text {text.name!r}: no token to predict in its {documents} documents")
    text_bytes = _text_bytes(text, chosen, decode)
    nats_per_token = nats_all / predicted
    return Score(
        text=text.name,
        nats_per_token=nats_per_token,
        perplexity=math.exp(nats_per_token) if nats_per_token < 700 else math.inf,  # float64 ends at exp(709)
        bits_per_byte=bits_per_byte(nats_text, text_bytes) if text_bytes else None,  # nats / ln 2 / bytes
        tokens=predicted,
        documents=documents,
        text_bytes=text_bytes,
        part_nats=np.trim_zeros(part_nats, "b").tolist(),
    )


class _Shortened:
    """A store whose chosen documents end where the scoring of them does, so that no token beyond is predicted."""

    def __init__(self, store: ScoredStore, chosen: Beginnings):
        self.document_lengths = store.document_lengths.copy()
        self.document_lengths[chosen.documents] = chosen.tokens
        self.read = store.read


def _batches(
    text: HeldOutText, chosen: list[Beginnings], sequence_length: int, batch_size: int
) -> Iterator[tuple[Batch, NDArray[np.int64], int]]:
    """Everything chosen in the order it is stored, `batch_size` sequences at a time; rows no longer than their tokens.

    Beside each batch, (B*T,) the part that each position belongs to, and the tokens without padding.
    """
    stores: list[Any] = [store for store, _ in text.parts]
    for number, part in enumerate(chosen):
        if (part.tokens != stores[number].document_lengths[part.documents]).any():
            stores[number] = _Shortened(stores[number], part)
    parts = np.split(_part_of_token(chosen), np.cumsum([part.num_tokens for part in chosen])[:-1])
    waiting: list[tuple[OrderedSequence, NDArray[np.int64]]] = []

    def batch() -> tuple[Batch, NDArray[np.int64], int]:
        length = max(sequence.num_tokens for sequence, _ in waiting)
        rows = [np.pad(row, (0, length - len(row))) for _, row in waiting]
        sequences = [sequence for sequence, _ in waiting]
        return make_batch(sequences, stores, length), np.concatenate(rows), sum(len(row) for _, row in waiting)

    for number, part in enumerate(chosen):
        packing = ConcatPacking(part.documents, part.tokens, sequence_length)
        for k in range(packing.num_sequences):
            row = parts[number][k * sequence_length : (k + 1) * sequence_length]
            waiting.append((OrderedSequence(number, packing.sequence(k)), row))
            if len(waiting) == batch_size:
                yield batch()
                waiting = []
    if waiting:
        yield batch()


def _part_of_token(chosen: list[Beginnings]) -> NDArray[np.int64]:
    """(tokens,) the part that each token of the text counts in, from 0: see `Score.part_nats`."""
    tokens = np.concatenate([part.tokens for part in chosen])
    documents = len(tokens)
    if documents >= FEW_DOCUMENTS:
        return np.repeat(np.arange(documents) * min(documents, MOST_PARTS) // documents, tokens)
    total = int(tokens.sum())
    most = min(MOST_PARTS - documents, max(1, total // FEWEST_PART_TOKENS))
    blocks = np.maximum(1, tokens * most // max(1, total))  # of each document, together at most MOST_PARTS
    firsts = np.cumsum(blocks) - blocks
    inside = [first + np.arange(n) * count // n for first, count, n in zip(firsts, blocks, tokens, strict=True) if n]
    return np.concatenate([np.empty(0, dtype=np.int64), *inside])


def _text_bytes(
    text: HeldOutText, chosen: list[Beginnings], decode: Callable[[Sequence[int]], str] | None
) -> int | None:
    total = 0
    for (store, _), (documents, tokens) in zip(text.parts, chosen, strict=True):
        known = (
            np.full(len(documents), UNKNOWN_BYTES) if store.text_bytes is None else store.text_bytes[documents].copy()
        )
        known[tokens < store.document_lengths[documents]] = UNKNOWN_BYTES
        unknown = known == UNKNOWN_BYTES
        if unknown.any() and decode is None:
            return None
        total += int(known[~unknown].sum())
        for document, count in zip(documents[unknown].tolist(), tokens[unknown].tolist(), strict=True):
            total += len(decode(tokens_of(store, document, count)).encode())  # type: ignore[misc]  # not None, see above
    return total


def tokens_of(store: ScoredStore, document: int, most: int | None = None) -> list[int]:
    """The tokens of a document, the first `most` of them if that is given."""
    out = np.empty(int(store.document_lengths[document]), dtype=np.int64)[:most]
    store.read(document, 0, len(out), out)
    return out.tolist()
