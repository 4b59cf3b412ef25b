"""The error of a change between two scores of one text. In: the nats of its parts before and after. Out: resampled changes.

The bootstrap (Efron 1979), paired: both models on the same parts of the text (`Score.part_nats`), drawn with replacement. The
error is half of the interval that holds 95 % of the changes. Weaknesses: it is the error of the choice of text and of nothing
else, so another run may differ by more; of blocks of few documents it says how evenly these changed, not how others would; and
with few parts it is too small, by about a tenth with eight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES, RESAMPLED_INTERVAL = 2000, 0.95
FEWEST_PARTS = 8
"""A text of fewer parts says nothing about the error of its change."""


def resampled_ratios(before: Sequence[float], after: Sequence[float]) -> NDArray[np.float64] | None:
    """(RESAMPLES,) relative changes of texts made of the parts drawn with replacement; the draws are always the same.

    before, after: nats of each part, `Score.part_nats`. Where two tokenizers gave unequal numbers of parts, neighbours are
    joined. None where a side has no parts; infinite where they are fewer than FEWEST_PARTS.
    """
    number = min(len(before), len(after))
    if not number:
        return None
    if number < FEWEST_PARTS:
        return np.full(RESAMPLES, math.inf)
    sides = [np.array(side) for side in (before, after)]
    old, new = (np.bincount(np.arange(len(side)) * number // len(side), side, minlength=number) for side in sides)
    drawn = np.random.default_rng(0).multinomial(
        number, np.full(number, 1 / number), size=RESAMPLES
    )  # (RESAMPLES, parts)
    base = drawn @ old
    return np.where(base > 0, drawn @ new / np.where(base > 0, base, 1.0) - 1.0, 0.0)


def error_of(ratios: NDArray[np.float64] | None) -> float | None:
    """Half of the interval that holds most of the resampled changes."""
    if ratios is None:
        return None
    if not np.isfinite(ratios).all():
        return math.inf
    low, high = np.quantile(ratios, [(1 - RESAMPLED_INTERVAL) / 2, (1 + RESAMPLED_INTERVAL) / 2])
    return float(high - low) / 2
