"""The training loss of each source, packed or not. In: the summed loss of every sequence of a step. Out: means by source.

A sequence holds documents of one source, so its sum belongs to that source whole. The mean over all label tokens of a step is the
mean of its sources weighted by their label tokens. Weakness: of a source with few label tokens in a step the mean is noise; read
it over many steps, as the console and the report do.
"""

from __future__ import annotations

from collections.abc import Sequence

from steep.order.batches import StepCounts

SourceLosses = dict[str, dict[str, float]]
"""{source: {"nats_per_token": mean over its label tokens, "label_tokens": their number}}"""


def losses_by_source(names: Sequence[str], counts: StepCounts, sequence_losses: Sequence[float]) -> SourceLosses:
    """The mean of every source that has a label token in the step, in the order of `names`.

    sequence_losses: summed nats of each sequence of the step, in the order of `counts`.
    """
    nats, tokens = [0.0] * len(names), [0] * len(names)
    for source, count, loss in zip(counts.sources, counts.label_tokens, sequence_losses, strict=True):
        nats[source] += loss
        tokens[source] += count
    return {
        name: {"nats_per_token": total / count, "label_tokens": count}
        for name, total, count in zip(names, nats, tokens, strict=True)
        if count
    }
