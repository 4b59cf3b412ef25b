"""All batch arithmetic of a run: how many steps, and which sequences each step, rank and micro-batch takes.

Step t owns sequences [t*G, (t+1)*G); micro-batch m of data-parallel rank r takes a contiguous slice of them. The last step
of a run that ends inside a global batch is smaller, so that nothing is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

from steep.core.errors import ConfigError
from steep.order.data_order import OrderedSequence
from steep.training.config import TrainConfig


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run, in sequences unless the name says otherwise."""

    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    total_sequences: int
    world_size: int = 1
    first_step: int = 0
    first_sequence: int = 0
    """Where counting begins. Not 0 after a short last step of a run that was then made longer."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.first_step - (-max(0, self.total_sequences - self.first_sequence) // self.global_batch_size)

    def resumed(self, step: int, sequences_seen: int) -> Sizes:
        """The sizes of a run that has made `step` steps with `sequences_seen` sequences; none is skipped or repeated.

        Equal to `self` unless the run's last step was a short one and the run was made longer afterwards.
        """
        on_grid = sequences_seen == self.sequences_of_step(step).start
        return self if on_grid else replace(self, first_step=step, first_sequence=sequences_seen)

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches per rank in a full step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    @property
    def micro_batch_sizes(self) -> list[int]:
        """The micro-batches that a rank's part of the global batch can be split into, smallest first."""
        per_rank = self.global_batch_size // self.world_size
        return [n for n in range(1, per_rank + 1) if per_rank % n == 0]

    def sequences_of_step(self, step: int) -> range:
        """The sequences that `step` trains on, over all ranks."""
        start = self.first_sequence + (step - self.first_step) * self.global_batch_size
        return range(start, max(start, min(start + self.global_batch_size, self.total_sequences)))

    def micro_batches(self, step: int, rank: int = 0) -> list[range]:
        """The sequences of each micro-batch of `rank` in `step`: as many on every rank, some short or empty in the last step."""
        sequences = self.sequences_of_step(step)
        starts = sequences[:: self.micro_batch_size * self.world_size]
        first = rank * self.micro_batch_size
        mine = ((start + first, start + first + self.micro_batch_size) for start in starts)
        return [range(min(start, sequences.stop), min(stop, sequences.stop)) for start, stop in mine]


