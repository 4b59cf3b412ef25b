"""One dataset in Megatron's order: which tokens make its sample k. In: sequence lengths, a seed, sizes. Out: three index arrays.

The documents of the split are laid end to end in a shuffled order, as often as the run needs, cut every `sequence_length`
tokens, and the cuts are shuffled. Every array equals, byte for byte, what megatron-core 0.19.2's GPTDataset builds: the same
draws from the same legacy generator in the same order; the cuts come from a cumulative sum instead of a compiled loop.
A "document" here is what Megatron splits and shuffles: a sequence of the .idx file.
Weakness, Megatron's own: the number of epochs enters the shuffle, so another run length can be another order from the start;
memory grows with documents times epochs (20 bytes each while building, 4 kept, and 12 bytes per sample).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steep.core.errors import ConfigError, DataError
from steep.order.packing import TokenRange

TRAIN, VALID, TEST = 0, 1, 2
SPLIT_NAMES = ("train", "valid", "test")
_LAST_EPOCH_THRESHOLD = 0.80  # a last epoch is shuffled apart if less of it is needed; Megatron's constant

SplitMatrix = list[tuple[float, float] | None]


def normalize(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum, in the arithmetic of numpy that Megatron uses (the last bits enter its hashes)."""
    values = np.array(weights, dtype=np.float64)
    return (values / np.sum(values)).tolist()


def parse_split(split: str) -> list[float]:
    """Shares of train, valid and test from a string like `99,1,0`; they add up to 1. Raises ConfigError."""
    try:
        shares = [float(number) for number in re.findall(r"[.0-9]+", split)]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= len(SPLIT_NAMES) or not sum(shares) > 0:
        raise ConfigError(
            f"data.split: {split!r} is not a split: give shares of train, validation and test, for example '99,1,0'."
        )
    return normalize(shares + [0.0] * (len(SPLIT_NAMES) - len(shares)))


def split_matrix(shares: Sequence[float]) -> SplitMatrix:
    """Where each split begins and ends, as fractions of the documents; None for a split without a share.

    The ends are sums from left to right in float64, so 0.9 + 0.05 may be 0.9500000000000001, as in Megatron.
    """
    ends: list[float] = [0]  # an integer, as in Megatron's description
    for share in shares:
        ends.append(ends[-1] + share)
    return [None if stop <= start else (start, stop) for start, stop in pairwise(ends)]


def split_range(fractions: tuple[float, float], num_documents: int) -> range:
    """The documents of a split: its ends times the number of documents, halves rounded to even."""
    return range(round(fractions[0] * float(num_documents)), round(fractions[1] * float(num_documents)))


@dataclass(frozen=True)
class IndexSettings:
    """What the order of one dataset depends on besides its documents."""

    sequence_length: int
    seed: int
    add_extra_token: bool = True
    """A sample is drawn with one token more than `sequence_length`: the last label, and the next sample's first token."""
    drop_last_partial: bool = True
    """False keeps the end of the last epoch as a short sample."""

    @property
    def extra(self) -> int:
        """Tokens beyond `sequence_length` that a sample is drawn with: 1 or 0."""
        return int(self.add_extra_token)


