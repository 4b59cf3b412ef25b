"""Whether the micro-batch that the plan chose fits a GPU, tried before step 0. In: an engine and sizes. Out: sizes that fit.

The plan's memory is arithmetic. So the passes of a step are made once without an update, while as much memory is held as the
optimizer will take. A micro-batch that does not fit is replaced by the next smaller one. The tokens are made up, so no data is
read; nothing is updated, and the run seeds its random numbers afterwards. Weakness: kernels that choose their scratch memory by
the lengths of documents may need more in a later step, which is then an error: a run never changes its sizes while it trains.
"""

from __future__ import annotations

import gc
from dataclasses import replace

import torch

from steep.batch import Batch, StepBatches
from steep.core.say import Say
from steep.order.batches import Sizes, StepCounts
from steep.training.engine import Engine


def sizes_that_fit(engine: Engine, sizes: Sizes, vocabulary: int, held_bytes: int, say: Say) -> Sizes:
    """The sizes with the largest micro-batch, from that of `sizes` down, that fits; said where it is smaller.

    vocabulary: every token id below it is valid. held_bytes: of the optimizer's state. Where not even one sequence fits, sizes of
    one sequence, with which step 0 raises the error.
    """
    wanted = sizes.micro_batch_size
    while not engine.rehearse(_step(sizes, vocabulary), held_bytes):
        gc.collect()  # what the failed pass left
        torch.cuda.empty_cache()
        smaller = [n for n in sizes.micro_batch_sizes if n < sizes.micro_batch_size]
        if not smaller:
            break
        sizes = replace(sizes, micro_batch_size=smaller[-1])
    if sizes.micro_batch_size != wanted:
        say(
            f"micro_batch_size auto: {sizes.micro_batch_size}, since {wanted} ran out of memory in a trial without an update"
        )
    return sizes


def _step(sizes: Sizes, vocabulary: int) -> StepBatches:
    """Sequences that are one document each, in at most two micro-batches, since the others take no more memory."""
    rows, length = sizes.micro_batch_size, sizes.sequence_length
    ids = (torch.arange(rows * (length + 1)) % vocabulary).view(rows, length + 1)
    batch = Batch(
        input_ids=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        position_ids=torch.arange(length).repeat(rows, 1),
        cu_seqlens=torch.arange(0, rows * length + 1, length, dtype=torch.int32),
        max_seqlen=length,
        source_ids=torch.zeros(rows, dtype=torch.int32),
    )
    passes = min(2, sizes.grad_accum_steps)
    counts = [length] * (rows * passes)
    return StepBatches([batch] * passes, StepCounts(length, [0] * len(counts), counts, counts))
