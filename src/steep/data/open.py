"""The data section made real. In: configuration and tokenizer. Out: stores, plan, held-out texts, ledger."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from steep.config.run import RunConfig
from steep.core.errors import ConfigError, DataError
from steep.data.self_generated import UnwrittenText, count_self_generated, is_self_generated, with_self_generated
from steep.evaluation.held_out import HeldOutText
from steep.order.batches import requested_sequences
from steep.order.config import DataConfig, TrainSourceConfig, ValidationConfig
from steep.order.data_order import DataOrder, NativeOrder, OrderedSource, held_out
from steep.order.megatron import build_megatron_orders
from steep.sources.config import SourceConfig
from steep.sources.inputs import paths_of
from steep.sources.lingua import validation_paths
from steep.store.cache import check_tokenizer, open_sources
from steep.store.reader import TokenStore, open_store
from steep.store.stream import READERS, StreamSource
from steep.store.work import source_name
from steep.tokenizer.encode import TextTokenizer
from steep.training.state import TrainState

Progress = Callable[[int, int, int], None]
"""Called with bytes done, bytes in all and tokens written, while text is prepared."""

STEPS_IN_FLIGHT = 6
"""Steps whose streamed sequences are kept: the one in training and those the loader may have read ahead, and some."""

MOST_NAMED_FILES = 1000
"""More files than this are not listed in a checkpoint; a change of one is then found but not named."""


@dataclass(frozen=True)
class RunData:
    """What a run trains on and what it holds out."""

    names: list[str]
    """Of the training sources."""
    stores: list[TokenStore | StreamSource]
    """Of the training sources, in the same order."""
    order: DataOrder
    held_out_texts: list[HeldOutText]
    held_out_stores: list[TokenStore]
    """Stores that are only scored."""
    self_generated: list[str] = field(default_factory=list)
    """What is to be said of the text that the base model wrote."""

    @property
    def largest_token_id(self) -> int:
        """Over all stores, the held-out ones included."""
        return max(store.max_token_id for store in [*self.stores, *self.held_out_stores])

    def new_text_tokens(self, run_tokens: int) -> int:
        """Different tokens of text that is not replay in a run of so many tokens; of streams as many as the run takes."""
        sources = [source for source in self.order.sources if source.role != "replay"]
        streamed = any(source.order is not None for source in sources)
        return run_tokens if streamed else min(run_tokens, sum(source.num_tokens for source in sources))

    @property
    def messages(self) -> list[str]:
        """What was assumed of the stores, and what the plan has to say: lines to print."""
        of_stores = [message for store in [*self.stores, *self.held_out_stores] for message in store.messages]
        return list(dict.fromkeys([*self.self_generated, *of_stores, *self.order.messages]))

    def ledger(self, state: TrainState) -> dict[str, Any]:
        """What became of every record and token of each source up to `state`, as JSON."""
        trained = state.tokens_by_source or [0] * len(self.stores)
        sequences = self.order.counts(state.sequences_seen)
        sources = [
            source_ledger(*row)
            for row in zip(
                self.names, self.stores, self.order.sources, trained, sequences, self.order.dropped_tokens, strict=True
            )
        ]
        for source in sources:
            source["tokens_skipped"] = state.skipped_tokens.get(source["name"], 0)
        return {
            "sources": sources,
            "padding_tokens": state.padding_tokens,
            "data_changes": state.data_changes,
            "spikes": state.spikes,
        }

    def check_vocabulary(self, vocab_size: int | None) -> None:
        """Every id must have an embedding, if it is known how many there are. Raises ConfigError."""
        if vocab_size is not None and self.largest_token_id >= vocab_size:
            raise ConfigError(
                f"the data holds token id {self.largest_token_id}, but the model has {vocab_size} embeddings. The tokenizer is "
                "not this model's: use the model's own, or build the model with a vocab_size of at least "
                f"{self.largest_token_id + 1}."
            )

    def stream_cursors(self, sequences_seen: int) -> list[list[dict[str, Any]]]:
        """Where the readers of every source stand after so many sequences of the run; empty for sources that do not stream."""
        pairs = zip(self.stores, self.order.counts(sequences_seen), strict=True)
        return [store.cursors(count) if isinstance(store, StreamSource) else [] for store, count in pairs]

    def begin_streams(self, cursors: Sequence[list[dict[str, Any]]], counts: Sequence[int]) -> None:
        """Let streams continue where `stream_cursors` stood; those without cursors begin at their start."""
        for store, found, count in zip(self.stores, cursors, counts, strict=False):
            if isinstance(store, StreamSource) and found:
                store.begin_at(found, count)

    def files(self) -> list[dict[str, str]]:
        """The files of each source with a short checksum, so that a change can be named; empty where there are very many."""
        found = [_files(store) for store in self.stores]
        return found if sum(map(len, found)) <= MOST_NAMED_FILES else [{} for _ in found]


def source_ledger(
    name: str,
    store: TokenStore | StreamSource,
    plan: OrderedSource,
    tokens_trained: int,
    sequences: int,
    dropped_tokens: dict[str, int],
) -> dict[str, Any]:
    """One source: records read = kept + dropped by reason; tokens = held out + available to training.

    sequences: of this source that were trained on. dropped_tokens: that the order never takes, by reason.
    """
    if isinstance(store, StreamSource):
        return {"name": name, "role": plan.role, **store.ledger(sequences), "tokens_trained": tokens_trained}
    recorded = store.manifest.get("ledger", {})
    return {
        "name": name,
        "role": plan.role,
        "records_read": recorded.get("records_read"),
        "documents_kept": store.num_documents,
        "dropped": recorded.get("dropped", {}),
        "dropped_tokens": {**recorded.get("dropped_tokens", {}), **dropped_tokens},
        "tokens": store.num_tokens,
        "tokens_held_out": store.num_tokens - plan.num_tokens,
        "tokens_per_epoch": plan.num_tokens,
        "tokens_trained": tokens_trained,
        "epochs": tokens_trained / plan.num_tokens if plan.num_tokens else 0.0,
    }


def open_run_data(
    run: RunConfig, tokenizer: TextTokenizer, progress: Progress | None = None, *, write: bool = True
) -> RunData:
    """Open or prepare every source of a run and lay out the order. Raises DataError, ConfigError.

    write: let the base model write the texts whose path is `auto`, where they are not in the cache. Without it a training source
    only counts and cannot be read, and a validation text is missing.
    """
    written, self_generated = with_self_generated(run, write=False)
    if write and len(self_generated) < count_self_generated(run):
        open_run_data(
            run, tokenizer, progress, write=False
        )  # writing is slow: what is wrong elsewhere is found before it
        written, self_generated = with_self_generated(run)
    run, config, seed = written, written.data, written.run.seed
    opened = partial(open_sources, tokenizer=tokenizer, config=config.prepare, cache_directory=config.cache_directory)
    own = {
        name: opened([_validation_source(validation)], progress=progress)
        for name, validation in config.validation.items()
        if validation.path is not None
    }
    if config.order == "megatron":
        # Megatron's order depends on how long the run is
        data = _megatron(config, tokenizer, seed, requested_sequences(run.train, config.sequence_length))
    else:
        data = _native(config, tokenizer, seed, partial(opened, progress=progress), run.train.global_batch_size)
    texts = {name: _whole_text(name, stores) for name, stores in own.items()}
    shared = {text.name: text for text in data.held_out_texts}
    names = [*config.validation, *(name for name in shared if name not in config.validation)]
    return replace(
        data,
        held_out_texts=[texts.get(name) or shared[name] for name in names],
        held_out_stores=[*data.held_out_stores, *(store for stores in own.values() for store in stores)],
        self_generated=self_generated,
    )


def _validation_source(validation: ValidationConfig) -> SourceConfig:
    fields = validation.model_dump(exclude={"share", "path", "role", "generate_tokens"})
    return SourceConfig(**fields, path=validation_paths(paths_of(validation)))


def _native(
    config: DataConfig,
    tokenizer: TextTokenizer,
    seed: int,
    opened: Callable[[list[SourceConfig]], list[TokenStore]],
    global_batch_size: int,
) -> RunData:
    kept = STEPS_IN_FLIGHT * global_batch_size + 2 * READERS
    names = source_names(config.train)

    def open_one(source: TrainSourceConfig) -> TokenStore | StreamSource:
        if source.stream:
            return StreamSource(source, tokenizer, config.sequence_length, seed, kept)
        if is_self_generated(source):
            return UnwrittenText(source.generate_tokens, config.sequence_length)
        return opened([source])[0]

    stores = [open_one(source) for source in config.train]
    share = next((validation.share for validation in config.validation.values() if validation.share), None)
    split = [_split(store, share) for store in stores]
    order = NativeOrder(
        [_source_plan(*row) for row in zip(names, config.train, stores, (train for train, _ in split), strict=True)],
        config.sequence_length,
        seed,
        packing=config.packing,
        phases=[(math.ceil(phase.from_tokens / config.sequence_length), phase.weights) for phase in config.phases],
        align_to_bos=config.align_to_bos,
    )
    parts = [(store, out) for store, (_, out) in zip(stores, split, strict=True) if isinstance(store, TokenStore)]
    texts = [
        _shared_text(name, text.share, parts) for name, text in config.validation.items() if text.share is not None
    ]
    return RunData(names, stores, order, texts, [])


def _source_plan(
    name: str, source: TrainSourceConfig, store: TokenStore | StreamSource, training: np.ndarray | None
) -> OrderedSource:
    if isinstance(store, UnwrittenText):
        return OrderedSource(
            name, None, store.lengths, store.fingerprint, source.weight, source.role, source.max_epochs
        )
    if isinstance(store, StreamSource):
        lengths = np.empty(0, dtype=np.int64)
        return OrderedSource(name, None, lengths, store.fingerprint, source.weight, source.role, order=store)
    lengths = store.document_lengths
    return OrderedSource(name, training, lengths, store.fingerprint, source.weight, source.role, source.max_epochs)


def _megatron(config: DataConfig, tokenizer: TextTokenizer, seed: int, train_sequences: int | None) -> RunData:
    """The data of a run in Megatron's order; its validation split is scored as the text `validation`."""
    found = build_megatron_orders(
        _megatron_blend(config.train),
        config.split,
        config.sequence_length,
        seed,
        train_sequences,
        config.num_val_samples or 0,
        partial(open_store, unit="sequences"),
        cache_directory=config.index_cache_directory,
        tokenizer_identifiers=tokenizer.description,
    )
    for store in [*found.stores, *found.valid_stores]:
        check_tokenizer(store, tokenizer)
    names = [source.name for source in found.train.sources]
    most = None if config.num_val_samples is None else config.num_val_samples * config.sequence_length
    texts = [HeldOutText("validation", found.held_out, most)] if found.held_out else []
    found.train.messages += [message for message in found.messages if message not in found.train.messages]
    return RunData(names, list(found.stores), found.train, texts, list(found.valid_stores))