@dataclass(frozen=True)
class Epochs:
    """How often the documents are laid out, and whether the last time is shuffled apart. Equal for equal orders."""

    count: int
    separate_last: bool
    samples_before_last: int = 0
    """Samples of all epochs but the last; 0 for one epoch."""

    def num_samples(self, tokens_per_epoch: int, settings: IndexSettings) -> int:
        """Samples of all epochs: what the dataset holds, often more than was asked for."""
        tokens = self.count * tokens_per_epoch - settings.extra
        if settings.drop_last_partial:
            return max(0, tokens // settings.sequence_length)
        return max(0, math.ceil(np.float32(tokens) / np.float32(settings.sequence_length)))  # float32 is Megatron's


def count_epochs(tokens_per_epoch: int, num_samples: int | None, settings: IndexSettings) -> Epochs:
    """The fewest epochs that hold `num_samples`; one for None. Raises DataError for documents without tokens."""
    if num_samples is None:
        return Epochs(1, False)
    if tokens_per_epoch <= 0:
        raise DataError("there is nothing to train on: the documents of the split have no tokens")
    length, extra = settings.sequence_length, settings.extra
    count = max(1, -(-(num_samples * length + extra) // tokens_per_epoch))
    if count == 1:
        return Epochs(1, False)
    before_last = ((count - 1) * tokens_per_epoch - extra) // length
    per_epoch = (tokens_per_epoch - extra) // length
    return Epochs(count, num_samples - before_last < int(_LAST_EPOCH_THRESHOLD * per_epoch), before_last)


@dataclass(frozen=True)
class SampleIndex:
    """The samples of one dataset.

    document_index: (epochs * documents,) int32, documents in the order they are laid.
    sample_index: (samples + 1, 2) int32 or int64, where each cut begins: index into document_index, token within the document.
    shuffle_index: (samples,) uint32 or int64, the cut of each sample.
    lengths: (documents of the store,) integers, in tokens.
    """

    document_index: NDArray[Any] = field(repr=False)
    sample_index: NDArray[Any] = field(repr=False)
    shuffle_index: NDArray[Any] = field(repr=False)
    lengths: NDArray[Any] = field(repr=False)
    settings: IndexSettings

    @property
    def num_samples(self) -> int:
        """Samples that it holds."""
        return len(self.shuffle_index)

    def ranges(self, sample: int) -> tuple[list[TokenRange], TokenRange | None]:
        """The tokens of a sample, `sequence_length` of them or fewer at the very end, and the token after them.

        The latter is None where it is the next token of the last range's document, or where there is none.
        """
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} of {self.num_samples}")
        index, start = self.sample_index[int(self.shuffle_index[sample])].tolist()
        need = self.settings.sequence_length
        found: list[TokenRange] = []
        while need and index < len(self.document_index):
            document = int(self.document_index[index])
            count = min(need, int(self.lengths[document]) - start)
            if count > 0:
                found.append(TokenRange(document, start, count))
                need -= count
            if need or start + count >= int(self.lengths[document]):
                index, start = index + 1, 0
            else:
                return found, None  # the document goes on
        if need or not self.settings.add_extra_token:
            return found, None
        while index < len(self.document_index):
            document = int(self.document_index[index])
            if self.lengths[document] > 0:
                return found, TokenRange(document, 0, 1)
            index += 1
        return found, None


def build_index(
    lengths: NDArray[Any], documents: range, num_samples: int | None, settings: IndexSettings
) -> SampleIndex:
    """The index of the documents of a split for a run that takes `num_samples`; None for one epoch.

    lengths: (documents of the store,) integers. Time: 20 M documents take about as long as two shuffles of them.
    Raises DataError where the documents hold no tokens.
    """
    tokens_per_epoch = int(lengths[documents.start : documents.stop].sum(dtype=np.int64))
    epochs = count_epochs(tokens_per_epoch, num_samples, settings)
    random = np.random.RandomState(settings.seed)  # one generator: the order of the draws below is part of the format
    document_index = np.tile(np.arange(documents.start, documents.stop, dtype=np.int32), epochs.count)
    count = epochs.num_samples(tokens_per_epoch, settings)
    shuffle_index = np.arange(count, dtype=np.int64 if count >= np.iinfo(np.uint32).max - 1 else np.uint32)
    if epochs.separate_last:
        cuts = ((document_index, (epochs.count - 1) * len(documents)), (shuffle_index, epochs.samples_before_last))
        parts = [part for index, first in cuts for part in (index[:first], index[first:])]
    else:
        parts = [document_index, shuffle_index]
    for part in parts:
        random.shuffle(part)
    sample_index = build_sample_index(lengths, document_index, count, settings)
    return SampleIndex(document_index, sample_index, shuffle_index, lengths, settings)


def build_sample_index(
    lengths: NDArray[Any], document_index: NDArray[Any], count: int, settings: IndexSettings
) -> NDArray[Any]:
    """Where each of `count` cuts begins, and where the last one ends.

    Row j is where token `j * sequence_length` of the documents laid end to end is. Without the extra token a cut at a
    document's end is put there and not at the next one's start; past the end of all documents it is put at their last
    token. Both as in Megatron.
    """
    largest = max(len(document_index), int(lengths.max(initial=0)))
    dtype: Any = np.int32 if largest <= np.iinfo(np.int32).max else np.int64
    laid = lengths.astype(dtype, copy=False)[document_index]  # the gather costs most: half the bytes, a third less time
    ends = np.cumsum(laid, dtype=np.int64)
    targets = np.arange(1, count + 1, dtype=np.int64) * settings.sequence_length + settings.extra
    cuts = np.searchsorted(ends, targets, side="left")  # the document that holds token j * length + extra
    beyond = int(np.searchsorted(targets, int(ends[-1]) if len(ends) else 0, side="right"))
    cuts[beyond:] = len(ends) - 1
    rows = np.zeros((count + 1, 2), dtype=dtype)
    rows[1:, 0] = cuts
    targets -= settings.extra
    targets -= ends[cuts]
    targets += laid[cuts]
    targets[beyond:] = int(laid[-1]) - settings.extra if len(laid) else 0
    rows[1:, 1] = targets
    return rows


def index_damage(index: SampleIndex, documents: range, num_samples: int | None) -> str | None:
    """Why a stored index does not belong to these documents, or None. Only the draw of the shuffles is not checked.

    Costs a fraction of building it: one pass over the documents and one over the samples, without any shuffling.
    """
    settings, lengths = index.settings, index.lengths
    tokens_per_epoch = int(lengths[documents.start : documents.stop].sum(dtype=np.int64))
    epochs = count_epochs(tokens_per_epoch, num_samples, settings)
    count = epochs.num_samples(tokens_per_epoch, settings)
    shapes = [index.document_index.shape, index.sample_index.shape, index.shuffle_index.shape]
    if shapes != [(epochs.count * len(documents),), (count + 1, 2), (count,)]:
        return "its arrays do not have the sizes that these documents give"
    together = epochs.count - epochs.separate_last
    parts = np.split(index.document_index, [together * len(documents)])
    for part, times in zip(parts, (together, int(epochs.separate_last)), strict=True):
        if len(part) and (part.min() < documents.start or part.max() >= documents.stop):
            return "its documents are not those of the split"
        if not _holds_each(part, documents, times):
            return "it does not hold every document as often as the epochs ask for"
    if not np.array_equal(index.sample_index, build_sample_index(lengths, index.document_index, count, settings)):
        return "its cuts are not where these documents' lengths put them"
    first = epochs.samples_before_last if epochs.separate_last else count
    for begin, part in ((0, index.shuffle_index[:first]), (first, index.shuffle_index[first:])):
        expected = range(begin, begin + len(part))
        inside = not len(part) or (part.min() >= begin and part.max() < expected.stop)
        if not inside or not _holds_each(part, expected, 1):
            return "it does not hold every sample once"
    return None


def _holds_each(numbers: NDArray[Any], expected: range, times: int) -> bool:
    """Whether `numbers`, all of them in `expected`, hold each of `expected` exactly `times` times."""
    if len(numbers) != times * len(expected):
        return False
    if times == 1:  # a third of the time of counting
        seen = np.zeros(len(expected), dtype=bool)
        seen[numbers - expected.start if expected.start else numbers] = True
        return bool(seen.all())
    return not len(numbers) or bool(np.all(np.bincount(numbers - expected.start, minlength=len(expected)) == times))
