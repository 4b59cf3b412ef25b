"""Which source gives slot n of a run, in exact integers: a mixture by weights, with phases.

Source s with weight w emits its j-th sequence (from 0) at time (j + phase(s)) / w, and slot n is the n-th event over all
sources: stride scheduling (Waldspurger and Weihl 1995), with phases from van der Corput's sequence (1/2, 1/4, 3/4, 1/8, ...), so
that sources of equal weight take turns instead of coming all at once. Counts of the first n slots are known for any n at once,
never fall, and stay within three sequences of n * w / sum(w). A phase of the run begins at a slot and continues where each source
stands, so a new phase never changes the past. Weakness: the pattern of sources is regular, not random.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

BLOCK_SLOTS = 128
TURNS = 1 << 16
"""The phase of a source is a whole number of 1/TURNS of a turn; TURNS - 1 sources have different ones."""


def integer_weights(weights: Sequence[float | int | str]) -> list[int]:
    """The same proportions in whole numbers without a common divisor; 0.95 is read as decimal, not as a binary fraction.

    Raises ValueError for a negative weight, or if none is above zero.
    """
    fractions = [Fraction(str(weight)) for weight in weights]
    if any(weight < 0 for weight in fractions) or not any(fractions):
        raise ValueError(f"weights {list(weights)}: none may be negative and one must be above zero")
    scale = math.lcm(*(weight.denominator for weight in fractions))
    whole = [int(weight * scale) for weight in fractions]
    divisor = math.gcd(*whole)
    return [weight // divisor for weight in whole]


def turn_of(source: int) -> int:
    """The phase of a source in parts of a turn: the bits of its number (from 1) in reverse, behind the point."""
    return int(f"{source % (TURNS - 1) + 1:016b}"[::-1], 2)


class SourceTurns:
    """The order of the sources for fixed weights. weights: whole numbers, at least one above zero."""

    def __init__(self, weights: Sequence[int]):
        self.weights = list(weights)
        self._total = sum(weights)
        self._turns = [turn_of(source) for source in range(len(weights))]

    def counts(self, slots: int) -> list[int]:
        """How many of the first `slots` slots each source has."""
        # source s has floor(t * w_s - phase_s) + 1 events up to time t = slots / sum(w), those with (j + phase_s) / w_s <= t;
        # they add up to nearly `slots`, and the events next to t settle the rest
        counts = [
            (slots * weight * TURNS - turn * self._total) // (self._total * TURNS) + 1 if weight else 0
            for weight, turn in zip(self.weights, self._turns, strict=True)
        ]
        shared = [source for source, weight in enumerate(self.weights) if weight]
        while (excess := sum(counts) - slots) > 0:
            counts[max((self._time(s, counts[s] - 1), s) for s in shared if counts[s])[1]] -= 1
        for _ in range(-excess):
            counts[min((self._time(s, counts[s]), s) for s in shared)[1]] += 1
        return counts

    def events(self, first: int, slots: int) -> list[tuple[int, int]]:
        """(source, number of sequences of it that came before) of slots first .. first + slots - 1."""
        counts = self.counts(first)
        # times (j + phase_s) / w_s in whole numbers: multiplied by lcm(w) * TURNS
        scale = math.lcm(*(weight for weight in self.weights if weight))
        steps = [scale // weight if weight else 0 for weight in self.weights]
        heap = [((counts[s] * TURNS + self._turns[s]) * step, s) for s, step in enumerate(steps) if step]
        heapq.heapify(heap)
        found = []
        for _ in range(slots):
            time, source = heap[0]
            found.append((source, counts[source]))
            counts[source] += 1
            heapq.heapreplace(heap, (time + TURNS * steps[source], source))
        return found

    def _time(self, source: int, before: int) -> Fraction:
        """When a source emits its sequence number `before`: (before + phase) / weight."""
        return Fraction(before * TURNS + self._turns[source], self.weights[source])


@dataclass(frozen=True)
class Phase:
    """From slot `start` on, sources are taken by `weights`."""

    start: int
    weights: tuple[int, ...]


class Mixture:
    """The sources of all slots over the phases of a run. phases: the first begins at slot 0, starts rise.

    Raises ValueError where they do not.
    """

    def __init__(self, phases: Sequence[Phase]):
        starts = [phase.start for phase in phases]
        if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            raise ValueError(
                f"phases begin at slots {starts}; the first must begin at 0, and each after the one before it"
            )
        self.phases = list(phases)
        self._starts = starts
        self._turns = [SourceTurns(phase.weights) for phase in phases]
        self._before = [[0] * len(phases[0].weights)]
        for turns, (start, stop) in zip(self._turns, pairwise(starts), strict=False):
            counts = turns.counts(stop - start)
            self._before.append([a + b for a, b in zip(self._before[-1], counts, strict=True)])
        self._events = lru_cache(maxsize=256)(lambda phase, first: self._turns[phase].events(first, BLOCK_SLOTS))

    def slot(self, n: int) -> tuple[int, int]:
        """(source, number of that source's sequence, from 0 on over the whole run) of slot n."""
        phase = bisect_right(self._starts, n) - 1
        within = (n - self._starts[phase]) % BLOCK_SLOTS
        source, number = self._events(phase, n - self._starts[phase] - within)[within]
        return source, self._before[phase][source] + number

    def counts(self, slots: int) -> list[int]:
        """How many of the first `slots` slots each source has."""
        phase = max(0, bisect_right(self._starts, slots - 1) - 1)
        counts = self._turns[phase].counts(max(0, slots - self._starts[phase]))
        return [a + b for a, b in zip(self._before[phase], counts, strict=True)]

    def slots_until(self, source: int, sequences: int) -> int | None:
        """The fewest slots that hold `sequences` of `source`; None if its share ends before that."""
        low, high = 0, max(1, self._starts[-1])
        while self.counts(high)[source] < sequences:
            if high > self._starts[-1] and self.phases[-1].weights[source] == 0:
                return None
            high *= 2
        while low < high:
            middle = (low + high) // 2
            if self.counts(middle)[source] < sequences:
                low = middle + 1
            else:
                high = middle
        return low
