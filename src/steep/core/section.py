"""The base of every configuration section, and the field types that read numbers as people write them.

Imports pydantic and nothing heavier: a configuration is checked before torch is imported.
"""

from __future__ import annotations

from typing import Annotated, Any, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from steep.core.units import parse_bytes, parse_count, parse_seconds

Count = Annotated[int, BeforeValidator(parse_count), Field(ge=0)]
"""A whole number of tokens, steps or documents: 2000, "500M", "2B"."""

Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(ge=0)]
"""A duration: 90, "90s", "30min", "2h"."""

Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]
"""A size: 1024, "500MB", "8GiB"."""

SELF_GENERATED = "auto"
"""As the path of a source: text that the base model writes itself."""


class Section(BaseModel):
    """A mapping of the configuration: unknown keys are errors; a docstring under a field is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), defer_build=True)


class Target(BaseModel):
    """Any callable named in the configuration: `_target_` and its arguments (every other key).

    `target` is an import path ("my_pkg.models.build"), a file and object ("./my_model.py:build") or a library
    callable; arguments may hold nested mappings with their own `_target_`, which are built first.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    target: str = Field(alias="_target_", min_length=1)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the call, nested targets still unbuilt."""
        return dict(self.model_extra or {})


def _component_tag(value: Any) -> str:
    is_target = "_target_" in value if isinstance(value, dict) else isinstance(value, Target)
    return "target" if is_target else "section"


def component(section: Any) -> Any:
    """The field type of a component that is configured by `section` or replaced by a `_target_`."""
    return Annotated[
        Union[Annotated[section, Tag("section")], Annotated[Target, Tag("target")]],
        Discriminator(_component_tag),
    ]