def run_sizes(config: TrainConfig, sequence_length: int, sequences_per_epoch: int, world_size: int = 1) -> Sizes:
    """The sizes of a run. Raises ConfigError where the batch cannot be split over the ranks.

    A micro-batch that is not a number yet (`auto`) is a rank's whole part of the global batch.
    """
    per_rank, remainder = divmod(config.global_batch_size, world_size)
    micro_batch_size = config.micro_batch_size if isinstance(config.micro_batch_size, int) else per_rank
    if remainder or per_rank % micro_batch_size:
        window = micro_batch_size * world_size or world_size
        fits = [n * window for n in (config.global_batch_size // window, config.global_batch_size // window + 1) if n]
        raise ConfigError(
            f"train.global_batch_size={config.global_batch_size} is not a multiple of {window} "
            f"(micro_batch_size {micro_batch_size} x {world_size} data-parallel ranks). "
            f"These fit: {' or '.join(map(str, fits))}."
        )
    total = requested_sequences(config, sequence_length)
    if total is None:
        # exact in decimal: 1.1 epochs of 10 sequences are 11, where 1.1 * 10 in binary is a little more
        total = math.ceil(Fraction(str(config.epochs or 1)) * sequences_per_epoch)
    return Sizes(sequence_length, config.global_batch_size, micro_batch_size, total, world_size)


def requested_sequences(config: TrainConfig, sequence_length: int) -> int | None:
    """How many sequences a run takes; None for a length in epochs, which depends on the data."""
    if config.steps is not None:
        return config.steps * config.global_batch_size
    if config.tokens is not None:
        return math.ceil(config.tokens / (config.global_batch_size * sequence_length)) * config.global_batch_size
    return None


@dataclass(frozen=True)
class StepCounts:
    """What each sequence of a step holds, over all ranks, in the order of the sequences."""

    sequence_length: int
    sources: list[int]
    """The number of each sequence's source."""
    tokens: list[int]
    """Tokens of each sequence; padding is not counted."""
    label_tokens: list[int]
    """Tokens that each sequence predicts."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return sum(self.tokens)

    @property
    def num_label_tokens(self) -> int:
        """Label tokens of the step: what its summed loss is divided by."""
        return sum(self.label_tokens)

    @property
    def padding_tokens(self) -> int:
        """Positions of the step's sequences that hold no token."""
        return len(self.tokens) * self.sequence_length - self.num_tokens


def count_step(
    sequences: list[OrderedSequence],
    sequence_length: int,
    document_lengths: Sequence[Any],
    document_mask: bool = True,
    open_ended: Sequence[Collection[int]] | None = None,
) -> StepCounts:
    """What the sequences of a step hold, from the order alone: no token is read, so every rank counts the same.

    document_lengths: for each source, tokens of a document by its number. document_mask, open_ended (of each source): see
    `label_tokens`.
    """
    labels = [
        label_tokens(s, document_lengths[s.source], document_mask, open_ended[s.source] if open_ended else ())
        for s in sequences
    ]
    sources, tokens = [sequence.source for sequence in sequences], [sequence.num_tokens for sequence in sequences]
    return StepCounts(sequence_length, sources, tokens, labels)


def label_tokens(
    sequence: OrderedSequence, document_lengths: Any, document_mask: bool, open_ended: Collection[int] = ()
) -> int:
    """How many positions of a sequence have a label, as `loader.make_batch` fills them.

    Every position has one but the last of each range that ends its document; without `document_mask` only the last position
    of the sequence may have none, and the ends of pieces before it, `open_ended`.
    """
    ends = [(r.document, r.start + r.count) for r in sequence.ranges]
    if not document_mask:
        document, end = ends[-1]
        pieces = sum(piece in open_ended for piece, _ in ends[:-1])
        return sequence.num_tokens - pieces - int(sequence.following is None and end >= document_lengths[document])
    return sequence.num_tokens - sum(int(end >= document_lengths[document]) for document, end in ends)


def open_pieces(store: Any) -> Collection[int]:
    """The documents of a token store that are pieces and do not end where their document ends."""
    return getattr(store, "open_ended", ())


class DocumentBatches(NamedTuple):
    """Packed sequences that hold about as many documents as a batch of one document per row."""

    sequence_length: int
    global_batch_size: int
    micro_batch_size: int
    tokens_per_step: float
    """Of the documents, without padding."""


def batches_of_documents(
    per_pass: int, passes_per_step: int, document_tokens: Sequence[int], most_tokens: int
) -> DocumentBatches:
    """The sizes of packed steps that hold about `per_pass * passes_per_step` documents each.

    document_tokens: of some documents, at least one. most_tokens: of a row; a longer document, which such a batch would truncate,
    counts as that. There are as few sequences as hold the step, all equally long, and no shorter than the longest of these
    documents, so that none of them is cut.
    """
    lengths = [min(tokens, most_tokens) for tokens in document_tokens]
    tokens_per_step = per_pass * passes_per_step * sum(lengths) / len(lengths)
    shortest = max([*lengths, math.ceil(tokens_per_step / math.ceil(tokens_per_step / most_tokens)), 2])
    sequence_length = min(most_tokens, math.ceil(shortest / 8) * 8)
    sequences = max(1, round(tokens_per_step / sequence_length))
    fits = [n for n in range(1, sequences + 1) if sequences % n == 0 and n * passes_per_step <= sequences]
    return DocumentBatches(sequence_length, sequences, max(fits, default=1), tokens_per_step)
