"""The sample order: sequence i of a run as a pure function of the sources, the seed and i.

In: for every source its document lengths, fingerprint and weight. Out: `sequence(i)`, the token ranges of sequence i, for any i
from 0 on, whatever the world size, batch size, number of workers or restarts. The mixture says which source gives slot i and
which of its sequences that is; the source's order says what that sequence holds. So a longer run never changes the past, and
only i has to be remembered. Weakness: it keeps 16 bytes for each document of the windows in use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from steep.core.errors import ConfigError, DataError
from steep.core.fingerprint import fingerprint
from steep.core.say import Say, say_nothing
from steep.order.mixture import Mixture, Phase, integer_weights
from steep.order.packing import TokenRange
from steep.order.source_order import BestFitOrder, ConcatOrder, SourceOrder

ORDER_VERSION = 2  # raised whenever the same sources and seed would give other sequences
MOST_PADDING_SHARE = 0.01


@dataclass(frozen=True)
class OrderedSource:
    """What the order needs to know about one source.

    documents: (num_documents,) int64, the documents of the store that are trained on; None for all of them.
    document_lengths: (documents of the whole store,) int64, in tokens.
    store_fingerprint: of the store's content.
    """

    name: str
    documents: NDArray[np.int64] | None
    document_lengths: NDArray[np.int64] = field(repr=False)
    store_fingerprint: str = ""
    weight: float | None = None
    """Share of the run's tokens, in proportion to the other weights; None: in proportion to the source's size."""
    role: str = "train"
    """`replay` marks text that is there so that the model does not forget it; an epoch of a run does not wait for it."""
    max_epochs: float | None = None
    """How often the source may be repeated; None for no limit."""
    held_out: str = ""
    """Names which part of the store is held out, where the counts do not."""
    piece_of: NDArray[np.int64] | None = field(default=None, repr=False)
    """(pieces,) the document of which each of the last numbers of `document_lengths` is a piece; None without pieces."""
    order: SourceOrder | None = field(default=None, repr=False)
    """Gives its sequences where they do not follow from document lengths: a stream."""

    def whole_document(self, number: int) -> int:
        """The document that a document, or a piece of one, belongs to."""
        first_piece = len(self.document_lengths) - (0 if self.piece_of is None else len(self.piece_of))
        return number if self.piece_of is None or number < first_piece else int(self.piece_of[number - first_piece])

    @property
    def trained_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document that is trained on."""
        return self.document_lengths if self.documents is None else self.document_lengths[self.documents]

    @property
    def num_documents(self) -> int:
        """Documents that are trained on."""
        return len(self.document_lengths if self.documents is None else self.documents)

    @property
    def num_tokens(self) -> int:
        """Tokens that are trained on in one epoch."""
        return int(self.trained_lengths.sum())


@dataclass(frozen=True)
class OrderedSequence:
    """One sequence: the source it comes from and the ranges of that source's documents, in order."""

    source: int
    ranges: list[TokenRange]
    following: TokenRange | None = None
    """The token after the sequence, where that is not the next one of the last document; only Megatron's order has it."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence; less than the sequence length where it is padded."""
        return sum(token_range.count for token_range in self.ranges)


class DataOrder(Protocol):
    """What a run asks of its sample order."""

    sources: list[OrderedSource]
    sequence_length: int
    seed: int
    sequences_of_source: list[int]
    """Of one epoch of each source."""
    sequences_per_epoch: int
    dropped_tokens: list[dict[str, int]]
    """Tokens of each source that the order never takes, by reason."""

    def sequence(self, index: int) -> OrderedSequence:
        """Sequence `index` of the run."""

    def counts(self, sequences: int) -> list[int]:
        """How many of the first `sequences` come from each source."""

    def check_length(self, total_sequences: int) -> None:
        """Raise ConfigError where a run of this length is more than the sources may give."""

    def beginning_at(self, first_sequence: int) -> DataOrder:
        """The same sources in an order that begins to count at this sequence of the run."""

    @property
    def fingerprint(self) -> str:
        """Equal for orders that give the same sequences; another length of the run changes it only where it changes the order."""
        return fingerprint(self.describe())

    def describe(self) -> dict[str, Any]:
        """What the order depends on and nothing else, as JSON."""


