"""One section checked by itself, for functions whose arguments are keys of a section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from steep.core.errors import ConfigError
from steep.core.section import Section

AnySection = TypeVar("AnySection", bound=Section)


def checked_section(section: type[AnySection], values: Mapping[str, Any]) -> AnySection:
    """`section` with `values`. Raises ConfigError with one line per wrong value."""
    try:
        return section(**values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n  ".join(lines)) from None
