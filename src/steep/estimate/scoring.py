"""What scoring the held-out texts costs, and how much of them is scored where the run leaves that to steep.

In: the evaluate section, the sizes of the run, its held-out texts. Out: tokens, and their share of the work of training. Counted
in tokens, so that the choice follows from the configuration alone: a forward pass is a third of the work of a training step, half
of it where most weights are frozen. Weakness: padding and the end-of-text audit are counted at their upper bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steep.config.run import RunConfig
from steep.data.held_out_text import HeldOutText
from steep.estimate.automatic import AUTO
from steep.evaluation.config import EvaluateConfig
from steep.order.batches import Sizes

MOST_TOKENS = 200_000
"""Of each text, where nothing else is asked for: the error of a change is then a few tenths of a per cent."""
SCORING_RATIO = 0.1
"""What scoring by default may cost, of the work of training."""
FORWARD_RATIO, FROZEN_FORWARD_RATIO = 1 / 3, 1 / 2
"""The work of a forward pass, of a step that trains all weights or few (PaLM's 2 of 6 operations per parameter; 2 of 4)."""
FEWEST_TOKENS = 2


@dataclass(frozen=True)
class ScoringPlan:
    """How often what is scored."""

    evaluations: int
    """The start and the end included."""
    texts: int
    tokens: int
    """Of all texts, each time."""
    ratio: float
    """Of the work of training."""

    def to_mapping(self) -> dict[str, float]:
        """As JSON values: `scoring` of plan.json."""
        return {"evaluations": self.evaluations, "tokens": self.tokens, "ratio": self.ratio}


def interval_steps(settings: EvaluateConfig, steps: int) -> int | None:
    """Steps between two evaluations in a run of `steps`; None for none but the start and the end."""
    if settings.every_ratio is not None:
        return max(1, round(settings.every_ratio * steps))
    return settings.every_steps


def choose_tokens(config: RunConfig, sizes: Sizes, texts: Sequence[HeldOutText]) -> tuple[int, str]:
    """`evaluate.tokens` where it is auto, and why, in a line that is empty where nothing is cut for the time it takes.

    The audit of ends of text reads at most half as much again, at the start and the end (`end_of_text.measure_stops`).
    """
    evaluations = _evaluations(config.evaluate, sizes.steps)
    # reckoned as tokens that are trained: the time of tiny models is not arithmetic, and scoring them is hardly faster
    left, tokens = SCORING_RATIO * sizes.total_sequences * sizes.sequence_length / (evaluations + 1), 0
    lengths = sorted(min(MOST_TOKENS, text.num_tokens) for text in texts)
    for number, length in enumerate(lengths):  # what short texts leave goes to the longer ones
        tokens = min(length, int(left / (len(lengths) - number)))
        left -= tokens
    tokens = max(FEWEST_TOKENS, tokens)
    if not lengths or tokens >= lengths[-1]:
        return MOST_TOKENS, ""
    return tokens, (
        f"evaluate.tokens auto: {tokens:,} of each text, so that scoring {evaluations} times takes at most a tenth of the time "
        "of training; set a number to score more"
    )


def plan_scoring(config: RunConfig, sizes: Sizes, texts: Sequence[HeldOutText], partly_frozen: bool) -> ScoringPlan:
    """What scoring costs. config: with `evaluate.tokens` chosen. partly_frozen: whether not all weights are trained."""
    limit = MOST_TOKENS if config.evaluate.tokens == AUTO else int(config.evaluate.tokens)
    tokens = sum(min(limit, text.num_tokens, text.most_tokens or limit) for text in texts)
    evaluations = _evaluations(config.evaluate, sizes.steps)
    forward = FROZEN_FORWARD_RATIO if partly_frozen else FORWARD_RATIO
    trained = max(1, sizes.total_sequences * sizes.sequence_length)
    return ScoringPlan(evaluations, len(texts), tokens, forward * evaluations * tokens / trained)


def _evaluations(settings: EvaluateConfig, steps: int) -> int:
    every = interval_steps(settings, steps)
    return 2 + (0 if every is None else max(0, steps - 1) // every)
