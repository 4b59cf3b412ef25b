"""The data section made real. In: configuration and tokenizer. Out: stores, plan, held-out texts, ledger."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steep.core.errors import DataError
from steep.evaluate.held_out import HeldOutText
from steep.order.config import DataConfig
from steep.order.plan import DataPlan, Plan, SourcePlan, held_out
from steep.sources.config import SourceConfig
from steep.sources.inputs import paths_of
from steep.sources.lingua import validation_paths
from steep.store.cache import open_sources
from steep.store.reader import TokenStore
from steep.tokenizer.encode import TextTokenizer
from steep.train.state import TrainState

MOST_NAMED_FILES = 1000
"""More files than this are not listed in a checkpoint; a change of one is then found but not named."""


@dataclass(frozen=True)
class RunData:
    """What a run trains on and what it holds out."""

    names: list[str]
    """Of the training sources."""
    stores: list[TokenStore]
    """Of the training sources, in the same order."""
    plan: Plan
    held_out_texts: list[HeldOutText]
    held_out_stores: list[TokenStore]
    """Stores that are only scored."""

    @property
    def largest_token_id(self) -> int:
        """Over all stores, the held-out ones included."""
        return max(store.max_token_id for store in [*self.stores, *self.held_out_stores])

    @property
    def messages(self) -> list[str]:
        """What was assumed of the stores, and what the plan has to say: lines to print."""
        of_stores = [message for store in [*self.stores, *self.held_out_stores] for message in store.messages]
        return list(dict.fromkeys([*of_stores, *self.plan.messages]))

    def ledger(self, state: TrainState) -> dict[str, Any]:
        """What became of every record and token of each source up to `state`, as JSON."""
        trained = state.tokens_by_source or [0] * len(self.stores)
        sources = [
            source_ledger(name, store, plan, count)
            for name, store, plan, count in zip(self.names, self.stores, self.plan.sources, trained, strict=True)
        ]
        return {"sources": sources, "padding_tokens": state.padding_tokens, "data_changes": state.data_changes}

    def files(self) -> list[dict[str, str]]:
        """The files of each source with a short checksum, so that a change can be named; empty where there are very many."""
        found = [_files(store) for store in self.stores]
        return found if sum(map(len, found)) <= MOST_NAMED_FILES else [{} for _ in found]


def source_ledger(name: str, store: TokenStore, plan: SourcePlan, tokens_trained: int) -> dict[str, Any]:
    """One source: records read = kept + dropped by reason; tokens = held out + available to training."""
    recorded = store.manifest.get("ledger", {})
    return {
        "name": name,
        "role": plan.role,
        "records_read": recorded.get("records_read"),
        "documents_kept": store.num_documents,
        "dropped": recorded.get("dropped", {}),
        "tokens": store.num_tokens,
        "tokens_held_out": store.num_tokens - plan.num_tokens,
        "tokens_per_epoch": plan.num_tokens,
        "tokens_trained": tokens_trained,
        "epochs": tokens_trained / plan.num_tokens if plan.num_tokens else 0.0,
    }


def open_run_data(
    config: DataConfig, tokenizer: TextTokenizer, seed: int, progress: Callable[[int, int, int], None] | None = None
) -> RunData:
    """Open or prepare every source and lay out the order. Raises DataError."""

    def stores_of(sources: Sequence[SourceConfig]) -> list[TokenStore]:
        return open_sources(sources, tokenizer, config.prepare, config.cache_directory, progress)

    stores = stores_of(config.train)
    share = next((validation.share for validation in config.validation.values() if validation.share), None)
    kept = [_split(store, share) for store in stores]
    names = source_names(config.train)
    sources = [
        SourcePlan(
            name, training, store.document_lengths, store.fingerprint, source.weight, source.role, source.max_epochs
        )
        for name, source, store, (training, _) in zip(names, config.train, stores, kept, strict=True)
    ]
    plan = DataPlan(
        sources,
        config.sequence_length,
        seed,
        packing=config.packing,
        phases=[(math.ceil(phase.from_tokens / config.sequence_length), phase.weights) for phase in config.phases],
        align_to_bos=config.align_to_bos,
    )
    shared = list(zip(stores, (out for _, out in kept), strict=True))
    own = {
        name: stores_of(
            [
                SourceConfig(
                    **validation.model_dump(exclude={"share", "path"}), path=validation_paths(paths_of(validation))
                )
            ]
        )
        for name, validation in config.validation.items()
        if validation.path is not None
    }
    texts = [
        _whole_text(name, own[name]) if name in own else _shared_text(name, validation.share, shared)
        for name, validation in config.validation.items()
    ]
    return RunData(names, stores, plan, texts, [store for held in own.values() for store in held])


def _split(store: TokenStore, share: float | None) -> tuple[np.ndarray | None, np.ndarray]:
    """Document numbers to train on (None: all) and to hold out."""
    if share is None:
        return None, np.arange(0)
    out = held_out(store.content_hashes, share)
    return np.flatnonzero(~out), np.flatnonzero(out)


def _whole_text(name: str, stores: list[TokenStore]) -> HeldOutText:
    return HeldOutText(name, [(store, np.arange(store.num_documents)) for store in stores])


def _shared_text(name: str, share: float | None, parts: list[tuple[TokenStore, np.ndarray]]) -> HeldOutText:
    text = HeldOutText(name, [(store, out) for store, out in parts if len(out)])
    if not text.num_tokens:
        documents = sum(store.num_documents for store, _ in parts)
        raise DataError(
            f"data.validation.{name}: a share of {share} of {documents} documents holds out none. "
            "Give a larger share, or a path with held-out documents."
        )
    return text


def _files(store: TokenStore) -> dict[str, str]:
    entries = store.manifest.get("sources", [])
    if entries:
        return {entry["path"]: entry["sha256"][:12] for entry in entries}
    return {str(shard.prefix): f"{shard.num_documents} documents" for shard in store.shards}


def source_names(sources: Sequence[SourceConfig]) -> list[str]:
    """A name for each source: its own, else the last part of its path; made different by numbers where equal."""
    names: list[str] = []
    for source in sources:
        path = source.path if isinstance(source.path, str) else source.path[0]
        name = source.name or Path(path).name or path
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names
