"""How the run will end: the training loss of its last steps, forecast from 15 % of the run on, with a band that holds 90 %.

In: the losses so far and the complete schedule. Out: the expected mean loss of the last 5 % of the steps and a band around it.
Model: over x = log(area under the schedule so far), the loss is a level with a slope, plus B * (rate now / peak rate). The slope
decays at a constant rate (0: a straight line; a constant: a power law) and has random changes, since loss curves are not exact
power laws. The last term falls away when the rate is annealed (Tissue et al. 2024, arXiv:2408.11029). A Kalman filter gives the
posterior for each pair of a grid of decay and random change; the pairs are weighted by their evidence and sampled with a fixed
seed, so a forecast depends on the losses alone. Weakness: the losses say little about B before the rate falls, so early forecasts
rest on an assumption about it (about 2 % of the loss); the model does not know of changes in the mixture.
benchmarks/forecast.py measures how often the band holds.
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
MOST_BINS = 60
DECAYS = (0.0, 0.15, 0.3, 0.6)
"""Rates at which the slope decays over x = log(area): the exponents of power laws; 0 is a straight line."""

WANDERINGS = (3e-2, 1e-1, 3e-1)
"""Standard deviation of the random change of the slope while the area grows e-fold, as a share of the loss."""

ANNEALED_RATIO, ANNEALED_DEVIATION_RATIO = 0.02, 0.02
"""Prior of B as a share of the loss: what annealing to 0 gains. Published curves have 1 to 4 % (arXiv:2408.11029)."""

WIDENING = 1.25
"""Of the band, so that it holds as often as stated: set on runs of benchmarks/forecast.py, measured on other runs."""

SAMPLES = 4000
REFRESH_STEPS_RATIO = 0.005
"""The share of the run after which a forecast is made again."""


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
    """The mean loss of the last 5 % of the steps. None while there are too few losses after the warmup.

    losses: (steps so far,) nats per token, NaN where a step has none. rates: (all steps,) the schedule's multipliers, up to 1.
    """
    known = np.flatnonzero(np.isfinite(losses))
    known = known[known >= warmup]
    if len(known) < FEWEST_LOSSES:
        return None
    log_area = np.log(np.maximum(np.cumsum(rates), 1e-9))  # (steps,): x_t = log sum of rates up to t
    ends = last_steps(len(rates))
    left = ends[ends >= len(losses)]
    measured = float(np.nansum(losses[ends[ends < len(losses)]]))
    noise = _noise_variance(losses[known])
    around = np.lib.stride_tricks.sliding_window_view(np.pad(losses[known], 4, mode="edge"), 9)
    known = known[losses[known] - np.median(around, axis=1) <= 6 * np.sqrt(noise)]  # without spikes
    edges = np.linspace(log_area[known[0]], log_area[known[-1]], MOST_BINS + 1)[1:-1]  # of equal width in x
    bins = [part for part in np.split(known, np.searchsorted(log_area[known], edges)) if len(part)]
    points = np.array(  # (bins, 4): x, rate, loss, variance of the mean loss
        [[log_area[part].mean(), rates[part].mean(), losses[part].mean(), noise / len(part)] for part in bins]
    )
    evidence, means, deviations = [], [], []
    for decay in DECAYS:
        for wandering in WANDERINGS:
            mean, covariance, log_likelihood = _filtered(points, decay, wandering)
            total, variance = _carried(mean, covariance, points[-1, 0], log_area[left], rates[left], decay, wandering)
            evidence.append(log_likelihood)
            means.append(total)
            deviations.append(np.sqrt(variance + len(left) * noise))
    weights = np.exp(np.array(evidence) - max(evidence))  # p(pair | losses), up to a factor
    generator = np.random.default_rng(0)
    which = generator.choice(len(weights), SAMPLES, p=weights / weights.sum())
    drawn = np.array(means)[which] + WIDENING * np.array(deviations)[which] * generator.standard_normal(SAMPLES)
    low, expected, high = np.quantile((measured + drawn) / len(ends), [(1 - BAND) / 2, 0.5, (1 + BAND) / 2])
    return Forecast(float(expected), float(low), float(high))


def _filtered(points: Numbers, decay: float, wandering: float) -> tuple[Numbers, Numbers, float]:
    """The state s = (level, slope, B) after all points: its mean (3,) and covariance (3, 3), and log p(losses) up to a constant.

    points: (bins, 4) of x, rate, loss and the variance of the loss.
    """
    loss = float(points[0, 2])
    mean = np.array([loss, 0.0, ANNEALED_RATIO * loss])
    covariance = np.diag([loss, loss, ANNEALED_DEVIATION_RATIO * loss]) ** 2
    evidence, before = 0.0, points[0, 0]
    for x, rate, value, variance in points:
        mean, covariance = _moved(mean, covariance, x - before, decay, wandering * loss)
        seen = np.array([1.0, 0.0, rate])  # H: loss = level + rate * B + noise
        spread = float(seen @ covariance @ seen) + variance  # S = H P H' + r
        surprise = value - float(seen @ mean)  # e = y - H m
        evidence -= 0.5 * (surprise**2 / spread + np.log(spread))  # log N(e; 0, S)
        gain = covariance @ seen / spread  # K = P H' / S
        mean, covariance, before = mean + gain * surprise, covariance - np.outer(gain, seen @ covariance), x
    return mean, covariance, evidence


def _moved(mean: Numbers, covariance: Numbers, far: float, decay: float, wandering: float) -> tuple[Numbers, Numbers]:
    """The state `far` further in x: m' = F m, P' = F P F' + Q."""
    # slope(x + u) = slope * exp(-decay * u); level grows by its integral, (1 - exp(-decay * far)) / decay
    reach = far if decay == 0 else (1 - np.exp(-decay * far)) / decay
    step = np.array([[1.0, reach, 0.0], [0.0, np.exp(-decay * far), 0.0], [0.0, 0.0, 1.0]])
    drift = np.zeros((3, 3))  # Q of a slope that is a random walk: wandering^2 * [[u^3/3, u^2/2], [u^2/2, u]]
    drift[:2, :2] = wandering**2 * np.array([[far**3 / 3, far**2 / 2], [far**2 / 2, far]])
    return step @ mean, step @ covariance @ step.T + drift


def _carried(
    mean: Numbers, covariance: Numbers, x: float, later: Numbers, rates: Numbers, decay: float, wandering: float
) -> tuple[float, float]:
    """From the state at x to mean and variance of the sum of the losses at later x, without the noise of single steps.

    They lie close together, so their mean stands for all: sum = n * level + sum(rates) * B.
    """
    if not len(later):
        return 0.0, 0.0
    level = wandering * float(mean[0])
    mean, covariance = _moved(mean, covariance, float(later.mean()) - x, decay, level)
    target = np.array([len(later), 0.0, rates.sum()])
    return float(target @ mean), float(target @ covariance @ target)


def last_steps(total_steps: int) -> NDArray[np.int64]:
    """The steps whose mean loss is forecast."""
    count = max(1, round(LAST_RATIO * total_steps))
    return np.arange(total_steps - count, total_steps)


def _noise_variance(losses: Numbers) -> float:
    """Of a single step, from the differences of neighbours, which a slow curve hardly touches. Spikes count as 5 deviations."""
    differences = np.abs(np.diff(losses))
    most = 5 * 1.4826 * float(np.median(differences))
    variance = float(np.mean(np.minimum(differences, most) ** 2)) / 2
    return max(variance, (1e-4 * float(np.mean(losses))) ** 2, 1e-12)
