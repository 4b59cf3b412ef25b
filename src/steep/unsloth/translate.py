"""Arguments of calls written for Unsloth: unknown ones are refused, and those that mean nothing here get one line.

In: keyword arguments. Out: lines for the person at the notebook, and errors. An unknown key names the nearest known one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from steep.core.errors import ConfigError

NEUTRAL = (None, False, 0, "none", "no", "auto", "")
"""Values that switch a key off: no line is worth printing for them."""


def say(line: str) -> None:
    """Print a line for the person at the notebook."""
    print(f"steep: {line}", file=sys.stderr, flush=True)


def check_keys(call: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ConfigError for the first key that is not known."""
    names = sorted(known)
    for key in given:
        if key not in names:
            near = get_close_matches(key, names, n=1, cutoff=0.6)
            hint = f"Did you mean {near[0]!r}?" if near else "docs/how_to/from_unsloth.md lists the known ones."
            raise ConfigError(f"{call}() has no argument {key!r}. {hint}")


def say_ignored(call: str, given: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Say one line for each given key that has no effect here and is not switched off."""
    for key, value in given.items():
        if key in reasons and not _is_neutral(value):
            say(f"{call}: {key}={value!r} has no effect here: {reasons[key]}")


def refuse(call: str, given: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Raise ConfigError for a key that would change the result and has no counterpart, unless it is switched off."""
    for key, value in given.items():
        if key in reasons and not _is_neutral(value):
            raise ConfigError(f"{call}: {key}={value!r} is not supported: {reasons[key]}")


def _is_neutral(value: Any) -> bool:
    return any(value is neutral or (type(value) is type(neutral) and value == neutral) for neutral in NEUTRAL)
