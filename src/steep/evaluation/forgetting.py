"""What a run gained and what it forgot, in numbers and sentences. In: scores of held-out texts before and after. Out: a report.

Pure: no model is run and torch is not imported, so the console, summary.json, the page and `steep evaluate` share this one
logic. Every text has a role: `domain` is what the run should learn, `general` what should stay as good as it was. Scores are
bits per byte where every text has them, else nats per token, which are comparable under one tokenizer only.
A change counts only where it exceeds its error (`change_error`). Weakness: the texts of a role are averaged without weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from steep.core.public import Readable
from steep.core.table import text_table
from steep.evaluation.change_error import RESAMPLES, error_of, resampled_ratios
from steep.evaluation.config import DEFAULT_CAP_RATIO

Role = Literal["domain", "general"]
VerdictName = Literal["kept", "forgot", "too little text", "not measured"]

NO_CHANGE_RATIO = 0.005
"""A change of at most half a per cent counts as none: nobody would act on it."""


UNITS = {"bits_per_byte": "bits per byte", "nats_per_token": "nats per token"}

ADD_GENERAL_TEXT = (
    "Add one to the configuration (data.validation.general: {path: FILE}), or set role: general on a held-out text that should "
    "stay as good as it was; for `steep evaluate`, name it as general=FILE"
)


@dataclass(frozen=True)
class TextChange:
    """One held-out text before and after."""

    text: str
    role: Role
    base: float
    """Score before the first update, or of the other model; lower is better."""
    trained: float
    error_ratio: float | None = None
    """What the change must exceed to count, relative to the base; infinite for too little text, None where it is not known."""

    @property
    def counts(self) -> bool:
        """Whether the change is larger than its error."""
        return self.error_ratio is None or abs(self.change_ratio) > self.error_ratio

    @property
    def change(self) -> float:
        """In the report's unit; negative is better."""
        return self.trained - self.base

    @property
    def change_ratio(self) -> float:
        """Relative to the base; negative is better. 0 where the base's score is 0."""
        return self.change / self.base if self.base else 0.0

    def sentence(self, unit: str) -> str:
        """The change in words."""
        numbers = f"from {self.base:.4f} to {self.trained:.4f} {unit}"
        error = self.error_ratio or 0.0
        if not self.counts and error > NO_CHANGE_RATIO:
            found = (
                f"the change of {_percent(self.change_ratio, sign=True)} is not above its error of {_percent(error)}"
            )
            reason = found if math.isfinite(error) else "the text is too short to know the error of its change"
            return f"On {self.text} there is too little text to tell: {reason} ({numbers})."
        if abs(self.change_ratio) <= NO_CHANGE_RATIO:
            return f"On {self.text} it is as good as before ({numbers})."
        word = "better" if self.change_ratio < 0 else "worse"
        return f"On {self.text} it is {abs(100 * self.change_ratio):.1f} % {word} ({numbers})."


