"""Megatron's data order: sequence i of a run is sample i of what megatron-core 0.19.2 would build from the same files.

In: prefixes and weights, a split, a seed, how many sequences the run takes. Out: the orders of training and validation, and the
stores that both read from. `GPTDataset` and `BlendedDataset` are reproduced sample for sample.
Weakness, Megatron's own: the order depends on the length of the run, so a longer run may draw another past. Use the native order
unless you continue a Megatron run or compare with one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from steep.core.errors import ConfigError, DataError
from steep.core.say import Say, say_nothing
from steep.order.megatron_blend import MOST_DATASETS, samples_per_dataset
from steep.order.megatron_cache import Identity, IndexCache, blend_description, tokenizer_of_cache
from steep.order.megatron_index import (
    SPLIT_NAMES,
    TRAIN,
    VALID,
    IndexSettings,
    SampleIndex,
    SplitMatrix,
    normalize,
    parse_split,
    split_matrix,
    split_range,
)
from steep.order.megatron_order import SURPLUS, MegatronOrder, MegatronSource
from steep.order.megatron_paths import Blend, read_blend


class SequenceStore(Protocol):
    """What the order needs of a token store that was opened with each Megatron sequence as a document."""

    document_lengths: NDArray[Any]

    @property
    def fingerprint(self) -> str:
        """Of the content."""


Store = TypeVar("Store", bound=SequenceStore)


@dataclass(frozen=True)
class MegatronData(Generic[Store]):
    """What `build_megatron_orders` gives."""

    train: MegatronOrder
    valid: MegatronOrder | None
    """The samples that Megatron would validate on, in its order; None if none were asked for."""
    stores: list[Store]
    """Of the sources of `train`, in the same order."""
    valid_stores: list[Store]
    """Of the sources of `valid`; where one blend is split, the same objects as `stores`."""
    held_out: list[tuple[Store, NDArray[np.int64]]]
    """The documents of the validation split, to be scored as a held-out text."""


def build_megatron_orders(
    paths_and_weights: Any,
    split: str | None,
    sequence_length: int,
    seed: int,
    train_samples: int | None,
    valid_samples: int | None,
    open_sequences: Callable[[str], Store],
    *,
    cache_directory: str | Path | None = None,
    tokenizer_identifiers: Mapping[str, Any] | str = "",
    add_extra_token: bool = True,
    drop_last_partial_validation: bool = True,
    surplus: float = SURPLUS,
    say: Say = say_nothing,
) -> MegatronData[Store]:
    """The order of a run as Megatron would make it, for training and validation.

    paths_and_weights: what `read_blend` takes: a prefix, a glob, `[w1, p1, w2, p2]`, a list of prefixes, a .json file, a
        `Blend`, or a mapping of splits to these; then `split` must be None.
    split: shares of train, validation and test, `"99,1,0"`.
    train_samples: sequences that the whole run takes (steps times global batch size); None for one epoch of every dataset.
    valid_samples: sequences of the validation order; 0 for none, None for one epoch. `held_out` is given either way.
    open_sequences: opens a token store with each Megatron sequence as a document: `partial(open_store, unit="sequences")`.
    cache_directory: for Megatron's index files; None builds the indices in memory.
    tokenizer_identifiers: `unique_identifiers` of Megatron's tokenizer; they enter the names of the cache files and nothing else.
        A string, NeMo Automodel's name of the tokenizer, gives way to what indices in `cache_directory` call it.
    say: told of cache files that are built anew, and of a training split that is shorter than the run.
    Raises ConfigError and DataError.
    """
    cache = IndexCache(Path(cache_directory) if cache_directory else None, say)
    blends, matrix, identity = _read_splits(paths_and_weights, split, sequence_length, seed, tokenizer_identifiers)
    if cache.directory is not None and isinstance(tokenizer_identifiers, str):
        every = [prefix for blend in blends if blend is not None for prefix in blend.prefixes]
        known = tokenizer_of_cache(cache.directory, every, identity)
        identity = replace(identity, tokenizer=known or tokenizer_identifiers)
    builder = _Builder(blends, matrix, identity, cache, surplus, open_sequences)

    train = builder.order(TRAIN, train_samples, IndexSettings(sequence_length, seed, add_extra_token))
    if train is None:
        raise ConfigError(f"data.split: {split!r} leaves nothing to train on; the first share is that of training.")
    if train_samples is not None and train.num_sequences < train_samples:
        say(
            f"datasets without weights give one epoch each: {train.num_sequences:,} of the {train_samples:,} sequences "
            "asked for. Megatron would end there; give weights to train longer"
        )
    if valid_samples and (blends[VALID] is None or matrix[VALID] is None):
        raise ConfigError(
            f"data.num_val_samples: {valid_samples:,} of a validation split that is empty; see data.split."
        )
    held_out = [(store, builder.documents(VALID, store)) for store in builder.stores(VALID)]
    of_valid = IndexSettings(sequence_length, seed, add_extra_token, drop_last_partial_validation)
    return MegatronData(
        train=train,
        valid=None if valid_samples == 0 else builder.order(VALID, valid_samples, of_valid),
        stores=builder.stores(TRAIN),
        valid_stores=builder.stores(VALID),
        held_out=[(store, np.arange(documents.start, documents.stop)) for store, documents in held_out if documents],
    )


def _read_splits(
    given: Any, split: str | None, sequence_length: int, seed: int, tokenizer: Mapping[str, Any] | str
) -> tuple[list[Blend | None], SplitMatrix, Identity]:
    """For each split its datasets and the part of their documents, and what names the cache files. Raises ConfigError."""
    blends = read_blend(given)
    if isinstance(blends, Blend):
        if split is None:
            raise ConfigError("data.split: Megatron's order needs one, for example '99,1,0' or '100,0,0'.")
        matrix = split_matrix(parse_split(split))
        parts = [blends if part else None for part in matrix]
        return parts, matrix, Identity(seed, sequence_length, split, matrix, tokenizer)
    if split is not None:
        raise ConfigError(
            "data.split: every split has datasets of its own, so there is nothing to split; leave it out."
        )
    whole: SplitMatrix = [(0.0, 1.0) if blend else None for blend in blends]
    return blends, whole, Identity(seed, sequence_length, None, None, tokenizer)


@dataclass(frozen=True)
class _Builder(Generic[Store]):
    """Builds the order of each split. Every dataset is opened once."""

    blends: list[Blend | None]
    """Of each split."""
    matrix: SplitMatrix
    identity: Identity
    cache: IndexCache
    surplus: float
    open_sequences: Callable[[str], Store]
    opened: dict[str, Store] = field(default_factory=dict)

    def stores(self, split: int) -> list[Store]:
        """The datasets of a split."""
        blend = self.blends[split] or Blend([])
        for prefix in blend.prefixes:
            if prefix not in self.opened:
                index = f"{prefix}.idx"  # where it is: Megatron's default cache is a folder with the name of the prefix itself
                self.opened[prefix] = self.open_sequences(index if Path(index).is_file() else prefix)
        return [self.opened[prefix] for prefix in blend.prefixes]

    def documents(self, split: int, store: Store) -> range:
        """The documents of a dataset that are in a split."""
        fractions = self.matrix[split]
        return range(0) if fractions is None else split_range(fractions, len(store.document_lengths))

    def order(self, split: int, requested: int | None, settings: IndexSettings) -> MegatronOrder | None:
        """The order of a split for `requested` sequences; None for a split that is empty. Raises ConfigError, DataError."""
        blend = self.blends[split]
        if blend is None or self.matrix[split] is None:
            return None
        if self.identity.split is None and len(blend.prefixes) == 1:
            blend = Blend(blend.prefixes)  # Megatron leaves out the weight of a split's only dataset
        wanted, weights = _samples_of_datasets(blend, requested, self.surplus)
        sources, indices, descriptions = [], [], []
        for prefix, store, samples in zip(blend.prefixes, self.stores(split), wanted, strict=True):
            documents = self.documents(split, store)
            source = MegatronSource(prefix, documents, store.document_lengths, store.fingerprint, samples)
            if not source.num_tokens:
                raise DataError(
                    f"{prefix}: its {SPLIT_NAMES[split]} split has no tokens ({len(documents):,} of "
                    f"{len(store.document_lengths):,} documents). Give it a larger share in data.split, or leave the dataset out."
                )
            description = self.identity.of_dataset(prefix, samples, split)
            sources.append(source)
            descriptions.append(description)
            indices.append(self.cache.index(description, source.lengths, documents, samples, settings))
        alone = len(blend.prefixes) == 1 and weights is None
        return MegatronOrder(
            sources,
            indices,
            None if alone else self._blend(split, weights, requested, sources, indices, descriptions),
            split=split,
            weights=weights,
            requested=requested,
            settings=settings,
        )

    def _blend(
        self,
        split: int,
        weights: list[float] | None,
        requested: int | None,
        sources: list[MegatronSource],
        indices: list[SampleIndex],
        descriptions: list[dict[str, Any]],
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Dataset and sample of every sequence."""
        held = [index.num_samples for index in indices]
        if not all(held):
            empty = sources[held.index(0)].prefix
            raise DataError(
                f"{empty}: its {SPLIT_NAMES[split]} split is shorter than one sequence, which Megatron's blends do not take. "
                "Give it a larger share in data.split, a shorter data.sequence_length, or leave the dataset out."
            )
        if weights is not None and requested is not None:
            size: int | None = sum(samples_per_dataset(weights, requested))
            shares: list[float] = normalize(weights)  # Megatron normalizes twice, and the last bits can differ
        elif requested is not None:
            size, shares = min(requested, sum(held)), normalize(held)
        else:
            size, shares = None, list(held)
        blend = self.cache.blend(blend_description(descriptions, split, shares, size), shares, size)
        taken = np.bincount(blend[0], minlength=len(held)).tolist()
        for source, count, most in zip(sources, taken, held, strict=True):
            if count > most:
                raise DataError(
                    f"{source.prefix}: the blend takes {count:,} of its {most:,} samples. Give a larger surplus than "
                    f"{self.surplus}."
                )
        return blend


def _samples_of_datasets(
    blend: Blend, requested: int | None, surplus: float
) -> tuple[list[int | None], list[float] | None]:
    """The samples that each dataset is built for (None: one epoch), and the normalized weights. Raises ConfigError."""
    if len(blend.prefixes) > MOST_DATASETS:
        raise ConfigError(
            f"data.train: {len(blend.prefixes):,} datasets; Megatron's order holds at most {MOST_DATASETS:,}."
        )
    if blend.weights is None:
        return [requested if len(blend.prefixes) == 1 else None] * len(blend.prefixes), None
    if requested is None:
        raise ConfigError(
            "data.train: datasets with weights need to know how many sequences are taken: give train.steps or train.tokens, and "
            "data.num_val_samples for validation."
        )
    weights = normalize(blend.weights)
    return list(samples_per_dataset(weights, requested, surplus)), weights
