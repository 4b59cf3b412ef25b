"""Configuration of the optimizer and the learning-rate schedule."""

from __future__ import annotations

from typing import Any, Literal, Optional

from pydantic import Field, model_validator

from steep.core.plugins import plugin_constant, plugin_names
from steep.core.section import Section

PACKAGE = "steep.optim.optimizers"
LION_BETAS = (0.9, 0.99)


class OptimizerConfig(Section):
    """How weights are updated. Options that the chosen optimizer does not have are refused."""

    name: str = "adamw"
    """The optimizer: a file name in steep/optim/optimizers/."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    embedding_learning_rate: Optional[float] = Field(default=None, gt=0)
    """Peak learning rate of the token embeddings and the output head. Default: a tenth of `learning_rate` where they are trained
    beside adapters, else `learning_rate`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moment. `lion`: default 0.9 and 0.99. `muon`: of its AdamW part."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator of the update."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of weights with two or more dimensions; norms, biases and other vectors do not decay."""
    momentum: Optional[float] = Field(default=None, ge=0, lt=1)
    """`muon`: decay rate of the momentum. Default: 0.95."""
    newton_schulz_steps: Optional[int] = Field(default=None, ge=1, lt=100)
    """`muon`: iterations of the orthogonalization. Default: 5."""
    beta2_decay: Optional[float] = Field(default=None, lt=0)
    """`adafactor`: exponent of the step in the decay rate of the second moment. Default: -0.8."""
    clip_threshold: Optional[float] = Field(default=None, ge=1)
    """`adafactor`: largest root mean square of an update before the learning rate. Default: 1."""
    rank: Optional[int] = Field(default=None, ge=1)
    """`galore`: rank that gradients are projected to. Default: 128."""
    projection_interval_steps: Optional[int] = Field(default=None, ge=1)
    """`galore`: steps between recomputations of the projection. Default: 200."""
    projection_scale: Optional[float] = Field(default=None, gt=0)
    """`galore`: factor on the update after it is projected back. Default: 0.25."""

    @model_validator(mode="before")
    @classmethod
    def _lion_has_other_betas(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("name") == "lion" and "betas" not in data:
            return {**data, "betas": LION_BETAS}
        return data

    @model_validator(mode="after")
    def _options_are_known(self) -> OptimizerConfig:
        options = options_of_optimizers()
        known = options.get(self.name)
        every = {option for of_one in options.values() for option in of_one or ()}
        fields = type(self).model_fields
        for option in sorted(every - set(known if known is not None else every)):
            # a saved configuration names all of them, at their defaults
            if getattr(self, option) != fields[option].default:
                raise ValueError(
                    f"{self.name} has no option {option!r}. It has: learning_rate, "
                    f"embedding_learning_rate, weight_decay, {', '.join(known or ())}"
                )
        return self


def options_of_optimizers() -> dict[str, Optional[tuple[str, ...]]]:
    """What each optimizer reads besides the learning rates and weight decay, as its file says in `OPTIONS`; None if it does not
    say, and then it may read all of them."""
    return {name: plugin_constant(PACKAGE, name, "OPTIONS") for name in plugin_names(PACKAGE)}


class ScheduleConfig(Section):
    """The learning rate over the run, as a multiple of `optimizer.learning_rate`."""

    name: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = "cosine"
    """Shape after the warmup. `wsd`: constant, then a cooldown over the last `decay_ratio` of the steps."""
    warmup_steps: Optional[int] = Field(default=None, ge=0)
    """Linear warmup from 0 over this many steps. Give this or `warmup_ratio`."""
    warmup_ratio: Optional[float] = Field(default=None, ge=0, lt=1)
    """The warmup as a share of the run. Default: 0.01."""
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
                "inverse_sqrt never reaches final_ratio 0; give a final_ratio above 0, such as 0.1, "
                "or use linear, cosine or wsd"
            )
        return self
