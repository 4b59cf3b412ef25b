"""Megatron's order of one split. In: its datasets, their indices and their blend. Out: `sequence(i)`.

Weakness, Megatron's own: the order is made for a number of sequences, and another number may draw it anew (`fingerprint` tells).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steep.core.errors import ConfigError
from steep.order.data_order import DataOrder, OrderedSequence, OrderedSource
from steep.order.megatron_index import SPLIT_NAMES, Epochs, IndexSettings, SampleIndex, count_epochs

MEGATRON_ORDER_VERSION = 1  # raised whenever the same datasets and seed would give other sequences
SURPLUS = 0.005
"""This share is built beyond the samples that a dataset gives to a blend: Megatron's mid_level_dataset_surplus."""


@dataclass(frozen=True)
class MegatronSource:
    """One dataset in one split."""

    prefix: str
    documents: range
    lengths: NDArray[Any] = field(repr=False)
    """(documents of the whole store,) in tokens."""
    store_fingerprint: str
    num_samples: int | None
    """How many the order is made for; None for one epoch."""

    @property
    def num_tokens(self) -> int:
        """Tokens of one epoch."""
        return int(self.lengths[self.documents.start : self.documents.stop].sum(dtype=np.int64))


class MegatronOrder(DataOrder):
    """The order of one split. `sequence(i)` for i from 0 to `num_sequences - 1`.

    requested: sequences that were asked for; None for one epoch of every source. `OrderedSequence.source` is the dataset of a
    blend. Build it with `build_megatron_orders`.
    """

    def __init__(
        self,
        sources: list[MegatronSource],
        indices: list[SampleIndex],
        blend: tuple[NDArray[Any], NDArray[Any]] | None,
        *,
        split: int,
        weights: list[float] | None,
        requested: int | None,
        settings: IndexSettings,
    ):
        self.sources = [_ordered_source(source) for source in sources]
        self.sequence_length, self.seed = settings.sequence_length, settings.seed
        self._megatron_sources, self._indices, self._blend = sources, indices, blend
        self._split, self._weights, self._requested = split, weights, requested
        self._settings = settings
        tokens = [source.num_tokens for source in sources]
        self.sequences_of_source = [Epochs(1, False).num_samples(count, settings) for count in tokens]
        self.sequences_per_epoch = max(1, sum(self.sequences_of_source))
        self._epochs = [count_epochs(source.num_tokens, source.num_samples, settings) for source in sources]
        self.dropped_tokens = []
        for laid, count, index in zip(self._epochs, tokens, indices, strict=True):
            left = laid.count * count - index.num_samples * self.sequence_length - settings.extra
            self.dropped_tokens.append({"fills no sample": left} if left > 0 else {})
        self.num_sequences = indices[0].num_samples if blend is None else len(blend[0])
        """At least as many as were requested."""

    def sequence(self, index: int) -> OrderedSequence:
        """Sequence `index`. Raises IndexError from `num_sequences` on: the order was made for that many."""
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}: Megatron's order is made for a fixed number")
        source, sample = (0, index) if self._blend is None else (int(part[index]) for part in self._blend)
        ranges, following = self._indices[source].ranges(sample)
        return OrderedSequence(source, ranges, following)

    def counts(self, sequences: int) -> list[int]:
        if self._blend is None:
            return [sequences]
        return np.bincount(self._blend[0][:sequences], minlength=len(self.sources)).tolist()

    def check_length(self, total_sequences: int) -> None:
        if total_sequences > self.num_sequences:
            remedy = (
                "Datasets without weights give one epoch each: give weights, or train on fewer."
                if self._requested is not None
                else "It was made for one epoch: give train.steps or train.tokens, and weights if there are several datasets."
            )
            raise ConfigError(
                f"data.order: Megatron's order holds {self.num_sequences:,} sequences, and the run needs "
                f"{total_sequences:,}. {remedy}"
            )

    def beginning_at(self, first_sequence: int) -> MegatronOrder:
        """Raises ConfigError: Megatron's order has one beginning."""
        raise ConfigError(
            f"data.order: Megatron's order cannot restart at sequence {first_sequence:,}. Restore the data, or start "
            "another run."
        )

    def describe(self) -> dict[str, Any]:
        weights = self._weights
        if self._blend is not None and weights is None:
            weights = [float(index.num_samples) for index in self._indices]
        return {
            "version": MEGATRON_ORDER_VERSION,
            "order": "megatron",
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "split": SPLIT_NAMES[self._split],
            "add_extra_token": self._settings.add_extra_token,
            "drop_last_partial": self._settings.drop_last_partial,
            "weights": weights,
            "one_epoch": self._blend is not None and self._weights is None and self._requested is None,
            "sources": [
                {
                    "fingerprint": source.store_fingerprint,
                    "documents": [source.documents.start, source.documents.stop],
                    "tokens": source.num_tokens,
                    "epochs": epochs.count,
                    "last_epoch_apart": epochs.separate_last,
                }
                for source, epochs in zip(self._megatron_sources, self._epochs, strict=True)
            ],
        }


def _ordered_source(source: MegatronSource) -> OrderedSource:
    whole = source.documents == range(len(source.lengths))
    documents = None if whole else np.arange(source.documents.start, source.documents.stop)
    return OrderedSource(Path(source.prefix).name, documents, source.lengths, source.store_fingerprint)
