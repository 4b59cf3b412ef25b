"""The learning rate over a run, as a pure function of the step. No torch.

In: a step (0 is the first update), the number of steps, a ScheduleConfig. Out: the factor on the peak learning rate.
With W warmup steps of S: step t < W has (t + 1) / (W + 1), so that no update has rate 0 and step W has the peak;
after that the factor falls from 1 at step W to `final_ratio` at step S - 1, the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from steep.optim.config import ScheduleConfig

DEFAULT_WARMUP_RATIO = 0.01


def multiplier(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """The factor on the learning rate at `step` in [0, total_steps). Later steps keep the last value.

    A warmup as long as the run never reaches the peak; where one step is left after it, that step has the peak.
    """
    step = min(step, total_steps - 1)
    warmup = warmup_steps(total_steps, config)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.name == "constant":
        return 1.0
    if config.name == "wsd":
        return _wsd(step, total_steps, warmup, config)
    last = total_steps - 1
    progress = (step - warmup) / (last - warmup) if last > warmup else 0.0
    if (
        config.name == "inverse_sqrt"
    ):  # 1 / sqrt(1 + t / tau), tau such that the last step, t = progress 1, has the final ratio
        return 1.0 / math.sqrt(1.0 + progress * (config.final_ratio**-2 - 1.0))
    return _between(_SHAPES[config.name](progress), config.final_ratio)


def warmup_steps(total_steps: int, config: ScheduleConfig) -> int:
    """Steps of the linear warmup: as given, or the ratio of the run rounded to whole steps; at most the whole run."""
    if config.warmup_steps is not None:
        return min(config.warmup_steps, total_steps)
    ratio = DEFAULT_WARMUP_RATIO if config.warmup_ratio is None else config.warmup_ratio
    return min(round(ratio * total_steps), total_steps)


def cooldown_start(total_steps: int, config: ScheduleConfig) -> int:
    """`wsd`: the first step of the cooldown, which takes at least one step and never overlaps the warmup."""
    steps = max(1, round(config.decay_ratio * total_steps))
    return max(warmup_steps(total_steps, config), total_steps - steps)


_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    # half a cosine wave from 1 to 0: Loshchilov & Hutter, arXiv:1608.03983
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    # the cooldown with the lowest final loss in Hägele et al., arXiv:2405.18392
    "one_minus_sqrt": lambda progress: 1.0 - math.sqrt(progress),
}


def _between(shape: float, final_ratio: float) -> float:
    return final_ratio + (1.0 - final_ratio) * shape


def _wsd(step: int, total_steps: int, warmup: int, config: ScheduleConfig) -> float:
    """Warmup, stable, decay: constant until the cooldown, whose last step has `final_ratio`. Source: arXiv:2404.06395."""
    start = cooldown_start(total_steps, config)
    if step < start or total_steps - 1 == warmup:
        return 1.0
    progress = (step - start + 1) / (total_steps - start)
    return _between(_SHAPES[config.decay_shape](progress), config.final_ratio)
