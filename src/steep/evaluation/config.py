"""Configuration of held-out evaluation and samples."""

from __future__ import annotations

from typing import Annotated, Literal, Optional, Union

from pydantic import Field, model_validator

from steep.core.section import Count, Section

DEFAULT_CAP_RATIO = 0.02
"""How much worse general text may become: the default of `evaluate.forgetting_cap`."""


class EvaluateConfig(Section):
    """When and how held-out texts are scored and samples are written."""

    every_steps: Optional[Count] = Field(default=None, ge=1)
    """Score every held-out text at intervals of this many steps. The start and the end are always scored."""
    every_ratio: Optional[float] = Field(default=None, gt=0, le=1)
    """The same interval as a share of the run: 0.05 scores twenty times. Give one of the two."""
    tokens: Union[Annotated[Count, Field(ge=1)], Literal["auto"]] = "auto"
    """At most this many tokens of each text, always the same ones: whole documents in order, leaving out any that no longer fit.
    If these fill less than half of the limit, the beginnings of those left out are added. `auto`: 200k, or as many as take a
    tenth of the time of training; decided when the run starts and fixed from then on."""
    batch_size: Optional[int] = Field(default=None, ge=1)
    """Sequences per forward pass. Default: the micro-batch size. Changes speed and memory, not the score."""
    forgetting_cap: float = Field(default=DEFAULT_CAP_RATIO, ge=0)
    """How much worse a general text may become, as a share of its bits per byte, before the forgetting report says that the run
    forgot. A ratio: 0.02 is two per cent."""
    prompts: list[str] = Field(default_factory=list)
    """Prompts that the model continues at the start and the end of the run; the texts go into samples/."""
    sample_every_steps: Optional[Count] = Field(default=None, ge=1)
    """Also continue the prompts at intervals of this many steps."""
    sample_tokens: Count = Field(default=64, ge=1)
    """New tokens per sample."""

    @model_validator(mode="after")
    def _one_interval(self) -> EvaluateConfig:
        if self.every_steps is not None and self.every_ratio is not None:
            raise ValueError("give every_steps or every_ratio, not both")
        return self
