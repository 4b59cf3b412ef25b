"""The plan: sequence i of a run as a pure function of the sources, the seed and i.

In: for every source its document lengths and fingerprint. Out: `sequence(i)`, the token ranges of sequence i, for any i
from 0 on, whatever the world size, batch size, number of workers or restarts. Epoch e holds every sequence of every source
once: each source's documents are permuted by (seed, source, epoch) and packed, then all sequences of the epoch are
permuted by (seed, epoch). So a longer run never changes the past, and nothing but i need be remembered.
Weakness: memory of 16 bytes per document for each source and epoch in use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steep.core.errors import DataError
from steep.core.fingerprint import fingerprint
from steep.order.packing import ConcatPacking, TokenRange, num_concat_sequences
from steep.order.permutation import Permutation

ORDER_VERSION = 1  # raised whenever the same plan would give other sequences


@dataclass(frozen=True)
class SourcePlan:
    """What the order needs to know of one source.

    documents: (num_documents,) int64, the documents of the store that are trained on (the rest is held out).
    document_lengths: (documents of the whole store,) int64, in tokens.
    store_fingerprint: of the store's content.
    """

    name: str
    documents: NDArray[np.int64]
    document_lengths: NDArray[np.int64] = field(repr=False)
    store_fingerprint: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens that are trained on in one epoch."""
        return int(self.document_lengths[self.documents].sum())


@dataclass(frozen=True)
class PlannedSequence:
    """One sequence: the source it comes from and the ranges of that source's documents, in order."""

    source: int
    ranges: list[TokenRange]

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence; less than the sequence length only at the end of a source's epoch."""
        return sum(token_range.count for token_range in self.ranges)


class DataPlan:
    """The order of a run over its sources. Raises DataError if there is nothing to train on."""

    def __init__(self, sources: list[SourcePlan], sequence_length: int, seed: int):
        self.sources = sources
        self.sequence_length = sequence_length
        self.seed = seed
        counts = [num_concat_sequences(source.num_tokens, sequence_length) for source in sources]
        self.sequences_of_source = counts
        self._first_sequence = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.sequences_per_epoch = int(self._first_sequence[-1])
        self.tokens_per_epoch = sum(source.num_tokens for source in sources)
        if self.sequences_per_epoch == 0:
            names = ", ".join(source.name for source in sources)
            raise DataError(f"there is nothing to train on: no tokens in {names}")
        # Two epochs of every source: a step can hold the end of one epoch and the start of the next.
        self._packing = lru_cache(maxsize=2 * len(sources))(self._pack)
        self._sequence_order = lru_cache(maxsize=2)(self._order_of_epoch)

    def _pack(self, source: int, epoch: int) -> ConcatPacking:
        plan = self.sources[source]
        order = Permutation(len(plan.documents), self.seed, "documents", source, epoch)
        documents = plan.documents[order(np.arange(len(plan.documents)))]
        return ConcatPacking(documents, plan.document_lengths[documents], self.sequence_length)

    def _order_of_epoch(self, epoch: int) -> Permutation:
        return Permutation(self.sequences_per_epoch, self.seed, "sequences", epoch)

    def sequence(self, index: int) -> PlannedSequence:
        """Sequence `index` of the run, from 0 on without end."""
        epoch, place = divmod(index, self.sequences_per_epoch)
        number = int(self._sequence_order(epoch)(place))
        source = int(np.searchsorted(self._first_sequence, number, side="right")) - 1
        packing = self._packing(source, epoch)
        return PlannedSequence(source, packing.sequence(number - int(self._first_sequence[source])))

    @property
    def fingerprint(self) -> str:
        """Equal for plans that give the same sequences; does not depend on how long the run is."""
        return fingerprint(self.describe())

    def describe(self) -> dict[str, Any]:
        """The plan as JSON: what the order depends on and nothing else."""
        return {
            "version": ORDER_VERSION,
            "order": "native",
            "packing": "concat",
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "sources": [
                {
                    "fingerprint": source.store_fingerprint,
                    "documents": len(source.documents),
                    "tokens": source.num_tokens,
                    "sequences": count,
                }
                for source, count in zip(self.sources, self.sequences_of_source, strict=True)
            ],
        }


def held_out(content_hashes: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Which documents are held out: those whose content hash falls in the first `share` of all hashes.

    content_hashes: (num_documents,) uint64. A document's side depends on its content alone, so copies of it go the same way and
    adding, reordering or resharding data moves none. Weakness: the share is met on average, not exactly.
    """
    return content_hashes < np.uint64(min(int(share * 2**64), 2**64 - 1))
