"""Several datasets as one, in Megatron's order. In: weights and a size. Out: for every position a dataset and one of its samples.

Position s goes to the dataset that is furthest behind its share: the first largest of `weight * max(s, 1) - taken`, in float64.
Each position depends on the one before, so Megatron runs a compiled loop. Here many parts of the sequence run side by
side from guessed states; a part whose start differs from the end of the part before it runs again from there, until all
agree. Agreement is checked exactly, so the result is that of the loop, bit for bit, whatever the guesses were.
Weakness: weights for which a wrong guess takes long to wear off need more rounds, at worst one per part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_DATASETS = 32_766  # dataset numbers are int16 in Megatron's files
_MOST_PARTS = 1024
_SHORTEST_PART = 2048
_PART_CELLS = 200_000  # parts times datasets that stay in a core's cache
_COMPARE_EVERY = 64


def samples_per_dataset(weights: Sequence[float], size: int, surplus: float = 0.0) -> list[int]:
    """Samples that each dataset gives to a blend of `size`; with `surplus`, how many it is built for. weights: add up to 1."""
    # ceil(ceil(size * w) * (1 + surplus)), as Megatron rounds twice
    return [math.ceil(math.ceil(size * weight) * (1 + surplus)) for weight in weights]


def blend_by_weights(weights: Sequence[float], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """The dataset of each of `size` positions and its sample there. weights: (datasets,), add up to 1."""
    datasets = _greedy(np.asarray(weights, dtype=np.float64), size, None)
    return datasets, sample_numbers(datasets, len(weights))


def blend_all(sizes: Sequence[int]) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Every sample of every dataset once, in proportion to their sizes while each lasts. sizes: (datasets,)."""
    limits = np.asarray(sizes, dtype=np.int64)
    total = int(limits.sum())
    datasets = _greedy(limits / float(total), total, limits.astype(np.float64))
    return datasets, sample_numbers(datasets, len(sizes))


def sample_numbers(datasets: NDArray[np.int16], num_datasets: int) -> NDArray[np.int64]:
    """For each position how often its dataset came before."""
    counts = np.bincount(datasets, minlength=num_datasets)
    samples = np.empty(len(datasets), dtype=np.int64)
    firsts = np.cumsum(counts) - counts
    samples[np.argsort(datasets, kind="stable")] = np.arange(len(datasets)) - np.repeat(firsts, counts)
    return samples


def _greedy(weights: NDArray[np.float64], size: int, limits: NDArray[np.float64] | None) -> NDArray[np.int16]:
    """The datasets of positions 0..size-1; with `limits`, the most samples that each dataset gives."""
    if not size:
        return np.empty(0, dtype=np.int16)
    most = max(1, min(_MOST_PARTS, _PART_CELLS // len(weights), size // _SHORTEST_PART))
    length = -(-size // most)
    starts = np.arange(0, size, length, dtype=np.int64)
    chosen = np.zeros((length, len(starts)), dtype=np.int16)  # the last part may run over the end; that is cut off
    begin = _guess(weights, starts)
    run = _Parts(weights, limits, starts, chosen)
    end = run.first(begin)
    while True:
        wrong = np.flatnonzero((begin[1:] != end[:-1]).any(axis=1)) + 1
        if not len(wrong):
            return np.ascontiguousarray(chosen.T).reshape(-1)[:size]
        correct = end[wrong - 1]
        end[wrong] += run.again(wrong, begin[wrong], correct)
        begin[wrong] = correct


def _guess(weights: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(parts, datasets) samples given before each start, if shares were met as closely as whole numbers allow."""
    ideal = starts[:, None] * weights[None, :]
    taken = np.floor(ideal)
    missing = starts - taken.sum(axis=1).astype(np.int64)
    largest_first = np.argsort(taken - ideal, axis=1, kind="stable")
    rank = np.empty_like(largest_first)
    np.put_along_axis(rank, largest_first, np.arange(len(weights))[None, :], axis=1)
    return taken + (rank < missing[:, None])


@dataclass
class _Parts:
    """Parts of the sequence that run side by side; `chosen` (steps, parts) receives their datasets."""

    weights: NDArray[np.float64]
    limits: NDArray[np.float64] | None
    starts: NDArray[np.int64]
    chosen: NDArray[np.int16]

    def first(self, begin: NDArray[np.float64]) -> NDArray[np.float64]:
        """Run all parts from the counts `begin`, (parts, datasets); returns the counts at their ends."""
        taken = begin.copy()
        rows = np.arange(len(taken))
        positions = self.starts.astype(np.float64)
        errors = np.empty_like(taken)
        for step in range(len(self.chosen)):
            picked = self._pick(positions, taken, errors)
            taken[rows, picked] += 1.0
            self.chosen[step] = picked
            positions += 1.0
        return taken

    def again(
        self, parts: NDArray[Any], before: NDArray[np.float64], begin: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Run some parts again from `begin` instead of `before`, (those parts, datasets), until they meet the earlier run.

        Returns by how much the counts at the end of each part changed.
        """
        changes = np.zeros_like(begin)
        active = np.arange(len(parts))
        taken, difference = begin.copy(), begin - before
        for step in range(len(self.chosen)):
            if step % _COMPARE_EVERY == 0:
                apart = (difference != 0).any(axis=1)
                if not apart.any():
                    return changes
                if not apart.all():
                    active, taken, difference = active[apart], taken[apart], difference[apart]
                rows, errors = np.arange(len(active)), np.empty_like(taken)
                columns = parts[active]
            picked = self._pick((self.starts[columns] + step).astype(np.float64), taken, errors)
            taken[rows, picked] += 1.0
            difference[rows, picked] += 1.0
            difference[rows, self.chosen[step, columns]] -= 1.0
            self.chosen[step, columns] = picked
        changes[active] = difference
        return changes

    def _pick(
        self, positions: NDArray[np.float64], taken: NDArray[np.float64], errors: NDArray[np.float64]
    ) -> NDArray[np.intp]:
        """The first dataset of each part that is furthest behind: two roundings, a product and a difference, as in C++."""
        # errors_PD = max(s_P, 1) * weights_D - taken_PD, P parts and D datasets
        np.multiply(np.maximum(positions, 1.0)[:, None], self.weights, out=errors)
        np.subtract(errors, taken, out=errors)
        if self.limits is not None:
            np.putmask(errors, taken >= self.limits, -np.inf)
        return errors.argmax(axis=1)
