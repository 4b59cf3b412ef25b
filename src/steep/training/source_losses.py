"""The training loss of each source, packed or not. In: the summed loss of every sequence of a step. Out: means by source.

A sequence holds documents of one source, so its sum belongs to that source whole. The mean over all label tokens of a step is the
mean of its sources weighted by their label tokens. Weakness: of a source with few label tokens in a step the mean is noise; read
it over many steps, as the console and the report do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steep.batch import IGNORE_INDEX, Batch

SourceLosses = dict[str, dict[str, float]]
"""{source: {"nats_per_token": mean over its label tokens, "label_tokens": their number}}"""


@dataclass(frozen=True)
class StepSources:
    """What the sequences of a step are, in the order of its micro-batches; known on the host before the step is."""

    source_ids: list[int]
    label_tokens: list[int]

    def losses(self, names: Sequence[str], sequence_losses: Sequence[float]) -> SourceLosses:
        """The mean of every source that has a label token in the step, in the order of `names`.

        sequence_losses: summed nats of each sequence.
        """
        nats, tokens = [0.0] * len(names), [0] * len(names)
        for source, count, loss in zip(self.source_ids, self.label_tokens, sequence_losses, strict=True):
            nats[source] += loss
            tokens[source] += count
        return {
            name: {"nats_per_token": total / count, "label_tokens": count}
            for name, total, count in zip(names, nats, tokens, strict=True)
            if count
        }


def step_sources(batches: Sequence[Batch]) -> StepSources:
    """The source and the label tokens of every sequence of a step. The batches are the loader's, on the host."""
    return StepSources(
        [source for batch in batches for source in batch.source_ids.tolist()],
        [count for batch in batches for count in (batch.labels != IGNORE_INDEX).sum(1).tolist()],
    )
