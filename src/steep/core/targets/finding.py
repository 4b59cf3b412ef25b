"""The targets in a configuration: where they are, and how their names are written."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Optional, Union

from pydantic import BaseModel, ValidationError

from steep.core.errors import ConfigError
from steep.core.section import Target

Location = tuple[Union[str, int], ...]


class TargetProblems(ConfigError):
    """Targets that cannot be used. `problems` holds one line each."""

    def __init__(self, problems: Collection[str], advice: str = ""):
        self.problems = tuple(problems)
        head = f"{len(self.problems)} problems with _target_:\n  " if len(self.problems) > 1 else ""
        super().__init__(head + "\n  ".join(self.problems) + (f"\n{advice}" if advice else ""))


def find_targets(value: Any) -> list[tuple[str, Target]]:
    """Every target in a configuration, section, mapping or list, nested ones before those that hold them.

    Returns (dotted location, target). Raises TargetProblems for a `_target_` that is not text.
    """
    return [(dotted(location), target) for location, target in walk(value, ())]


def walk(value: Any, location: Location) -> Iterator[tuple[Location, Target]]:
    """Every target with its location, nested ones before those that hold them."""
    target = as_target(value, location)
    items: Iterable[tuple[Union[str, int], Any]] = ()
    if target is not None:
        items = target.arguments.items()
    elif isinstance(value, BaseModel):
        items = [*value.__dict__.items(), *(value.model_extra or {}).items()]
    elif isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, item in items:
        yield from walk(item, (*location, key))
    if target is not None:
        yield location, target


def as_target(value: Any, location: Location = ()) -> Optional[Target]:
    """`value` as a Target if it is one or a mapping with `_target_`, else None."""
    if isinstance(value, Target) or not (isinstance(value, dict) and "_target_" in value):
        return value if isinstance(value, Target) else None
    try:
        return Target.model_validate(value)
    except ValidationError as error:
        place = dotted((*location, "_target_"))
        raise TargetProblems(
            [f"{place}: {value['_target_']!r} is not the name of a callable, such as my_pkg.build"]
        ) from error


def dotted(location: Location) -> str:
    """A location as people write it: `model.config`."""
    return ".".join(map(str, location))


def in_front(location: str) -> str:
    """The location as the beginning of a message; nothing where it is not known."""
    return f"{location}: " if location else ""


def split_file(written: str) -> Optional[tuple[str, str]]:
    """(file, object) of `./file.py:object`, or None for an import path."""
    file, colon, name = written.rpartition(":")
    return (file, name) if colon else None


def absolute(file: str) -> Path:
    """The path of a file as written in a target: `~` is the home directory, relative means to the current directory."""
    return Path(os.path.expanduser(file)).resolve()
