"""RunConfig: every section of a run. Each section is defined beside what it configures."""

from __future__ import annotations

from typing import Any, Literal, Optional

from pydantic import Field

from steep.checkpoint.config import CheckpointConfig
from steep.core.section import Section, component
from steep.evaluation.config import EvaluateConfig
from steep.models.config import AdapterConfig, ModelConfig
from steep.optim.config import OptimizerConfig, ScheduleConfig
from steep.order.config import DataConfig
from steep.reporting.config import ReportConfig
from steep.tokenizer.config import TokenizerConfig, VocabularyConfig
from steep.trackers.config import ConsoleConfig, TrackerConfig
from steep.training.config import TrainConfig


class RunSection(Section):
    """The run's name, directory and seed."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's files go to <directory>/<name>."""
    directory: str = "runs"
    """Where runs are kept."""
    seed: int = Field(default=1234, ge=0, lt=2**63)
    """Seeds the sample order, fresh weights and dropout."""


class RunConfig(Section):
    """The configuration of one run: what `steep train` and `steep plan` read."""

    run: RunSection = RunSection()
    recipe: Optional[Literal["continued_pretraining", "pretraining"]] = None
    """Defaults with published evidence, for every key that file and command line leave out; printed with their sources."""
    model: component(ModelConfig)  # type: ignore[valid-type]
    tokenizer: TokenizerConfig = TokenizerConfig()
    vocabulary: Optional[VocabularyConfig] = None
    """New tokens for the model."""
    adapter: Optional[AdapterConfig] = None
    """Train an adapter beside the frozen model instead of the model itself."""
    data: DataConfig
    train: TrainConfig = TrainConfig()
    optimizer: component(OptimizerConfig) = OptimizerConfig()  # type: ignore[valid-type]
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    trackers: list[component(TrackerConfig)] = Field(default_factory=list)  # type: ignore[valid-type]
    report: ReportConfig = ReportConfig()
    console: ConsoleConfig = ConsoleConfig()

    def to_mapping(self) -> dict[str, Any]:
        """The resolved configuration as plain JSON values, `_target_` keys as written."""
        return self.model_dump(mode="json", by_alias=True)
