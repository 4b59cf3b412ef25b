"""A run's data, opened. In: configuration and tokenizer. Out: stores, sample order, held-out texts, ledger."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from steep.config.run import RunConfig
from steep.core.errors import ConfigError
from steep.core.say import Say, say_nothing
from steep.data.held_out_text import HeldOutText
from steep.data.overlap import overlap_lines
from steep.data.preparing import OverAllTexts, Progress
from steep.data.self_generated import (
    TextGenerator,
    UnwrittenText,
    count_self_generated,
    is_self_generated,
    remember_texts,
    with_self_generated,
)
from steep.data.shares import hold_out, share_holder, shared_texts
from steep.order.batches import requested_sequences
from steep.order.config import TrainSourceConfig
from steep.order.data_order import DataOrder, NativeOrder, OrderedSource
from steep.order.megatron import build_megatron_orders
from steep.sources.config import SourceConfig
from steep.sources.dropped import dropped_line
from steep.sources.hints import say_hints
from steep.sources.inputs import paths_of
from steep.sources.lingua import validation_paths
from steep.store.cache import check_tokenizer, open_sources, say_dropped
from steep.store.cut_store import CutStore
from steep.store.reader import TokenStore, open_store
from steep.store.stream import READERS, StreamSource
from steep.store.work import source_name
from steep.tokenizer.encode import TextTokenizer

STEPS_IN_FLIGHT = 6
"""Steps whose streamed sequences are kept: the one in training, those the loader may have read ahead, and a few more."""

MOST_NAMED_FILES = 1000
"""More files than this are not listed in a checkpoint; a change of one is then found, but not named."""


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

    @property
    def largest_token_id(self) -> int:
        """Over all stores, the held-out ones included."""
        return max(store.max_token_id for store in [*self.stores, *self.held_out_stores])

    def new_text_tokens(self, run_tokens: int) -> int:
        """Different tokens that are not replay in a run of `run_tokens` tokens; of streams as many as the run takes."""
        sources = [source for source in self.order.sources if source.role != "replay"]
        streamed = any(source.order is not None for source in sources)
        return run_tokens if streamed else min(run_tokens, sum(source.num_tokens for source in sources))

    def ledger(
        self,
        *,
        sequences_seen: int,
        tokens_by_source: Sequence[int],
        skipped_tokens: Mapping[str, int],
        padding_tokens: int,
        data_changes: Sequence[dict[str, Any]],
        spikes: Sequence[dict[str, Any]],
    ) -> dict[str, Any]:
        """What became of every record and token of each source, as JSON.

        sequences_seen: of the whole run. tokens_by_source: trained on, in the order of the sources; empty before the first step.
        skipped_tokens: of steps without an update, by source name. The others are written down as they are.
        """
        order, trained = self.order, tokens_by_source or [0] * len(self.stores)
        rows = zip(self.stores, order.sources, trained, order.counts(sequences_seen), order.dropped_tokens, strict=True)
        sources = [
            {"name": name, **_source_ledger(*row), "tokens_skipped": skipped_tokens.get(name, 0)}
            for name, row in zip(self.names, rows, strict=True)
        ]
        return {"sources": sources, "padding_tokens": padding_tokens, "data_changes": data_changes, "spikes": spikes}

    def check_vocabulary(self, vocab_size: int | None) -> None:
        """Raise ConfigError for an id without an embedding. vocab_size: number of embeddings; None if it is not known."""
        if vocab_size is not None and self.largest_token_id >= vocab_size:
            raise ConfigError(
                f"the data holds token id {self.largest_token_id}, but the model has {vocab_size} embeddings. The tokenizer is "
                "not this model's: use the model's own, or build the model with a vocab_size of at least "
                f"{self.largest_token_id + 1}."
            )

    def stream_cursors(self, sequences_seen: int) -> list[list[dict[str, Any]]]:
        """Where the readers of each source stand after `sequences_seen` sequences of the run; empty if it is not streamed."""
        pairs = zip(self.stores, self.order.counts(sequences_seen), strict=True)
        return [store.cursors(count) if isinstance(store, StreamSource) else [] for store, count in pairs]

    def dropped_of_streams(self, sequences_seen: int) -> list[str]:
        """One line for each streamed source with dropped records, after `sequences_seen` sequences of the run."""
        rows = zip(self.names, self.stores, self.order.counts(sequences_seen), strict=True)
        found = [
            dropped_line(name, store.ledger(count), read="read so far")
            for name, store, count in rows
            if isinstance(store, StreamSource)
        ]
        return [line for line in found if line is not None]

    def begin_streams(
        self, cursors: Sequence[list[dict[str, Any]]], counts: Sequence[int], say: Say = say_nothing
    ) -> None:
        """Let streams continue where `stream_cursors` stood, and say what they had dropped; those without cursors begin at
        their start."""
        for name, store, found, count in zip(self.names, self.stores, cursors, counts, strict=False):
            if isinstance(store, StreamSource) and found:
                line = dropped_line(name, store.begin_at(found, count), read="read so far")
                if line is not None:
                    say(line)

    def files(self) -> list[dict[str, str]]:
        """The files of each source, each with a short checksum, so that a change can be named; empty where there are too many."""
        found = [_files(store) for store in self.stores]
        return found if sum(map(len, found)) <= MOST_NAMED_FILES else [{} for _ in found]


def _source_ledger(
    store: TokenStore | StreamSource, ordered: OrderedSource, trained: int, sequences: int, left_out: dict[str, int]
) -> dict[str, Any]:
    """One source: records read = kept + dropped by reason; tokens = held out + available to training."""
    if isinstance(store, StreamSource):
        return {"role": ordered.role, **store.ledger(sequences), "tokens_trained": trained}
    recorded = store.manifest.get("ledger", {})
    return {
        "role": ordered.role,
        "records_read": recorded.get("records_read"),
        "documents_kept": store.num_documents,
        "dropped": recorded.get("dropped", {}),
        "dropped_bytes": recorded.get("dropped_bytes", {}),
        "dropped_tokens": {**recorded.get("dropped_tokens", {}), **left_out},
        "tokens": store.num_tokens,
        "tokens_held_out": store.num_tokens - ordered.num_tokens,
        "tokens_per_epoch": ordered.num_tokens,
        "tokens_trained": trained,
        "epochs": trained / ordered.num_tokens if ordered.num_tokens else 0.0,
    }


def open_run_data(
    config: RunConfig,
    tokenizer: TextTokenizer,
    say: Say,
    *,
    progress: Progress | None = None,
    generator: TextGenerator | None = None,
) -> RunData:
    """Open or prepare every source of a run and make its sample order. Raises DataError, ConfigError.

    generator: lets the base model write the texts whose path is `auto`, where they are not in the cache
    (`evaluation.text_writer.open_writer`). Without it such a training source is only counted and cannot be read, and a held-out
    text is left out.
    """
    lines: list[str] = []
    written = with_self_generated(config, lines.append)
    if generator is not None and len(lines) < count_self_generated(config):
        # writing is slow: what is wrong elsewhere is found before it
        open_run_data(config, tokenizer, say_nothing, progress=progress)
        lines.clear()
        written = with_self_generated(config, lines.append, generator)
    for line in lines:
        say(line)
    if generator is not None:
        remember_texts(config, written)
    return _open_written(written, tokenizer, say, progress)


def follow_streams(data: RunData, say: Say) -> None:
    """Let streamed sources say how many records they have dropped, while they are read."""
    for name, store in zip(data.names, data.stores, strict=True):
        if isinstance(store, StreamSource):
            store.name, store.say = name, say


def _open_written(run: RunConfig, tokenizer: TextTokenizer, say: Say, progress: Progress | None) -> RunData:
    """The data of a run whose texts have paths."""
    config = run.data
    own_sources = {
        name: SourceConfig(
            **validation.model_dump(include=set(SourceConfig.model_fields) - {"path"}),
            path=validation_paths(paths_of(validation)),
        )
        for name, validation in config.validation.items()
        if validation.path is not None
    }
    trained = [source for source in config.train if not source.stream and not is_self_generated(source)]
    every = [*own_sources.values(), *(trained if config.order != "megatron" else [])]
    over_all = None if progress is None else OverAllTexts(every, progress)

    def opened(sources: list[SourceConfig], say: Say) -> list[TokenStore]:
        stores = open_sources(sources, tokenizer, config.prepare, config.cache_directory, over_all, say=say)
        if over_all is not None:
            over_all.next_text()
        return stores

    of_own: list[str] = []
    of_train: list[str] = []
    of_order: list[str] = []
    own = {name: opened([source], of_own.append) for name, source in own_sources.items()}
    if config.order == "megatron":
        data = _megatron(run, tokenizer, of_train.append, of_order.append)
    else:
        data = _native(run, tokenizer, partial(opened, say=of_train.append), of_train.append, of_order.append)
    for line in dict.fromkeys([*of_train, *of_own, *of_order]):  # stores may have the same to say
        say(line)
    for line in overlap_lines(own, data.order.sources, data.stores):
        say(line)
    texts: dict[str, HeldOutText] = {}
    for name, validation in config.validation.items():
        if name in own:
            parts = [(store, np.arange(store.num_documents)) for store in own[name]]
            texts[name] = HeldOutText(name, parts, role=validation.role)
        else:
            texts |= {text.name: text for text in data.held_out_texts}
    texts = texts | {text.name: text for text in data.held_out_texts if text.name not in texts}
    return replace(
        data,
        held_out_texts=list(texts.values()),
        held_out_stores=[*data.held_out_stores, *(store for stores in own.values() for store in stores)],
    )


def _native(
    run: RunConfig,
    tokenizer: TextTokenizer,
    opened: Callable[[list[SourceConfig]], list[TokenStore]],
    say_of_stores: Say,
    say_of_order: Say,
) -> RunData:
    config, seed = run.data, run.run.seed
    kept = STEPS_IN_FLIGHT * run.train.global_batch_size + 2 * READERS
    shared = next((name for name, validation in config.validation.items() if validation.share), None)
    holder = None if shared is None else share_holder(config, config.validation[shared])
    names: list[str] = []
    stores: list[TokenStore | StreamSource] = []
    ordered: list[OrderedSource] = []
    held: list[tuple[int, TokenStore, np.ndarray]] = []
    for source in config.train:
        name = source_name(source)
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
        training, stream, choice = None, None, ""
        if source.stream:
            stream = StreamSource(source, tokenizer, config.sequence_length, seed, kept)
            stores.append(stream)
            say_hints(source, say_of_stores)
            if line := dropped_line(names[-1], stream.first_records(), read="read as a sample"):
                say_of_stores(line)
            lengths = np.empty(0, dtype=np.int64)
        elif is_self_generated(source):
            unwritten = UnwrittenText(source.generate_tokens, config.sequence_length, say_of_stores)
            stores.append(unwritten)
            lengths = unwritten.lengths
        else:
            store = opened([source])[0]
            if holder is not None:
                store, training, out, choice = hold_out(store, names[-1], holder, say_of_order)
                held.append((len(names) - 1, store, out))
            stores.append(store)
            lengths = store.document_lengths
        about = (stores[-1].fingerprint, source.weight, source.role, source.max_epochs)
        pieces = stores[-1].piece_of if isinstance(stores[-1], CutStore) else None
        ordered.append(
            OrderedSource(names[-1], training, lengths, *about, held_out=choice, piece_of=pieces, order=stream)
        )
    order = NativeOrder(
        ordered,
        config.sequence_length,
        seed,
        packing=config.packing,
        phases=[(math.ceil(phase.from_tokens / config.sequence_length), phase.weights) for phase in config.phases],
        align_to_bos=config.align_to_bos,
        say=say_of_order,
    )
    return RunData(names, stores, order, [] if shared is None else shared_texts(config, shared, names, held), [])


def _megatron(run: RunConfig, tokenizer: TextTokenizer, say_of_stores: Say, say_of_order: Say) -> RunData:
    """The data of a run in Megatron's order; its validation split is scored as the text `validation`."""
    config = run.data
    found = build_megatron_orders(
        _megatron_blend(config.train),
        config.split,
        config.sequence_length,
        run.run.seed,
        requested_sequences(run.train, config.sequence_length),  # the order depends on how long the run is
        config.num_val_samples or 0,
        partial(open_store, unit="sequences", say=say_of_stores),
        cache_directory=config.index_cache_directory,
        tokenizer_identifiers=tokenizer.description,
        say=say_of_order,
    )
    names = [source.name for source in found.train.sources]
    for store in [*found.stores, *found.valid_stores]:
        check_tokenizer(store, tokenizer)
    for store in dict.fromkeys([*found.stores, *found.valid_stores]):
        say_dropped(store.path.name, store, say_of_stores)
    most = None if config.num_val_samples is None else config.num_val_samples * config.sequence_length
    texts = [HeldOutText("validation", found.held_out, most)] if found.held_out else []
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
            f"data.train: in Megatron's order a weight belongs to one dataset, and {several[0]} are {len(several[0])}"
        )
    return [item for source, [path] in zip(sources, paths, strict=True) for item in (source.weight, path)]


def _files(store: TokenStore | StreamSource) -> dict[str, str]:
    if isinstance(store, StreamSource):
        return store.files()
    entries = store.manifest.get("sources", [])
    if entries:
        return {entry["path"]: entry["sha256"][:12] for entry in entries}
    return {str(path): digest[:12] for path, digest in store.file_fingerprints.items()}
