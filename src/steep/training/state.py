"""What a run remembers besides weights, optimizer and random state: one small JSON mapping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from steep.core.errors import CheckpointError
from steep.evaluation.end_of_text import StopScore
from steep.evaluation.held_out import Score
from steep.order.batches import StepCounts

FILE_KEYS = {"order_fingerprint": "plan_fingerprint", "order": "plan"}
"""Keys of train_state.json that differ from the names here; checkpoints of every version have them."""

FORMER_KEYS = ("best_step",)
"""Keys that earlier versions wrote and nothing reads."""


@dataclass
class TrainState:
    """Where a run stands. Its data state is `sequences_seen`, which the step fixes, and the fingerprint of the sample order."""

    step: int = 0
    """Optimizer updates made."""
    sequences_seen: int = 0
    tokens_seen: int = 0
    """Tokens trained on; padding is not counted."""
    tokens_by_source: list[int] = field(default_factory=list)
    """The same for each training source, in the order of the configuration."""
    padding_tokens: int = 0
    """Positions of trained sequences that held no token."""
    elapsed_seconds: float = 0.0
    """Time spent in training, over all restarts."""
    skipped_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens of steps that made no update, by source."""
    overflowed_steps: int = 0
    """Steps of mixed_fp16 that made no update because a gradient overflowed; their tokens are among `skipped_tokens`."""
    recent_losses: list[float] = field(default_factory=list)
    """The newest losses that were not spikes."""
    spikes: list[dict[str, Any]] = field(default_factory=list)
    """Every loss spike so far, with its sequences and documents."""
    order_fingerprint: str = ""
    order: dict[str, Any] = field(default_factory=dict)
    """What the sample order depends on, the table of phases with it: `DataOrder.describe`."""
    files: list[dict[str, str]] = field(default_factory=list)
    """The files of each training source and a short checksum of each."""
    streams: list[list[dict[str, Any]]] = field(default_factory=list)
    """Where the readers of each streamed source stand; empty for one that was prepared. Filled when a checkpoint is saved."""
    model_choice: dict[str, Any] | None = None
    """How the model is run: `attention_choice.recorded_choice`. Filled when a checkpoint is saved."""
    data_changes: list[dict[str, Any]] = field(default_factory=list)
    """Where the data was changed during the run on purpose, and what changed."""
    base_scores: dict[str, Any] = field(default_factory=dict)
    """The scores of the model before step 0, by text."""
    scores: dict[str, Any] = field(default_factory=dict)
    """The newest scores, by text."""
    scores_step: int = -1
    """The step at which `scores` were taken."""
    base_end_of_text: dict[str, Any] | None = None
    """What the model before step 0 gave at the true ends of held-out documents."""
    end_of_text: dict[str, Any] | None = None
    """The same at the end of the run."""
    samples_step: int = -1
    """The step at which samples were last written."""
    best_loss: float | None = None
    """Lowest nats per token on the first held-out text."""

    def advance(self, counts: StepCounts, names: Sequence[str], trained: bool = True) -> None:
        """Count one step, as trained or as skipped. names: of the sources."""
        self.step += 1
        self.sequences_seen += len(counts.tokens)
        self.padding_tokens += counts.padding_tokens
        self.tokens_seen += counts.num_tokens if trained else 0
        for source, tokens in zip(counts.sources, counts.tokens, strict=True):
            if trained:
                self.tokens_by_source[source] += tokens
            else:
                self.skipped_tokens[names[source]] = self.skipped_tokens.get(names[source], 0) + tokens

    def note_scores(self, scores: Sequence[Score]) -> list[str]:
        """Take the scores of the weights as they are now; the first of a run are the base's.

        Gives the texts of which another part was scored at the start, by their bytes; those base scores are dropped.
        """
        self.scores = {score.text: score.to_mapping() for score in scores}
        self.scores_step = self.step
        if self.step == 0:
            self.base_scores = self.scores
        if scores and (self.best_loss is None or scores[0].nats_per_token < self.best_loss):
            self.best_loss = scores[0].nats_per_token
        before = {score.text: (self.base_scores.get(score.text) or {}).get("text_bytes") for score in scores}
        other = [s.text for s in scores if s.text_bytes and before[s.text] and before[s.text] != s.text_bytes]
        self.base_scores = {name: score for name, score in self.base_scores.items() if name not in other}
        return other

    def note_stops(self, stops: StopScore | None) -> None:
        """Take what the weights as they are now give at the ends of documents; the first of a run are the base's."""
        self.end_of_text = None if stops is None else asdict(stops)
        if self.step == 0:
            self.base_end_of_text = self.end_of_text

    def to_mapping(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {FILE_KEYS.get(key, key): value for key, value in asdict(self).items()}

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any]) -> TrainState:
        """The state that `to_mapping` wrote. Raises CheckpointError for other keys."""
        names = {key: name for name, key in FILE_KEYS.items()}
        try:
            return cls(**{names.get(key, key): value for key, value in mapping.items() if key not in FORMER_KEYS})
        except TypeError as error:
            raise CheckpointError(f"train_state.json is not of this version of steep: {error}") from None