def _megatron_blend(sources: Sequence[TrainSourceConfig]) -> Any:
    """What Megatron takes as its blend: one path, paths, or weights and paths in turn."""
    paths = [paths_of(source) for source in sources]
    if sources[0].weight is None:
        every = [path for given in paths for path in given]
        return every[0] if len(every) == 1 else every
    several = [given for given in paths if len(given) > 1]
    if several:
        raise ConfigError(
            f"data.train: a weight is for one dataset in Megatron's order; {several[0]} are {len(several[0])}"
        )
    return [item for source, [path] in zip(sources, paths, strict=True) for item in (source.weight, path)]


def _split(store: TokenStore | StreamSource, share: float | None) -> tuple[np.ndarray | None, np.ndarray]:
    """Document numbers to train on (None: all) and to hold out."""
    if share is None or isinstance(store, StreamSource):
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


def _files(store: TokenStore | StreamSource) -> dict[str, str]:
    if isinstance(store, StreamSource):
        return store.files()
    entries = store.manifest.get("sources", [])
    if entries:
        return {entry["path"]: entry["sha256"][:12] for entry in entries}
    return {str(path): digest[:12] for path, digest in store.file_fingerprints.items()}


def source_names(sources: Sequence[SourceConfig]) -> list[str]:
    """A name for each source: its own, else the last part of its path; made different by numbers where equal."""
    names: list[str] = []
    for source in sources:
        name = source_name(source)
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names
