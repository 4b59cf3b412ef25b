"""What is done to a curve before it is drawn: points from records, smoothing, and fewer points with the same shape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any


@dataclass(frozen=True)
class Curve:
    """The points of one metric: `steps` ascending, `values` finite."""

    steps: Sequence[float]
    values: Sequence[float]

    def __bool__(self) -> bool:
        return bool(self.steps)


def curve(records: Iterable[Mapping[str, Any]], name: str) -> Curve:
    """The finite values of a metric over the steps. Records without the metric are left out."""
    points = [(record["step"], record[name]) for record in records if _is_number(record.get(name))]
    return Curve([step for step, _ in points], [value for _, value in points])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def smoothing_window(num_points: int) -> int:
    """How many neighbouring points are averaged: a thirtieth of all points, at least 5, made odd."""
    return max(5, num_points // 30) | 1


def smooth(points: Curve, window: int) -> Curve:
    """The centred moving mean: of each point and its neighbours on both sides, so that the curve does not lag behind the points.

    window: odd. Near the ends, where neighbours are missing on one side, the mean is over those that exist: smooth, but
    lagging there.
    """
    sums = [0.0, *accumulate(points.values)]
    values, last = [], len(points.values) - 1
    for index in range(len(points.values)):
        start, stop = max(0, index - window // 2), min(last, index + window // 2) + 1
        values.append((sums[stop] - sums[start]) / (stop - start))
    return Curve(points.steps, values)


def downsample(points: Curve, max_points: int = 2000) -> Curve:
    """At most `max_points` points: the lowest and the highest of each interval, so that no spike disappears."""
    count = len(points.steps)
    if count <= max_points:
        return points
    buckets = max_points // 2
    kept: list[int] = []
    for bucket in range(buckets):
        stretch = range(bucket * count // buckets, (bucket + 1) * count // buckets)
        low = min(stretch, key=points.values.__getitem__)
        high = max(stretch, key=points.values.__getitem__)
        kept.extend(sorted({low, high}))
    return Curve([points.steps[index] for index in kept], [points.values[index] for index in kept])
