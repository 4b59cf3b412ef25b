"""Command-line overrides: `--a.b.c value`, `--a.b.c=value`, `--a.b.c` (true), applied over plain data.

Values are read as in the file: `3e-4`, `true`, `null`, `[a, b]`, `{path: x}`; anything else is plain text, so
`*.jsonl` and `a: b` need no quotes beyond the shell's. A number in the key is a list position; the position after the
last one appends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steep.config.keys import Location, dotted, in_words, section_of, type_at
from steep.config.yaml_file import parse_yaml, read_scalar

ALTERNATIVES: dict[Location, tuple[str, ...]] = {
    ("train",): ("epochs", "steps", "tokens"),
    ("evaluate",): ("every_steps", "every_ratio"),
    ("schedule",): ("warmup_steps", "warmup_ratio"),
}
"""Keys of a section that say the same in another unit, so that only one of them may be given."""


@dataclass(frozen=True)
class Override:
    """One override: where, what, how it was typed, and whether it was typed without a value."""

    location: Location
    value: Any
    text: str
    bare: bool = False


def parse_overrides(arguments: Sequence[str]) -> tuple[list[Override], list[str]]:
    """Read the arguments of a command line. Returns what could be read, and the messages about what could not."""
    overrides: list[Override] = []
    bad: list[str] = []
    rest = [str(argument) for argument in arguments]
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            bad.append(f"{argument}: {_stray(argument)}")
            continue
        name, equals, text = argument[2:].partition("=")
        bare = not equals and (not rest or rest[0].startswith("--"))
        if not equals and not bare:
            text = rest.pop(0)
            argument = f"{argument} {text}"
        try:
            overrides.append(_parse_one(name, text.strip(), argument, bare))
        except ValueError as error:
            bad.append(f"{argument}: {error}")
    return overrides, bad


def _stray(argument: str) -> str:
    if argument.startswith("-") and len(argument) > 2 and "." in argument and not argument[1].isdigit():
        return f"an override has two dashes: -{argument}"
    return "does not belong to a key; an override is written --section.key value, a list --section.key '[a, b]'"


def _parse_one(name: str, text: str, argument: str, bare: bool) -> Override:
    """Raises ValueError saying what is missing or wrong."""
    parts = name.split(".")
    location: Location = tuple(int(part) if part.isdigit() and len(part) < 7 else part for part in parts)
    if not all(parts):
        raise ValueError("a key is missing; an override is written --section.key value")
    if bare:
        return Override(location, True, argument, bare=True)
    if not text:
        raise ValueError("has no value; write null for none, '\"\"' for empty text")
    if text[0] not in "[{\"'":
        return Override(location, read_scalar(text), argument)
    parsed = parse_yaml(text)
    if parsed.problems:
        raise ValueError("; ".join(message for _, _, message in parsed.problems))
    return Override(location, parsed.data, argument)


def apply_override(data: dict[str, Any], override: Override) -> None:
    """Write one override into `data`, creating the mappings on the way. Raises ValueError if there is no such place."""
    here: Any = data
    for depth, part in enumerate(override.location, start=1):
        location = override.location[:depth]
        _check_entry(here, part, location)
        key = part if isinstance(here, list) else str(part)
        if isinstance(here, list) and key == len(here):
            here.append(None)
        if depth == len(override.location):
            here[key] = override.value
            return
        if isinstance(here, dict):
            here.setdefault(key, None)
        if here[key] is None:
            here[key] = [] if override.location[depth] == 0 and not _wants_mapping(location) else {}
        here = here[key]


def drop_replaced(data: dict[str, Any], overrides: Sequence[Override]) -> None:
    """Take out of `data` what an override says in another unit: `--train.steps 10` replaces the file's `train.epochs`."""
    typed = {override.location for override in overrides}
    for override in overrides:
        section, key = override.location[:-1], override.location[-1]
        names = ALTERNATIVES.get(section, ())
        if key in names and override.value is not None:
            for other in names:
                if other != key and (*section, other) not in typed:
                    data[str(section[0])].pop(other, None)


def _wants_mapping(location: Location) -> bool:
    annotation = type_at(location)
    return annotation is not None and (section_of(annotation) is not None or "list" not in in_words(annotation))


def _check_entry(here: Any, part: str | int, location: Location) -> None:
    """Raises ValueError saying why `here` can have no `part`."""
    parent = dotted(location[:-1])
    if isinstance(here, list):
        if not isinstance(part, int):
            raise ValueError(f"{parent} is a list: name one of its entries by number, as in {parent}.0.{part}")
        if part > len(here):
            entries = f"its entries are 0 to {len(here) - 1}, and {len(here)} appends"
            raise ValueError(f"{parent} has no entry {part}: {entries if here else 'it is empty, 0 appends'}")
    elif not isinstance(here, dict):
        raise ValueError(f"{parent} is {here!r}, which has no keys")
