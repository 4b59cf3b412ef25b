"""A batch whose documents stand in rows of their own, for models that cannot keep packed documents apart.

In: a batch of packed documents. Out: a few batches of padded rows, and where each of their tokens stood. Padding comes after a
document, where nothing causal looks. Documents of similar length share a batch; their lengths are rounded up to two per doubling,
which costs a fifth of the work on average, a half at most. Weakness: on a GPU reading the lengths waits for the device.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from steep.batch import IGNORE_INDEX, Batch

SHORTEST_ROW = 16


@dataclass(frozen=True)
class DocumentRows:
    """Documents of similar length, one per row."""

    batch: Batch
    """(R, S): the rows, without labels."""
    kept_K: Tensor
    """(K,) int64: the tokens that are not padding, as indices into the R * S flattened ones."""
    positions_K: Tensor
    """(K,) int64: where the same tokens stand among the N flattened tokens of the packed batch."""


def document_rows(batch: Batch) -> list[DocumentRows]:
    """The documents of `batch` by length, shortest first. Each of its tokens is kept exactly once."""
    longest = batch.input_ids.shape[1]
    bounds = batch.cu_seqlens.tolist()
    documents = [(start, stop - start) for start, stop in itertools.pairwise(bounds) if stop > start]
    documents.sort(key=lambda document: _row_length(document[1], longest))
    groups = itertools.groupby(documents, key=lambda document: _row_length(document[1], longest))
    return [_rows(batch, list(group), length) for length, group in groups]


def in_batch_order(outputs: list[Tensor], rows: list[DocumentRows]) -> Tensor:
    """(N, ...): what each token of the packed batch got. outputs: (R * S, ...) of each of `rows`."""
    kept = torch.cat([output[part.kept_K] for output, part in zip(outputs, rows, strict=True)])
    return kept[torch.cat([part.positions_K for part in rows]).argsort()]


def _row_length(tokens: int, longest: int) -> int:
    """16, 24, 32, 48, 64, 96, ...; no more than a sequence of the batch."""
    length = SHORTEST_ROW
    while length < tokens:
        length = length * 3 // 2 if length & (length - 1) == 0 else length * 4 // 3
    return min(length, longest)


def _rows(batch: Batch, documents: list[tuple[int, int]], length: int) -> DocumentRows:
    device = batch.input_ids.device
    starts_R1 = torch.tensor([start for start, _ in documents]).view(-1, 1)
    lengths_R1 = torch.tensor([tokens for _, tokens in documents]).view(-1, 1)
    offsets_1S = torch.arange(length).view(1, -1)
    is_kept_RS = offsets_1S < lengths_R1
    positions_RS = torch.where(is_kept_RS, starts_R1 + offsets_1S, starts_R1)  # padding repeats the first token
    positions_RS, is_kept_RS = positions_RS.to(device), is_kept_RS.to(device)
    rows = len(documents)
    return DocumentRows(
        Batch(
            input_ids=batch.input_ids.reshape(-1)[positions_RS],
            labels=torch.full((rows, length), IGNORE_INDEX, device=device),
            position_ids=offsets_1S.expand(rows, -1).to(device),
            cu_seqlens=torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device),
            max_seqlen=length,
            source_ids=torch.zeros(rows, dtype=torch.int32),
        ),
        kept_K=is_kept_RS.flatten().nonzero().flatten(),
        positions_K=positions_RS[is_kept_RS],
    )
