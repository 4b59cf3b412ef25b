"""Mistakes in a configuration, in words for the person who made them: one line each, all of them at once.

In: pydantic's errors and the data they are about. Out: `Problem`s, which say where, what was given, what is needed
and which key was probably meant; and the ConfigError that lists them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from steep.config.keys import (
    Location,
    allows_null,
    bounds,
    choices,
    dotted,
    field_at,
    in_words,
    item_type,
    meaning_of,
    members,
    number_kind,
    section_of,
    strip_tags,
    type_at,
    types_in_words,
)
from steep.config.redact import redact
from steep.config.suggestions import suggest_key
from steep.core.errors import ConfigError
from steep.core.units import parse_count

_IS_NEEDED = "is needed and not given"


@dataclass(frozen=True)
class Problem:
    """One mistake. `location` is the key it is about; () for the file as a whole."""

    location: Location
    message: str
    mentions: tuple[str, ...] = ()
    """Keys inside `location` that the message is about: the first that was given decides the line."""
    note: str = ""
    """A sentence that several problems may share; it is shown with the first of them."""
    suggested: tuple[Location, ...] = ()
    """Keys that the message suggests instead of the one at `location`."""


class ConfigProblems(ConfigError):
    """A configuration with mistakes. `problems` holds them with their locations, the text lists them with lines."""

    def __init__(self, lines: Sequence[str], problems: Sequence[Problem] = (), origin: str = "the configuration"):
        self.problems = tuple(problems)
        self.lines = tuple(lines)
        head = f"{len(lines)} problems in {origin}:\n  " if len(lines) > 1 else ""
        super().__init__(head + "\n  ".join(lines))


EXAMPLES: dict[Location, str] = {
    ("model",): "model: {pretrained: HuggingFaceTB/SmolLM2-135M}",
    ("data",): "data: {train: [{path: corpus/*.jsonl}]}",
    ("data", "train"): "train: [{path: corpus/*.jsonl}]",
}


def shown(value: Any, key: str = "") -> str:
    """A value as the user wrote it, short, secrets masked."""
    value = redact({key: value})[key]
    try:
        text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else repr(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:58] + "…" + text[-1]


# --- unknown keys ---------------------------------------------------------------------------------------------------


def unknown_key(location: Location, value: Any, written: str = "") -> Problem:
    """The problem of a key that does not exist. written: its value as written in the file."""
    key = str(location[-1])
    given = (
        f" (given {written or shown(value, key)})" if not isinstance(value, (dict, list)) and value is not None else ""
    )
    suggestion = suggest_key(location)
    if suggestion is None:
        section = section_of(type_at(location[:-1]))
        place = f"keys of {dotted(location[:-1])}" if len(location) > 1 else "sections"
        note = f"The {place} are: {', '.join(section.model_fields)}." if section is not None else ""
        return Problem(location, f"there is no such key{given}", note=note)
    remark = f" ({suggestion.remark})" if suggestion.remark else ""
    keys = (suggestion.location, *suggestion.others)
    candidates = " or ".join(map(dotted, keys))
    return Problem(location, f"there is no such key{given}; did you mean {candidates}?{remark}", suggested=keys)


# --- pydantic's errors in plain words -------------------------------------------------------------------------------


def problems_of(errors: Sequence[Mapping[str, Any]], data: Any, written: Mapping[Location, str]) -> list[Problem]:
    """pydantic's errors about `data` as problems; alternatives of one union become one problem.

    written: numbers, booleans and nulls as they stand in the file (`1e-4`, `007`), where that is known.
    """
    found: dict[Location, Problem] = {}
    cleaned = [(strip_tags(tuple(error["loc"])), error) for error in errors]
    places = {location for location, _ in cleaned}
    for location, error in cleaned:
        inner = any(len(other) > len(location) and other[: len(location)] == location for other in places)
        if inner and error["type"].endswith("_type"):
            continue  # another alternative of the union got further: its errors say more
        if location not in found:
            found[location] = _translate(location, error, written.get(location, ""))
    return [problem for problem in found.values() if not _is_misspelt(problem, found)]


def _is_misspelt(problem: Problem, found: Mapping[Location, Problem]) -> bool:
    """Whether a missing key is present under a wrong name, which is reported by itself."""
    if not problem.message.startswith(_IS_NEEDED):
        return False
    unknown = [location for location in found if field_at(location) is None and location[:-1] == problem.location[:-1]]
    suggestions = [suggest_key(location) for location in unknown]
    size = len(problem.location)
    return any(suggestion and suggestion.location[:size] == problem.location for suggestion in suggestions)


def _translate(location: Location, error: Mapping[str, Any], written: str) -> Problem:
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return unknown_key(location, value, written)
    if kind == "missing" and isinstance(location[-1], int):
        return Problem(location[:-1], f"{shown(value)} is too short; {needed(location[:-1])} is needed")
    if kind == "missing":
        return _missing(location)
    if kind == "value_error":
        return _value_error(location, error, value)
    if kind == "literal_error":
        return Problem(location, _bad_choice(location, value))
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"):
        return Problem(location, f"{shown(value)} is out of range; {needed(location)} is needed")
    if kind in ("too_short", "string_too_short") and not value:
        return Problem(location, "is empty; at least one entry is needed" if kind == "too_short" else "is empty")
    if kind == "string_pattern_mismatch":
        return Problem(location, _bad_pattern(location, value, error["ctx"]["pattern"]))
    if kind.endswith(("_type", "_parsing", "_from_float")) or kind in ("int_parsing_size", "too_long", "too_short"):
        return wrong_type(location, value, written)
    return Problem(location, f"{error['msg'][:1].lower()}{error['msg'][1:]} (given {shown(value, str(location[-1]))})")


def needed(location: Location) -> str:
    """The value that the key at `location` takes, in words, with its limits."""
    field = field_at(location)
    annotation = type_at(location)
    if annotation is None:
        return "another value"
    limits = bounds(field)
    kind = number_kind(field)
    words = kind if kind is not None and not limits else in_words(annotation)
    if kind is not None and limits in (" of at least 0", " of at least 1"):
        return kind + (", at least 1" if limits.endswith("1") else "")
    return words + limits


def wrong_type(location: Location, value: Any, written: str = "") -> Problem:
    """The problem of a value whose type is not the key's."""
    if value is None:
        return Problem(location, f"is empty (null); {needed(location)} is needed, or leave the key out")
    given, hint = shown(value, str(location[-1]) if location else ""), _conversion(location, value, written)
    if isinstance(value, (bool, str)):
        return Problem(location, f"{given} is not {needed(location)}{hint}")
    kinds: list[tuple[Any, str]] = [((int, float), "a number"), (list, "a list"), (Mapping, "a mapping")]
    kind = next((word for types, word in kinds if isinstance(value, types)), f"a {type(value).__name__}")
    return Problem(location, f"{given} is {kind}; {needed(location)} is needed{hint}")