class NativeOrder(DataOrder):
    """The native order of a run over its sources. Raises DataError if there is nothing to train on, ConfigError for weights.

    phases: (first sequence, {source name: weight}) of each change of the weights, in order; sources not named keep theirs.
    first_sequence: where this order begins to count, for a run whose data was changed on purpose; from there it has no end.
    say: told of tokens that are left out and of padding.
    """

    def __init__(
        self,
        sources: list[OrderedSource],
        sequence_length: int,
        seed: int,
        *,
        packing: str = "best_fit",
        phases: Sequence[tuple[int, Mapping[str, float]]] = (),
        align_to_bos: bool = False,
        first_sequence: int = 0,
        say: Say = say_nothing,
    ):
        self.sources, self.sequence_length, self.seed = sources, sequence_length, seed
        self.align_to_bos, self.first_sequence = align_to_bos, first_sequence
        self._packing, self._changes = packing, phases
        self.dropped_tokens: list[dict[str, int]] = []
        """Of one epoch."""
        self.packings: list[str] = []
        self._orders = [self._order_of(number, packing, say) for number in range(len(sources))]
        self.sequences_of_source = [order.num_sequences for order in self._orders]
        if not sum(self.sequences_of_source):
            names = ", ".join(source.name for source in sources)
            raise DataError(f"there is nothing to train on: no tokens in {names}")
        self.phases = _phases(sources, self.sequences_of_source, phases, first_sequence)
        self._mixture = Mixture(self.phases)
        self.sequences_per_epoch = self._sequences_of_an_epoch()

    def _order_of(self, number: int, packing: str, say: Say) -> SourceOrder:
        source = self.sources[number]
        if source.order is not None:
            self.dropped_tokens.append({})
            self.packings.append("stream")
            return source.order
        key = (self.seed, number)
        lengths = source.trained_lengths
        tokens = int(lengths.sum())
        if self.align_to_bos:
            lengths = np.minimum(lengths, self.sequence_length)
        kept = int(lengths.sum())
        self.dropped_tokens.append({"align_to_bos": tokens - kept} if tokens > kept else {})
        if tokens > kept:
            say(
                f"{source.name}: align_to_bos leaves out {tokens - kept:,} of {tokens:,} tokens "
                f"({(tokens - kept) / tokens:.2%}): what documents have beyond {self.sequence_length:,} tokens"
            )
        concat: SourceOrder = ConcatOrder(source.documents, lengths, self.sequence_length, key)
        chosen = concat if packing == "concat" else BestFitOrder(source.documents, lengths, self.sequence_length, key)
        positions = chosen.num_sequences * self.sequence_length
        padding = 1 - kept / positions if positions else 0.0  # share of the positions of an epoch that hold no token
        if padding > MOST_PADDING_SHARE and not self.align_to_bos and concat.num_sequences < chosen.num_sequences:
            say(f"{source.name}: best_fit would pad {padding:.1%} of its sequences; concat is used")
            chosen = concat
        elif padding > MOST_PADDING_SHARE:
            say(
                f"{source.name}: {padding:.1%} of its {chosen.num_sequences:,} sequences is padding, since {kept:,} tokens are "
                f"not a multiple of {self.sequence_length:,}; no packing needs fewer"
            )
        self.packings.append("concat" if chosen is concat else "best_fit")
        return chosen

    def _sequences_of_an_epoch(self) -> int:
        """The fewest sequences that hold, once, every source that is not replay and has a share at the start."""
        weights = self.phases[0].weights
        shared = [number for number, weight in enumerate(weights) if weight and self.sequences_of_source[number]]
        main = [number for number in shared if self.sources[number].role != "replay"] or shared
        first = Mixture(self.phases[:1])
        return max(first.slots_until(number, self.sequences_of_source[number]) or 1 for number in main)

    def sequence(self, index: int) -> OrderedSequence:
        source, number = self._mixture.slot(index - self.first_sequence)
        return OrderedSequence(source, self._orders[source].ranges(number))

    def counts(self, sequences: int) -> list[int]:
        return self._mixture.counts(max(0, sequences - self.first_sequence))

    def beginning_at(self, first_sequence: int) -> NativeOrder:
        return NativeOrder(
            self.sources, self.sequence_length, self.seed, packing=self._packing, phases=self._changes,
            align_to_bos=self.align_to_bos, first_sequence=first_sequence,
        )  # fmt: skip

    def check_length(self, total_sequences: int) -> None:
        rows = zip(self.sources, self.sequences_of_source, self.counts(total_sequences), strict=True)
        for number, (source, per_epoch, count) in enumerate(rows):
            if source.max_epochs is None:
                continue
            most = int(Fraction(str(source.max_epochs)) * per_epoch)
            if count > most:
                reached = (self._mixture.slots_until(number, most + 1) or 1) - 1
                epochs = count / per_epoch
                raise ConfigError(
                    f"data.train: source {source.name!r} may be repeated {source.max_epochs:g} times (max_epochs), and a run of "
                    f"{total_sequences * self.sequence_length:,} tokens needs {epochs:.2f} epochs of it. It lasts for "
                    f"{reached * self.sequence_length:,} tokens: make the run shorter, the source's weight smaller, max_epochs "
                    "larger, or change the weights there with data.phases."
                )

    def describe(self) -> dict[str, Any]:
        return {
            "version": ORDER_VERSION,
            "order": "native",
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "align_to_bos": self.align_to_bos,
            "first_sequence": self.first_sequence,
            "sources": [
                {
                    "fingerprint": source.store_fingerprint,
                    "packing": packing,
                    "documents": source.num_documents,
                    "tokens": source.num_tokens,
                    "sequences": count,
                    **({"held_out": source.held_out} if source.held_out else {}),
                }
                for source, count, packing in zip(self.sources, self.sequences_of_source, self.packings, strict=True)
            ],
            "phases": [{"first_sequence": phase.start, "weights": list(phase.weights)} for phase in self.phases],
        }


