"""The scores that a finished run has of its base and of its last weights. In: a run directory. Out: scores, or none.

They stand for those of alpha 0 and 1 of a blend, which is scored in the run's precision, where a new score would be the same
number: the same texts, tokens and device, and weights that a checkpoint holds as they were scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steep.checkpoint.manifest import step_of_name
from steep.checkpoint.retention import read_latest
from steep.config.run import RunConfig
from steep.evaluation.evaluate_model import token_limit
from steep.evaluation.held_out import Score
from steep.models.config import ModelConfig
from steep.runtime.device import choose_device, device_name
from steep.runtime.run_directory import RunDirectory


@dataclass(frozen=True)
class KnownScores:
    """What a run has scored, by alpha and text."""

    scores: dict[float, dict[str, dict[str, Any]]]
    roles: dict[str, str | None]

    def bits_per_byte(self, alpha: float) -> dict[str, float] | None:
        """Of each text at this end; None where the run has not scored it."""
        found = self.scores.get(alpha)
        return None if found is None else {text: float(score["bits_per_byte"]) for text, score in found.items()}

    def are_of(self, scores: Sequence[Score]) -> bool:
        """Whether other scores are of the same texts."""
        theirs = {score.text: (score.tokens, score.text_bytes) for score in scores}
        return all(
            {text: (score["tokens"], score["text_bytes"]) for text, score in known.items()} == theirs
            for known in self.scores.values()
        )


NOTHING_KNOWN = KnownScores({}, {})


def known_scores(run: Path, config: RunConfig, trained: str, tokens: int | str | None) -> KnownScores:
    """What a run scored of its base (alpha 0) and of its last weights (alpha 1), where these would be scored the same now.

    trained: the reference of the trained model, the run or a checkpoint of it. tokens: as for `steep.evaluate`.
    """
    directory = RunDirectory(run)
    summary, plan = directory.read("summary.json") or {}, directory.read("plan.json") or {}
    texts = summary.get("texts") or {}
    if summary.get("status") != "done" or not texts or not _scored_alike(config, plan, tokens):
        return NOTHING_KNOWN
    sides = {0.0: "before"}
    newest = read_latest(directory.checkpoints)
    if Path(trained).resolve() == run.resolve() and step_of_name(newest or "") == summary.get("step"):
        sides[1.0] = "after"
    found = {alpha: {text: score.get(side) or {} for text, score in texts.items()} for alpha, side in sides.items()}
    complete = {alpha: scores for alpha, scores in found.items() if all(map(_is_complete, scores.values()))}
    roles = {text["name"]: text.get("role") for text in (plan.get("data") or {}).get("held_out") or []}
    return KnownScores(complete, roles) if set(roles) == set(texts) else NOTHING_KNOWN


def _scored_alike(config: RunConfig, plan: Mapping[str, Any], tokens: int | str | None) -> bool:
    """Whether `steep.evaluate` would score the weights of this run as the run itself did."""
    same_tokens = tokens is None or token_limit(tokens) == config.evaluate.tokens
    plain = isinstance(config.model, ModelConfig) and config.model.quantize is None and config.vocabulary is None
    here = plan.get("device") == device_name(choose_device("auto"))
    return same_tokens and plain and config.train.ema_decay is None and here


def _is_complete(score: Mapping[str, Any]) -> bool:
    return all(score.get(key) is not None for key in ("bits_per_byte", "tokens", "text_bytes"))
