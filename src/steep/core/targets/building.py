"""Targets called: nested ones first, the outermost with what steep adds."""

from __future__ import annotations

from typing import Any, Union

from steep.core.errors import ConfigError
from steep.core.section import Target
from steep.core.targets.checking import check
from steep.core.targets.file_module import own_words
from steep.core.targets.finding import Location, as_target, dotted, in_front
from steep.core.targets.resolving import resolve


def build(target: Union[Target, dict[str, Any]], *, allow_code: bool = True, location: str = "", **extra: Any) -> Any:
    """Check everything, then build nested targets, then call the target with its arguments and `extra`.

    Raises TargetProblems before anything is called, or ConfigError with file and line if a call raises.
    """
    whole = as_target(target)
    if whole is None:
        raise TypeError(f"build needs a Target or a mapping with _target_, not {target!r}")
    check(whole, given=tuple(extra), allow_code=allow_code, location=location)
    start: Location = tuple(location.split(".")) if location else ()
    return _build(whole, start, allow_code, extra)


def _build(target: Target, location: Location, allow_code: bool, extra: dict[str, Any]) -> Any:
    arguments = {key: _build_value(item, (*location, key), allow_code) for key, item in target.arguments.items()}
    found = resolve(target, allow_code=allow_code)
    try:
        return found(**arguments, **extra)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{in_front(dotted(location))}{target.target} failed: {own_words(error)}") from error


def _build_value(value: Any, location: Location, allow_code: bool) -> Any:
    target = as_target(value, location)
    if target is not None:
        return _build(target, location, allow_code, {})
    if isinstance(value, dict):
        return {key: _build_value(item, (*location, key), allow_code) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_build_value(item, (*location, position), allow_code) for position, item in enumerate(value)]
    return value