def _phases(
    sources: list[OrderedSource], sequences: list[int], changes: Sequence[tuple[int, Mapping[str, float]]], first: int
) -> list[Phase]:
    """The weights of each phase in whole numbers; a source without sequences may have none. Raises ConfigError."""
    given = [source.weight for source in sources]
    if any(weight is None for weight in given) and any(weight is not None for weight in given):
        names = ", ".join(source.name for source in sources if source.weight is None)
        raise ConfigError(f"data.train: some sources have a weight and these have none: {names}. Give all or none one.")
    weights: list[float | int] = [sequences[i] if weight is None else weight for i, weight in enumerate(given)]
    positions = {source.name: number for number, source in enumerate(sources)}
    phases: dict[int, list[float | int]] = {0: weights}
    for start, changed in changes:
        unknown = [name for name in changed if name not in positions]
        if unknown:
            raise ConfigError(
                f"data.phases: no source is called {unknown[0]!r}; the sources are {', '.join(positions)}"
            )
        weights = list(weights)
        for name, weight in changed.items():
            weights[positions[name]] = weight
        phases[max(0, start - first)] = weights  # of those before `first` only the last one counts
    found = []
    for start, weights in phases.items():
        empty = [s.name for s, weight, count in zip(sources, weights, sequences, strict=True) if weight and not count]
        if empty:
            raise DataError(f"data.train: source {empty[0]!r} has a weight and no tokens to train on")
        try:
            found.append(Phase(start, tuple(integer_weights(weights))))
        except ValueError as error:
            raise ConfigError(f"data: from sequence {start:,} on: {error}") from None
    return found


def same_past(saved: Mapping[str, Any], current: Mapping[str, Any], sequences_seen: int) -> list[str]:
    """What changes the sequences before `sequences_seen`, in words; empty if nothing does.

    saved, current: `describe()` of the order that was trained with and of the order now. Sources may have been added after the
    others, and phases from `sequences_seen` on may differ.
    """
    found = [
        f"{key}: {saved.get(key)} then, {current.get(key)} now"
        for key in ("version", "order", "sequence_length", "seed", "align_to_bos", "first_sequence")
        if saved.get(key) != current.get(key)
    ]
    if found:
        return found
    then, now = saved["sources"], current["sources"]
    for number, source in enumerate(then):
        if number >= len(now):
            found.append(f"source {number + 1} is gone")
        elif source != now[number]:
            moved = [other + 1 for other, candidate in enumerate(now) if candidate == source]
            where = f"; it is source {moved[0]} now" if moved else ""
            changed = [
                f"{key} {source.get(key)} then, {now[number].get(key)} now"
                for key in {**source, **now[number]}
                if source.get(key) != now[number].get(key)
            ]
            found.append(f"source {number + 1}: {', '.join(changed)}{where}")
    if "phases" in saved and _past_phases(saved, sequences_seen) != _past_phases(current, sequences_seen):
        found.append("weights: the phases up to here give other sources their turns")
    if saved["order"] == "megatron" and saved != current:
        found.append(
            "Megatron's order depends on the length of the run and draws another past for this one; keep its length"
        )
    return found


def _past_phases(description: Mapping[str, Any], sequences_seen: int) -> list[tuple[int, list[int]]]:
    """(first sequence, weights up to the last that is not 0) of the phases that have begun."""
    seen = max(1, sequences_seen - description["first_sequence"])
    begun = [phase for phase in description["phases"] if phase["first_sequence"] < seen]
    return [(phase["first_sequence"], list(np.trim_zeros(phase["weights"], "b"))) for phase in begun]


def held_out(content_hashes: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Which documents are held out: those whose content hash falls in the first `share` of all hashes.

    content_hashes: (num_documents,) uint64. A document's side depends on its content alone, so its copies go the same way, and
    adding, reordering or resharding data moves no document. Weakness: the share is met on average, not exactly.
    """
    # uniform hashes h in [0, 2^64): P(h < share * 2^64) = share
    return content_hashes < np.uint64(min(int(share * 2**64), 2**64 - 1))
