"""Configuration of the transforms that a model goes through before training."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional, Union

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from steep.core.section import Section

SHORT_FORMS = ("full", "selective")


class ActivationCheckpointing(Section):
    """What is recomputed in the backward pass instead of being kept from the forward pass. Gradients do not change. The short
    forms `true` (or `full`) and `selective` mean that mode with its defaults."""

    mode: Literal["full", "every_nth", "selective"] = "full"
    """`full`: every layer, of which only the input is kept; takes about a third more time. `every_nth`: every `every`-th layer.
    `selective`: the results of matrix products and attention are kept; the rest, which is cheap, is recomputed."""
    every: int = Field(default=2, ge=2)
    """`every_nth`: one in this many layers is recomputed."""
    offload: bool = False
    """On a GPU, keep the inputs of layers in host memory: less device memory, for two copies per layer and step."""

    @model_validator(mode="after")
    def _every_is_for_every_nth(self) -> ActivationCheckpointing:
        if "every" in self.model_fields_set and self.mode != "every_nth":
            raise ValueError(f"every={self.every} is given with mode {self.mode}; only mode every_nth uses it")
        return self


def _long_form(value: Any) -> Any:
    """`true`, `false` or the name of a mode as a mapping."""
    if isinstance(value, bool):
        return {} if value else None
    if isinstance(value, str):
        if value not in SHORT_FORMS:
            raise ValueError(
                f"{value!r} is not valid here; use true, false, full, selective, or a mapping such as "
                "{mode: every_nth, every: 2, offload: true}"
            )
        return {"mode": value}
    return value


def _short_form(value: Optional[ActivationCheckpointing]) -> Any:
    """The shortest form, so that the same settings are always written alike: a resumed run compares them."""
    if value is None:
        return False
    long: dict[str, Any] = {"mode": value.mode}
    if value.mode == "every_nth":
        long["every"] = value.every
    if value.offload:
        return {**long, "offload": True}
    return {"full": True, "selective": "selective"}.get(value.mode, long)


Checkpointing = Annotated[
    Optional[ActivationCheckpointing],
    BeforeValidator(
        _long_form, json_schema_input_type=Union[bool, Literal["full", "selective"], ActivationCheckpointing, None]
    ),
    PlainSerializer(_short_form),
]
"""The field type: any accepted form, resolved to the section or None."""