def _conversion(location: Location, value: Any, written: str) -> str:
    """How to write the value correctly, as the end of the sentence, where that is clear."""
    takes = in_words(type_at(location))
    if isinstance(value, str) and value in ("None", "none", "nil") and allows_null(type_at(location)):
        return "; for no value write null"
    if isinstance(value, str) and "number" in takes:
        try:
            return f"; write {parse_count(value)}"
        except ValueError:
            return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and "text" in takes:
        return f"; put it in quotes: '{written or value}'"
    return _wrapped(type_at(location), value) or _as_section(location, value)


def _wrapped(annotation: Any, value: Any) -> str:
    """The brackets or braces that a value lacks: a list's one entry, a mapping's name."""
    item = section_of(item_type(annotation))
    first = next(iter(item.model_fields)) if item else ""
    if "list" in in_words(annotation) and isinstance(value, (str, Mapping)):
        entry = "{" + ", ".join(f"{key}: …" for key in value) + "}" if isinstance(value, Mapping) else str(value)
        return f"; write [{{{first}: {entry[:60]}}}]" if item and isinstance(value, str) else f"; write [{entry[:60]}]"
    if item and isinstance(value, (str, list)):
        return f"; give each a name, as in {{domain: {{{first}: …}}}}"
    return ""


def _as_section(location: Location, value: Any) -> str:
    """The correction of a section given as the value of its first key: `model: some/model`, `schedule: cosine`."""
    section = section_of(type_at(location))
    if section is None or not isinstance(value, str):
        return ""
    if location in EXAMPLES and location != ("model",):
        return f"; write it like `{EXAMPLES[location]}`"
    first, field = next(iter(section.model_fields.items()))
    takes_text = str in members(field.annotation) or bool(choices(field.annotation))
    return f"; write {{{first}: {value[:60]}}}" if takes_text else ""


def _missing(location: Location) -> Problem:
    meaning = meaning_of(location).split(". ")[0].rstrip(".:")
    message = _IS_NEEDED + (f" ({meaning[0].lower()}{meaning[1:]})" if meaning else "")
    if example := EXAMPLES.get(location):
        message += f", for example `{example}`"
    return Problem(location, message)


def _value_error(location: Location, error: Mapping[str, Any], value: Any) -> Problem:
    message = str(error["ctx"]["error"]) if "ctx" in error and "error" in error["ctx"] else error["msg"]
    section = section_of(type_at(location))
    if section is None:
        return Problem(location, message)
    words = re.findall(r"[a-z_]+", message)
    mentions = tuple(dict.fromkeys(word for word in words if word in section.model_fields))
    return Problem(location, message, mentions)


def _bad_choice(location: Location, value: Any) -> str:
    names = choices(type_at(location))
    near = get_close_matches(str(value).lower().replace("-", "_"), names, n=1, cutoff=0.55)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    others = types_in_words(type_at(location))
    return f"{shown(value)} is not a choice{hint} It can be: {', '.join(filter(None, (*names, others)))}"


def _bad_pattern(location: Location, value: Any, pattern: str) -> str:
    if location == ("run", "name"):
        fits = re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).strip("-._") or "my-run"
        return (
            f"{shown(value)} cannot be the name of a folder here: use letters, digits, `.`, `_` and `-`, and begin "
            f"with a letter or digit, as in {fits!r}. The folder is created in run.directory"
        )
    return f"{shown(value)} does not have the form {pattern}"
