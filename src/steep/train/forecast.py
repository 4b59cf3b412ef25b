"""How the run will end: the training loss of its last steps, expected from 15 % of the run on, with a band for 90 %.

In: the losses so far and the whole schedule. Out: an expected mean loss over the last 20th of the steps and the band around it.
Model: loss = floor + A * (area under the schedule so far)^-alpha + B * (rate now over its peak), after Tissue et al. 2024
(arXiv:2408.11029), where the last term is what falls away when the rate is annealed. For each alpha of a grid the three others
have a normal posterior; those posteriors are weighted by their evidence and sampled with a seed of their own, so that a forecast
depends on the losses alone. Weakness: B is hardly seen before the rate falls, so an assumption about it (some 2 % of the loss)
carries early forecasts; nothing is known of a mixture that changes or of texts that are seen again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steep.optim.config import ScheduleConfig
from steep.optim.schedule import multiplier, warmup_steps

Numbers = NDArray[np.float64]

FIRST_RATIO, BAND, LAST_RATIO = 0.15, 0.90, 0.05
FEWEST_LOSSES = 8
MOST_BINS = 120
ALPHAS = np.array([0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.5])
ANNEALED_RATIO, ANNEALED_DEVIATION_RATIO = 0.02, 0.02
"""Prior of B over the loss: what annealing to nothing gains. Published curves have 1 to 4 %."""

SAMPLES = 4000
REFRESH_STEPS_RATIO = 0.005
"""A forecast is made again after so much of the run."""


@dataclass(frozen=True)
class Forecast:
    """Nats per token over the last steps."""

    expected: float
    low: float
    high: float


class Forecaster:
    """Adds a forecast to the training lines of a run."""

    def __init__(self, total_steps: int, schedule: ScheduleConfig, earlier: Iterable[Mapping[str, Any]] = ()):
        self._total_steps = total_steps
        self._rates = np.array([multiplier(step, total_steps, schedule) for step in range(total_steps)])
        self._warmup = warmup_steps(total_steps, schedule)
        self._losses = np.full(total_steps, np.nan)
        self._newest: Forecast | None = None
        self._made_at = -1
        for record in earlier:  # of every kind: a resumed run has lines
            if record.get("kind") == "train":
                self._take(record)

    def observe(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The records, those from 15 % of the run on with `forecast_loss`, `forecast_low` and `forecast_high`."""
        return [record | self._fields(record) for record in records]

    def _take(self, record: Mapping[str, Any]) -> int:
        step, loss = int(record.get("step", -1)), record.get("loss")
        if 0 <= step < self._total_steps and isinstance(loss, (int, float)) and not record.get("skipped"):
            self._losses[step] = loss
        return step

    def _fields(self, record: Mapping[str, Any]) -> dict[str, float]:
        step = self._take(record)
        first = math.ceil(FIRST_RATIO * self._total_steps) - 1
        if step < first:
            return {}
        apart = max(1, round(REFRESH_STEPS_RATIO * self._total_steps))
        made_at = max(first, step - step % apart)  # the same steps in a process that has resumed
        if made_at != self._made_at:
            self._newest = forecast(self._losses[: made_at + 1], self._rates, self._warmup)
            self._made_at = made_at
        found = self._newest
        return {} if found is None else {
            "forecast_loss": found.expected, "forecast_low": found.low, "forecast_high": found.high
        }  # fmt: skip


def forecast(losses: Numbers, rates: Numbers, warmup: int = 0) -> Forecast | None:
    """What the mean loss of the last 20th of the steps will be. None while there are too few losses after the warmup.

    losses: (steps so far,) nats per token, NaN where a step has none. rates: (all steps,) the schedule's multipliers, up to 1.
    """
    known = np.flatnonzero(np.isfinite(losses))
    known = known[known >= warmup]
    if len(known) < FEWEST_LOSSES:
        return None
    area = np.cumsum(rates)
    ends = last_steps(len(rates))
    noise = _noise_variance(losses[known])
    bins = np.array_split(known, min(MOST_BINS, len(known)))
    values = np.array([losses[part].mean() for part in bins])
    counts = np.array([len(part) for part in bins], dtype=float)
    level = float(np.mean(values))
    measured = float(np.nansum(losses[ends[ends < len(losses)]]))
    left = ends[ends >= len(losses)]
    evidence, means, spreads = [], [], []
    for alpha in ALPHAS:
        power = (area / area[-1]) ** -alpha
        design = np.array([[1.0, power[part].mean(), rates[part].mean()] for part in bins])
        found = _posterior(design, values, counts / noise, level)
        target = np.array([float(len(left)), power[left].sum(), rates[left].sum()])
        evidence.append(found[0])
        means.append(float(target @ found[1]))
        spreads.append(float(target @ found[2] @ target))
    weights = np.exp(np.array(evidence) - max(evidence))
    weights /= weights.sum()
    generator = np.random.default_rng(0)
    which = generator.choice(len(ALPHAS), SAMPLES, p=weights)
    deviation = np.sqrt(np.maximum(np.array(spreads), 0.0) + len(left) * noise)
    drawn = np.array(means)[which] + deviation[which] * generator.standard_normal(SAMPLES)
    totals = (measured + drawn) / len(ends)
    low, expected, high = np.quantile(totals, [(1 - BAND) / 2, 0.5, (1 + BAND) / 2])
    return Forecast(float(expected), float(low), float(high))


def last_steps(total_steps: int) -> NDArray[np.int64]:
    """The steps whose mean loss is forecast."""
    count = max(1, round(LAST_RATIO * total_steps))
    return np.arange(total_steps - count, total_steps)


def _noise_variance(losses: Numbers) -> float:
    """Of a single step, from the differences of neighbours, which a slow curve hardly touches; robust against spikes."""
    differences = np.abs(np.diff(losses))
    deviation = 1.4826 * float(np.median(differences)) / np.sqrt(2)
    return max(deviation, 1e-4 * abs(float(np.mean(losses))), 1e-12) ** 2


def _posterior(design: Numbers, values: Numbers, precision: Numbers, level: float) -> tuple[float, Numbers, Numbers]:
    """Log evidence, mean and covariance of (floor, A, B) under priors that only B feels."""
    prior_mean = np.array([level, 0.0, ANNEALED_RATIO * level])
    prior_deviation = np.array([level, level, ANNEALED_DEVIATION_RATIO * level])
    prior_precision = np.diag(prior_deviation**-2)
    information = design.T @ (design * precision[:, None])
    covariance = np.linalg.inv(information + prior_precision)
    mean = covariance @ (design.T @ (precision * values) + prior_precision @ prior_mean)
    residuals, shift = values - design @ mean, mean - prior_mean
    fit = float(precision @ residuals**2 + shift @ prior_precision @ shift)
    sizes = np.linalg.slogdet(covariance)[1] - 2 * np.log(prior_deviation).sum()
    return 0.5 * (float(sizes) - fit), mean, covariance