@dataclass(frozen=True, repr=False)
class ForgettingReport(Readable):
    """Gain on domain texts, loss on general texts, and a verdict."""

    changes: list[TextChange]
    """Domain texts first, then general ones, each in their order."""
    unit: str
    cap_ratio: float
    role_notes: list[str]
    """Why each text has its role."""
    gain_error_ratio: float | None = None
    """The error of `gain_ratio`, as that of a text."""

    def of(self, role: Role) -> list[TextChange]:
        """The texts of one role."""
        return [change for change in self.changes if change.role == role]

    @property
    def gain(self) -> float | None:
        """Mean improvement of the domain texts in the report's unit; None without one."""
        return _negative(_mean_change(self.of("domain")))

    @property
    def gain_ratio(self) -> float | None:
        """The same, relative to the mean score of the base."""
        return _negative(_mean_ratio(self.of("domain")))

    @property
    def loss(self) -> float | None:
        """Mean worsening of the general texts in the report's unit, negative where they became better; None without one."""
        return _mean_change(self.of("general"))

    @property
    def loss_ratio(self) -> float | None:
        """The same, relative to the mean score of the base."""
        return _mean_ratio(self.of("general"))

    @property
    def loss_per_gain(self) -> float | None:
        """Lost on general text per unit gained on domain text; 0 where nothing was lost, None where nothing was gained."""
        if self.gain is None or self.loss is None or self.gain <= 0:
            return None
        return max(0.0, self.loss) / self.gain

    @property
    def worst(self) -> TextChange | None:
        """The general text that became worse by the largest ratio: it decides, so no text hides behind another.

        A text that is certainly over the cap comes before one of which that cannot be told, and that one before the others.
        """
        general = self.of("general")
        over = [change for change in general if self._is_over(change)]
        unclear = [change for change in general if self._is_unclear(change)]
        return max(over or unclear or general, key=lambda change: change.change_ratio, default=None)

    def _is_over(self, change: TextChange) -> bool:
        return change.change_ratio > self.cap_ratio and change.counts

    def _is_unclear(self, change: TextChange) -> bool:
        """Whether the change may be on either side of the cap, since its error is larger than the cap."""
        error = change.error_ratio or 0.0
        return not self._is_over(change) and error > self.cap_ratio and change.change_ratio + error > self.cap_ratio

    @property
    def verdict(self) -> VerdictName:
        """`forgot` where a general text is worse by more than the cap and by more than its error, `kept` at or under the cap,
        `too little text` where the error is too large to tell."""
        if self.worst is None:
            return "not measured"
        if self._is_over(self.worst):
            return "forgot"
        return "too little text" if self._is_unclear(self.worst) else "kept"

    @property
    def is_learning_clear(self) -> bool:
        """Whether the gain exceeds its error, or the error is too small to matter."""
        error, gain = self.gain_error_ratio, self.gain_ratio
        return error is None or gain is None or error <= NO_CHANGE_RATIO or abs(gain) > error

    @property
    def learned(self) -> str:
        """What happened to the domain texts, in a few words."""
        if self.gain_ratio is None:
            return "has no domain text to show what it learned"
        texts = _texts(self.of("domain"))
        if not self.is_learning_clear:
            return f"was scored on too little text to tell whether it learned {texts}"
        if self.gain_ratio > NO_CHANGE_RATIO:
            return f"learned {texts}"
        return (
            f"learned nothing measurable of {texts}" if self.gain_ratio >= -NO_CHANGE_RATIO else f"got worse on {texts}"
        )

    @property
    def kept(self) -> str:
        """What happened to the worst general text, in a few words; empty without one."""
        if self.worst is None:
            return ""
        texts = _texts([self.worst])
        if self.verdict == "too little text":
            return f"too little text to tell what it forgot of {texts}"
        if self.verdict == "forgot":
            return f"forgot some of {texts}"
        return f"forgot {'little' if self.worst.change_ratio > NO_CHANGE_RATIO else 'none'} of {texts}"

    @property
    def headline(self) -> str:
        """Both, as the words that follow the run's name."""
        if not self.changes:
            return "has no verdict: no held-out text was scored before and after"
        if self.worst is not None and self.verdict == "too little text" and not self.is_learning_clear:
            return f"{self.learned} or forgot {_texts([self.worst])}"
        joint = {"forgot": " but ", "too little text": ", with "}.get(self.verdict, " and ")
        return f"{self.learned}{joint}{self.kept}" if self.kept else self.learned

    @property
    def sentences(self) -> list[str]:
        """One per text."""
        return [change.sentence(self.unit) for change in self.changes]

    @property
    def verdict_sentence(self) -> str:
        """The verdict against the cap."""
        cap = f"the cap of {_percent(self.cap_ratio, 2)} (evaluate.forgetting_cap)"
        if self.worst is None:
            return f"forgetting is not measured: no general text was scored. {ADD_GENERAL_TEXT}."
        if self.verdict == "forgot":
            return (
                f"over the cap: {self.worst.text} is {_percent(self.worst.change_ratio, 2)} worse, more than {cap}. What helps: "
                "general text as a source with role replay, a lower learning rate, or blending the run with its base."
            )
        if self.verdict == "too little text":
            error = self.worst.error_ratio or 0.0
            about = (
                f"with an error of {_percent(error, 2)}"
                if math.isfinite(error)
                else "and is too short to know the error"
            )
            return (
                f"too little text to tell: {self.worst.text} changed by {_percent(self.worst.change_ratio, 2, sign=True)}, "
                f"{about}, against {cap}. What helps: a larger evaluate.tokens, a larger share, or a longer held-out text."
            )
        return f"under the cap: {self.worst.text} changed by {_percent(self.worst.change_ratio, 2, sign=True)}, within {cap}."

    def to_mapping(self) -> dict[str, Any]:
        """The report as JSON values: `forgetting` of summary.json."""
        return {
            "verdict": self.verdict,
            "headline": self.headline,
            "verdict_sentence": self.verdict_sentence,
            "unit": self.unit,
            "cap_ratio": self.cap_ratio,
            "gain": self.gain,
            "gain_ratio": self.gain_ratio,
            "gain_error_ratio": _finite(self.gain_error_ratio),
            "loss": self.loss,
            "loss_ratio": self.loss_ratio,
            "loss_per_gain": self.loss_per_gain,
            "texts": [
                {
                    **asdict(change),
                    "error_ratio": _finite(change.error_ratio),
                    "change": change.change,
                    "change_ratio": change.change_ratio,
                    "counts": change.counts,
                }
                for change in self.changes
            ],
            "role_notes": self.role_notes,
        }

    def rows(self) -> list[list[str]]:
        """Text, role, base, trained, change: one row of strings per text, then the totals that are known."""
        rows = [
            [
                c.text,
                c.role,
                f"{c.base:.4f}",
                f"{c.trained:.4f}",
                f"{c.change:+.4f} ({_percent(c.change_ratio, sign=True)}{_plus_minus(c.error_ratio)})",
            ]
            for c in self.changes
        ]
        for name, value, ratio in (
            ("gain on domain text", self.gain, self.gain_ratio),
            ("loss on general text", self.loss, self.loss_ratio),
        ):
            if value is not None and ratio is not None:
                rows.append([name, "", "", "", f"{value:.4f} ({_percent(ratio)})"])
        if self.loss_per_gain is not None:
            rows.append(["lost per unit gained", "", "", "", f"{self.loss_per_gain:.3f}"])
        return rows

    def to_text(self) -> str:
        if not self.changes:
            return "forgetting report: no held-out text was scored before and after; name texts in data.validation"
        table = text_table([["text", "role", "base", "trained", "change"], *self.rows()], left=2)
        return "\n".join(
            [
                f"forgetting report ({self.unit}, lower is better)",
                *(f"  {line}" for line in table),
                f"  the model {self.headline}",
                f"  {self.verdict_sentence}",
                *(f"  roles: {note}" for note in self.role_notes),
            ]
        )


