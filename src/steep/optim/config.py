"""Configuration of the optimizer and the learning-rate schedule."""

from __future__ import annotations

from typing import Literal, Optional

from pydantic import Field, model_validator

from steep.core.section import Section


class OptimizerConfig(Section):
    """How weights are updated."""

    name: str = "adamw"
    """The optimizer: a file name in steep/optim/."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator of the update."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of weights with two or more dimensions; norms, biases and other vectors have none."""


class ScheduleConfig(Section):
    """The learning rate over the run, as a multiple of `optimizer.learning_rate`."""

    name: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = "cosine"
    """Shape after the warmup. `wsd`: constant, then a cooldown over the last `decay_ratio` of the steps."""
    warmup_steps: Optional[int] = Field(default=None, ge=0)
    """Linear warmup from 0 over this many steps. Give this or `warmup_ratio`."""
    warmup_ratio: Optional[float] = Field(default=None, ge=0, lt=1)
    """The same as a share of the run. Default: 0.01."""
    final_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""
    decay_ratio: float = Field(default=0.2, gt=0, le=1)
    """`wsd` only: share of the run that the cooldown takes."""
    decay_shape: Literal["linear", "cosine", "one_minus_sqrt"] = "one_minus_sqrt"
    """`wsd` only: shape of the cooldown."""

    @model_validator(mode="after")
    def _one_warmup(self) -> ScheduleConfig:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        if self.name == "inverse_sqrt" and self.final_ratio == 0:
            raise ValueError(
                "inverse_sqrt never reaches final_ratio 0; give a final_ratio above 0 such as 0.1, "
                "or use linear, cosine or wsd"
            )
        return self
