"""What the run did to the model, in words: the gain on its own text against the loss on other text.

Everything is in bits per byte, relative to the score before the first update. Thresholds: a change under half a
per cent is called none (two evaluations of the same weights differ by nothing; half a per cent is below what a reader
would act on); a loss of more than two per cent on general text is called forgetting, the cap of reference/cpt.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NO_CHANGE_RATIO = 0.005
FORGETTING_RATIO = 0.02


@dataclass(frozen=True)
class TextChange:
    """The score of one held-out text before and after, in bits per byte (nats per token where bytes are unknown)."""

    text: str
    before: float
    after: float
    unit: str

    @property
    def ratio(self) -> float:
        """Relative change; negative is better."""
        return (self.after - self.before) / self.before if self.before else 0.0


@dataclass(frozen=True)
class Verdict:
    """One line for the title, and the sentences below it."""

    headline: str
    sentences: list[str]


def text_changes(scores: dict[str, Any]) -> list[TextChange]:
    """The texts that were scored both before and after, the ones named `domain` and `general` first."""
    changes = []
    for text, score in scores.items():
        before, after = score.get("before") or {}, score.get("after") or {}
        for key, unit in (("bits_per_byte", "bits per byte"), ("nats_per_token", "nats per token")):
            if isinstance(before.get(key), (int, float)) and isinstance(after.get(key), (int, float)):
                changes.append(TextChange(text, float(before[key]), float(after[key]), unit))
                break
    order = {"domain": 0, "general": 2}
    return sorted(changes, key=lambda change: order.get(change.text, 1))


def judge(changes: list[TextChange]) -> Verdict:
    """The verdict over the texts: the first is what was trained for, those after it are what should be kept."""
    if not changes:
        return Verdict("has no verdict: no held-out text was scored before and after", [])
    own, others = changes[0], changes[1:]
    headline = _learned(own)
    if others:
        forgot = max(change.ratio for change in others) > FORGETTING_RATIO
        headline += f" {'but' if forgot else 'and'} {_kept(others)}"
    return Verdict(headline, [_sentence(change) for change in changes])


def _learned(change: TextChange) -> str:
    if change.ratio < -NO_CHANGE_RATIO:
        return f"learned the {change.text} text"
    if change.ratio <= NO_CHANGE_RATIO:
        return f"learned nothing measurable of the {change.text} text"
    return f"got worse on the {change.text} text"


def _kept(others: list[TextChange]) -> str:
    worst = max(others, key=lambda change: change.ratio)
    if worst.ratio > FORGETTING_RATIO:
        return f"forgot some of the {worst.text} text"
    if worst.ratio > NO_CHANGE_RATIO:
        return f"forgot little of the {worst.text} text"
    return f"forgot none of the {worst.text} text"


def _sentence(change: TextChange) -> str:
    numbers = f"from {change.before:.4f} to {change.after:.4f} {change.unit}"
    if abs(change.ratio) <= NO_CHANGE_RATIO:
        return f"On {change.text} it is as good as before ({numbers})."
    word = "better" if change.ratio < 0 else "worse"
    return f"On {change.text} it is {abs(100 * change.ratio):.1f} % {word} ({numbers})."