def role_of(text: str, configured: str | None = None) -> tuple[Role, str]:
    """The role of a held-out text, and why: as configured, else `general` for names that begin with it, else `domain`."""
    if configured in ("domain", "general"):
        return configured, f"{text} is {configured} text, as configured"  # type: ignore[return-value]
    if text.lower().startswith("general"):
        return "general", f"{text} is general text, by its name"
    return "domain", f"{text} is domain text, because nothing says otherwise (role: general would)"


def roles_of(texts: Iterable[Any]) -> dict[str, str | None]:
    """The role that the configuration or its source gives each held-out text (`HeldOutText`), None where none does."""
    return {text.name: text.role for text in texts}


def forgetting_report(
    scores: Mapping[str, Mapping[str, Any]],
    *,
    roles: Mapping[str, str | None] | None = None,
    cap_ratio: float = DEFAULT_CAP_RATIO,
) -> ForgettingReport:
    """The report over texts that were scored both before and after.

    scores: `{text: {"before": score, "after": score}}`, scores as `Score.to_mapping` gives them. roles: the configured role of
    each text, None where none is set; the other texts get their role from their names. cap_ratio: what a general text may
    lose, relative to its score before. Texts with only one score are left out. Scores of earlier versions have no `part_nats`;
    without them no error is known, and every change counts.
    """
    both = [score for score in scores.values() if any(_pair(score, unit) for unit in UNITS)]
    # Without a common unit some texts have bytes in both scores and others in neither.
    unit = next((unit for unit in UNITS if all(_pair(score, unit) for score in both)), "nats_per_token")
    taken = {text: role_of(text, (roles or {}).get(text)) for text, score in scores.items() if _pair(score, unit)}
    changes, resampled = [], {}
    for text, (role, _) in taken.items():
        resampled[text] = ratios = resampled_ratios(*(_parts(scores[text], side) for side in ("before", "after")))
        base, trained = _pair(scores[text], unit)  # type: ignore[misc]  # of those that are taken both are known
        changes.append(TextChange(text, role, base, trained, error_of(ratios)))
    ordered = sorted(changes, key=lambda change: change.role != "domain")
    domain = [change for change in ordered if change.role == "domain"]
    notes = [note for _, note in taken.values()]
    return ForgettingReport(ordered, UNITS[unit], cap_ratio, notes, _mean_error(domain, resampled))


def _mean_error(changes: list[TextChange], resampled: Mapping[str, NDArray[np.float64] | None]) -> float | None:
    """The error of the mean change of several texts, relative to their mean base. None where that of one is not known."""
    base = sum(change.base for change in changes)
    found = [(change.base, resampled[change.text]) for change in changes]
    if not base or any(ratios is None for _, ratios in found):
        return None
    if len(found) > 1:  # the same draws for every text would make them rise and fall together
        order = np.random.default_rng(1)
        found = [(weight, order.permutation(ratios)) for weight, ratios in found if ratios is not None]
    return error_of(
        sum((weight / base * ratios for weight, ratios in found if ratios is not None), np.zeros(RESAMPLES))
    )


def _parts(score: Mapping[str, Any], side: str) -> list[float]:
    return (score.get(side) or {}).get("part_nats") or []


def _pair(score: Mapping[str, Any], key: str) -> tuple[float, float] | tuple[()]:
    before, after = ((score.get(side) or {}).get(key) for side in ("before", "after"))
    known = isinstance(before, (int, float)) and isinstance(after, (int, float))
    return (float(before), float(after)) if known else ()  # type: ignore[arg-type]


def _mean_change(changes: list[TextChange]) -> float | None:
    return sum(change.change for change in changes) / len(changes) if changes else None


def _mean_ratio(changes: list[TextChange]) -> float | None:
    base = sum(change.base for change in changes)
    return (sum(change.change for change in changes) / base if base else 0.0) if changes else None


def _negative(value: float | None) -> float | None:
    return None if value is None else 0.0 - value


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _plus_minus(error_ratio: float | None) -> str:
    return "" if _finite(error_ratio) is None else f" ± {_percent(error_ratio or 0.0)}"


def _texts(changes: list[TextChange]) -> str:
    names = [change.text for change in changes]
    if len(names) == 1:
        return f"the {names[0]} text"
    return f"the texts {', '.join(names[:-1])} and {names[-1]}"


def _percent(ratio: float, digits: int = 1, sign: bool = False) -> str:
    return f"{100 * ratio:{'+' if sign else ''}.{digits}f} %"
