"""Megatron's data order: sequence i of a run is sample i of what megatron-core 0.19.2 would build from the same files.

In: prefixes and weights, a split, a seed, how many sequences the run takes. Out: a plan for training, one for validation, and
the stores that both read from. `GPTDataset` and `BlendedDataset` are reproduced sample for sample.
Weakness, Megatron's own: how long the run is enters the order. A run made longer may have had another past; `redraw_warning`
says so. Use the native order unless a Megatron run is to be continued or compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    normalize,
    parse_split,
    split_matrix,
    split_range,
)
from steep.order.megatron_order import SURPLUS, MegatronOrder, MegatronSource
from steep.order.megatron_paths import Blend, read_blend


class SequenceStore(Protocol):
    """What the order needs of a token store that was opened with every Megatron sequence as a document."""

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
    """The samples that Megatron would validate on, in its order; None where none were asked for."""
    stores: list[Store]
    """Of the sources of `train`, in the same order."""
    valid_stores: list[Store]
    """Of the sources of `valid`; where one blend is split, the same objects as `stores`."""
    held_out: list[tuple[Store, NDArray[np.int64]]]
    """The documents of the validation split: for scoring them as a held-out text."""


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
    """The order of a run as Megatron would lay it out, for training and validation.

    paths_and_weights: what `read_blend` takes: a prefix, a glob, `[w1, p1, w2, p2]`, a list of prefixes, a .json file, a
        `Blend`, or a mapping of splits to these; then `split` must be None.
    split: shares of train, validation and test, `"99,1,0"`.
    train_samples: sequences that the whole run takes (steps times global batch size); None for one epoch of every dataset.
    valid_samples: sequences of the validation plan; 0 for no such plan, None for one epoch. `held_out` is given either way.
    open_sequences: opens a token store with every Megatron sequence as a document: `partial(open_store, unit="sequences")`.
    cache_directory: for Megatron's index files; None builds the indices in memory.
    tokenizer_identifiers: `unique_identifiers` of Megatron's tokenizer; they enter the names of the cache files and nothing else.
        A string, NeMo Automodel's name of the tokenizer, gives way to what indices in `cache_directory` call it.
    Raises ConfigError and DataError.
    """
    blends = read_blend(paths_and_weights)
    cache = IndexCache(Path(cache_directory) if cache_directory else None, say)
    opened: dict[str, Store] = {}

    def stores_of(blend: Blend) -> list[Store]:
        for prefix in blend.prefixes:
            if prefix not in opened:
                opened[prefix] = open_sequences(_existing(prefix))
        return [opened[prefix] for prefix in blend.prefixes]

    if isinstance(blends, Blend):
        if split is None:
            raise ConfigError("data.split: Megatron's order needs one, for example '99,1,0' or '100,0,0'.")
        matrix = split_matrix(parse_split(split))
        per_split: list[Blend | None] = [blends if bounds else None for bounds in matrix]
        identity = Identity(seed, sequence_length, split, matrix, tokenizer_identifiers)
    else:
        if split is not None:
            raise ConfigError(
                "data.split: every split has datasets of its own, so there is nothing to split; leave it out."
            )
        matrix = [(0.0, 1.0) if blend else None for blend in blends]
        per_split = blends
        identity = Identity(seed, sequence_length, None, None, tokenizer_identifiers)

    if cache.directory is not None and isinstance(tokenizer_identifiers, str):
        every = [prefix for blend in per_split if blend is not None for prefix in blend.prefixes]
        identity = replace(
            identity, tokenizer=tokenizer_of_cache(cache.directory, every, identity) or tokenizer_identifiers
        )

    def plan_of(number: int, requested: int | None) -> MegatronOrder | None:
        blend, bounds = per_split[number], matrix[number]
        if blend is None or bounds is None:
            return None
        keep_partial = number == VALID and not drop_last_partial_validation
        settings = IndexSettings(sequence_length, seed, add_extra_token, not keep_partial)
        if identity.split is None and len(blend.prefixes) == 1:
            blend = Blend(blend.prefixes)  # Megatron leaves out the weight of a split's only dataset
        return _plan(blend, stores_of(blend), bounds, number, requested, settings, identity, cache, surplus)

    train = plan_of(TRAIN, train_samples)
    if train is None:
        raise ConfigError(f"data.split: {split!r} leaves nothing to train on; the first share is that of training.")
    if train_samples is not None and train.num_sequences < train_samples:
        say(
            f"datasets without weights give one epoch each: {train.num_sequences:,} of the {train_samples:,} sequences "
            "asked for. Megatron would end there; give weights to train longer"
        )
    valid_blend, valid_bounds = per_split[VALID], matrix[VALID]
    if valid_samples and (valid_blend is None or valid_bounds is None):
        raise ConfigError(
            f"data.num_val_samples: {valid_samples:,} of a validation split that is empty; see data.split."
        )
    valid_stores = stores_of(valid_blend) if valid_blend else []
    held_out = [
        (store, np.arange(len(store.document_lengths))[_slice(split_range(valid_bounds, len(store.document_lengths)))])
        for store in valid_stores
        if valid_bounds is not None
    ]
    return MegatronData(
        train=train,
        valid=None if valid_samples == 0 else plan_of(VALID, valid_samples),
        stores=stores_of(per_split[TRAIN] or Blend([])),
        valid_stores=valid_stores,
        held_out=[(store, documents) for store, documents in held_out if len(documents)],
    )


def _plan(
    blend: Blend,
    stores: Sequence[SequenceStore],
    bounds: tuple[float, float],
    split: int,
    requested: int | None,
    settings: IndexSettings,
    identity: Identity,
    cache: IndexCache,
    surplus: float,
) -> MegatronOrder:
    """The order of one split of one blend."""
    if len(blend.prefixes) > MOST_DATASETS:
        raise ConfigError(
            f"data.train: {len(blend.prefixes):,} datasets; Megatron's order holds at most {MOST_DATASETS:,}."
        )
    if blend.weights is not None and requested is None:
        raise ConfigError(
            "data.train: datasets with weights need to know how many sequences are taken: give train.steps or train.tokens, and "
            "data.num_val_samples for validation."
        )
    alone = len(blend.prefixes) == 1 and blend.weights is None
    weights = normalize(blend.weights) if blend.weights is not None else None
    wanted: list[int | None] = [requested if alone else None] * len(blend.prefixes)
    if weights is not None and requested is not None:
        wanted = list(samples_per_dataset(weights, requested, surplus))
    sources, indices, descriptions = [], [], []
    for prefix, store, samples in zip(blend.prefixes, stores, wanted, strict=True):
        documents = split_range(bounds, len(store.document_lengths))
        source = MegatronSource(prefix, documents, store.document_lengths, store.fingerprint, samples)
        if not source.num_tokens:
            raise DataError(
                f"{prefix}: its {SPLIT_NAMES[split]} split has no tokens ({len(documents):,} of "
                f"{len(store.document_lengths):,} documents). Give it a larger share in data.split, or leave the dataset out."
            )
        description = identity.of_dataset(prefix, samples, split)
        sources.append(source)
        descriptions.append(description)
        indices.append(cache.index(description, source.lengths, documents, samples, settings))
    order = None if alone else _blend(weights, requested, sources, indices, descriptions, split, cache, surplus)
    return MegatronOrder(
        sources,
        indices,
        order,
        split=split,
        weights=weights,
        requested=requested,
        settings=settings,
    )


def _blend(
    weights: list[float] | None,
    requested: int | None,
    sources: list[MegatronSource],
    indices: list[SampleIndex],
    descriptions: list[dict[str, Any]],
    split: int,
    cache: IndexCache,
    surplus: float,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Dataset and sample of every place."""
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
        size = min(requested, sum(held))
        shares = normalize(held)
    else:
        size = None
        shares = list(held)
    order = cache.blend(blend_description(descriptions, split, shares, size), shares, size)
    taken = np.bincount(order[0], minlength=len(held)).tolist()
    for source, count, most in zip(sources, taken, held, strict=True):
        if count > most:
            raise DataError(
                f"{source.prefix}: the blend takes {count:,} of its {most:,} samples. Give a larger surplus than {surplus}."
            )
    return order


def _existing(prefix: str) -> str:
    """The .idx of a prefix if there is one: Megatron's default cache is a folder that is named like the prefix itself."""
    return f"{prefix}.idx" if Path(f"{prefix}.idx").is_file() else prefix


def _slice(documents: range) -> slice:
    return slice(documents.start, documents.stop)
