"""Command-line overrides: `--a.b.c value`, `--a.b.c=value`, `--a.b.c` (true), applied over plain data.

Values are read as in the file: `3e-4`, `true`, `null`, `[a, b]`, `{path: x}`; anything else is plain text, so
`*.jsonl` and `a: b` need no quotes beyond the shell's. A number in the key is a list position; the position after the
last one appends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steep.config.errors import Problem
from steep.config.keys import Location, dotted, in_words, section_of, type_at
from steep.config.yaml_file import parse_yaml, read_scalar


@dataclass(frozen=True)
class Override:
    """One override: where, what, how it was typed, and whether it was typed without a value."""

    location: Location
    value: Any
    text: str
    bare: bool = False


@dataclass(frozen=True)
class BadOverride:
    """An override that cannot be read: how it was typed, and why not."""

    text: str
    problem: Problem


def parse_overrides(arguments: Sequence[str]) -> tuple[list[Override], list[BadOverride]]:
    """Read the arguments of a command line. Returns what could be read and what could not."""
    overrides: list[Override] = []
    bad: list[BadOverride] = []
    rest = [str(argument) for argument in arguments]
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            bad.append(BadOverride(argument, Problem((), _stray(argument))))
            continue
        name, equals, text = argument[2:].partition("=")
        bare = not equals and (not rest or rest[0].startswith("--"))
        if not equals and not bare:
            text = rest.pop(0)
            argument = f"{argument} {text}"
        read = _parse_one(name, text, argument, bare)
        if isinstance(read, BadOverride):
            bad.append(read)
        else:
            overrides.append(read)
    return overrides, bad


def _stray(argument: str) -> str:
    if argument.startswith("-") and len(argument) > 2 and "." in argument and not argument[1].isdigit():
        return f"an override has two dashes: -{argument}"
    return "does not belong to a key; an override is written --section.key value, a list --section.key '[a, b]'"


def _parse_one(name: str, text: str, argument: str, bare: bool) -> Override | BadOverride:
    parts = name.split(".")
    location: Location = tuple(int(part) if part.isdigit() and len(part) < 7 else part for part in parts)
    if not all(parts):
        return BadOverride(argument, Problem((), "a key is missing; an override is written --section.key value"))
    if bare:
        return Override(location, True, argument, bare=True)
    if not text.strip():
        return BadOverride(argument, Problem(location, "has no value; write null for none, '\"\"' for empty text"))
    text = text.strip()
    if text[0] not in "[{\"'":
        return Override(location, read_scalar(text), argument)
    parsed = parse_yaml(text)
    if parsed.problems:
        return BadOverride(argument, Problem(location, "; ".join(message for _, _, message in parsed.problems)))
    return Override(location, parsed.data, argument)


def apply_override(data: dict[str, Any], override: Override) -> Problem | None:
    """Write one override into `data`, creating the mappings on the way. Returns the problem if there is no such place."""
    *path, last = override.location
    here: Any = data
    for depth, part in enumerate(path):
        parent = override.location[: depth + 1]
        problem = _reachable(here, part, parent)
        if problem:
            return problem
        following = override.location[depth + 1]
        fresh: Any = [] if following == 0 and not _wants_mapping(parent) else {}
        here = _step_into(here, part, fresh)
    problem = _reachable(here, last, override.location)
    if problem:
        return problem
    if isinstance(here, list):
        here[int(last) : int(last) + 1] = [override.value]
    else:
        here[str(last)] = override.value
    return None


def _wants_mapping(location: Location) -> bool:
    annotation = type_at(location)
    return annotation is not None and (section_of(annotation) is not None or "list" not in in_words(annotation))


def _step_into(here: Any, part: str | int, fresh: Any) -> Any:
    """The value under `part`, created if it is missing or empty."""
    if isinstance(here, list):
        index = int(part)
        if index == len(here):
            here.append(fresh)
        elif here[index] is None:
            here[index] = fresh
        return here[index]
    if here.get(str(part)) is None:
        here[str(part)] = fresh
    return here[str(part)]


def _reachable(here: Any, part: str | int, location: Location) -> Problem | None:
    """Why `here` has no `part`; None if it has."""
    parent = dotted(location[:-1])
    if isinstance(here, dict):
        return None
    if isinstance(here, list):
        if not isinstance(part, int):
            return Problem(location, f"{parent} is a list: name one of its entries by number, as in {parent}.0.{part}")
        if part > len(here):
            last = (
                f"its entries are 0 to {len(here) - 1}, and {len(here)} appends" if here else "it is empty, 0 appends"
            )
            return Problem(location, f"{parent} has no entry {part}: {last}")
        return None
    return Problem(location, f"{parent} is {here!r}, which has no keys")
