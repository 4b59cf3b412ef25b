"""A file and a command line -> RunConfig, or one error that lists every mistake.

Precedence: defaults < file < command line. Checked here, in under half a second and without torch: keys, types,
limits, combinations inside and between sections, and files that the configuration names. Signatures of `_target_`
callables are checked by `targets.check`, which imports them.
Main choice: mistakes are collected, not raised one by one. After the first validation the wrong keys are removed
(or put under the name that was probably meant) and the rest is validated again, so that one typing error hides nothing.
"""

from __future__ import annotations

import copy
import math
import numbers
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from operator import getitem, itemgetter
from pathlib import Path
from typing import Any, Optional, Union

import yaml
from pydantic import BaseModel, ValidationError

from steep.config.checks import CROSS_CHECKS, DISK_CHECKS, nearest_path
from steep.config.errors import ConfigProblems, Problem, problems_of, wrong_type
from steep.config.keys import (
    Location,
    allows_null,
    dotted,
    field_at,
    is_component,
    members,
    section_of,
    section_within,
    type_at,
)
from steep.config.overrides import Override, apply_override, drop_replaced, parse_overrides
from steep.config.recipes import apply_recipe
from steep.config.redact import redact
from steep.config.run import RunConfig
from steep.config.suggestions import suggest_key
from steep.config.yaml_file import MAX_BYTES, Dumper, YamlText, parse_yaml
from steep.core.files import write_text

ConfigLike = Union[RunConfig, Mapping[str, Any], str, os.PathLike[str]]
"""A RunConfig, its values as a mapping, or the path of a YAML file."""


def as_config(config: ConfigLike) -> RunConfig:
    """A checked RunConfig. Raises ConfigError listing every mistake."""
    if isinstance(config, RunConfig):
        return config
    return load_run_config(mapping=config) if isinstance(config, Mapping) else load_run_config(config)


def load_run_config(
    path: Union[str, os.PathLike[str], None] = None,
    overrides: Sequence[str] = (),
    mapping: Optional[Mapping[str, Any]] = None,
) -> RunConfig:
    """Read, check and assemble the configuration of a run.

    path: a YAML (or JSON) file; `mapping`: the same as plain values, for notebooks; give at most one of them.
    overrides: what the command line holds, such as `["--optimizer.learning_rate", "3e-4", "--train.compile"]`.
    Raises ConfigProblems (a ConfigError) listing all mistakes, each with file and line or with the override.
    Relative paths in the configuration are relative to the current directory.
    """
    if path is not None and mapping is not None:
        raise TypeError("load_run_config takes a path or a mapping, not both")
    text = _read_file(Path(path)) if path is not None else YamlText(_plain(mapping or {}))
    draft = _Draft(text, str(path) if path is not None else "")
    draft.override(overrides)
    return draft.finish()


def write_config(config: RunConfig, path: Union[str, os.PathLike[str]]) -> None:
    """Write the resolved configuration as YAML, secrets masked, atomically. Loading it gives an equal RunConfig."""
    head = "# The configuration of this run with every default written out. Secrets are masked.\n"
    write_text(path, head + dump_yaml(redact(config.to_mapping())))


def dump_yaml(value: Any) -> str:
    """Plain values as YAML that this module and stock YAML parsers read alike."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> YamlText:
    """The file's YAML. Raises ConfigProblems for what makes further checks pointless."""
    if path.is_dir():
        inside = sorted(file.name for pattern in ("*.yaml", "*.yml") for file in path.glob(pattern))
        hint = f"; it holds {', '.join(inside[:5])}" if inside else ""
        raise ConfigProblems([f"{path}: is a folder; a configuration is a YAML file{hint}"])
    if not path.exists():
        near = [f"{path}{suffix}" for suffix in (".yaml", ".yml") if Path(f"{path}{suffix}").is_file()]
        hint = f"; did you mean '{near[0]}'?" if near else nearest_path(str(path))
        raise ConfigProblems([f"{path}: does not exist{hint}"])
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigProblems([f"{path}: cannot be read: {error.strerror}"]) from error
    if len(content) > MAX_BYTES:
        raise ConfigProblems(
            [f"{path}: is larger than {MAX_BYTES // 10**6} MB, so it is not a configuration; is it a data file?"]
        )
    text = parse_yaml(_decode(content, path))
    syntax = [f"{path}:{line}: {message}" for line, location, message in text.problems if location == ()]
    if syntax:
        raise ConfigProblems(syntax, origin=str(path))
    if text.data is None:
        raise ConfigProblems([f"{path}:1: is empty; the least a run needs is a model and data, for example\n"
                              "    model: {pretrained: HuggingFaceTB/SmolLM2-135M}\n"
                              "    data: {train: [{path: corpus/*.jsonl}]}"])  # fmt: skip
    if not isinstance(text.data, dict):
        found = "a list" if isinstance(text.data, list) else f"the text {text.data!r:.60}"
        raise ConfigProblems([f"{path}:1: holds {found}; a configuration holds sections: a name, a colon, a space and its keys, "
                              "such as `model: {pretrained: HuggingFaceTB/SmolLM2-135M}`"])  # fmt: skip
    return text


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        wrong = content[error.start]
        raise ConfigProblems(
            [f"{path}:{line}: is not UTF-8: byte 0x{wrong:02X} at position {error.start}; save the file as UTF-8"]
        ) from error


def _plain(value: Any) -> Any:
    """Notebook values as a file would give them: sections and targets as mappings, paths as text, tuples as lists."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)  # numpy's integers too
    return os.fspath(value) if isinstance(value, os.PathLike) else value


# --- checking ---------------------------------------------------------------------------------------------------------


@dataclass
class _Draft:
    """The configuration while it is assembled: its data, where each key came from, and the problems so far."""

    text: YamlText
    file: str
    applied: list[Override] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    """The messages about overrides that cannot be read or applied."""
    problems: list[Problem] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.data: dict[str, Any] = copy.deepcopy(self.text.data)
        self.problems += [Problem(location, message) for _, location, message in self.text.problems]

    def override(self, arguments: Sequence[str]) -> None:
        overrides, self.bad = parse_overrides(arguments)
        for override in overrides:
            try:
                apply_override(self.data, override)
                self.applied.append(override)
            except ValueError as error:
                self.bad.append(f"{override.text}: {error}")
        drop_replaced(self.data, self.applied)

    def finish(self) -> RunConfig:
        """Validate. Raises ConfigProblems if anything is wrong."""
        self.data = apply_recipe(_without_empty_sections(self.data))
        config = self.collect()
        if config is None or self.problems or self.bad:
            raise ConfigProblems(self.lines(), self.problems, self.file or "the configuration")
        return config

    def collect(self) -> Optional[RunConfig]:
        """Find all problems, with every check that can still be made. Returns the configuration, mended where needed."""
        for check in DISK_CHECKS:
            self.add(check(self.data))
        coerced = list(_silently_coerced(self.data, ()))
        self.add(coerced)
        mended, changed = copy.deepcopy(self.data), {problem.location for problem in coerced}
        for location in changed:
            _take_out(mended, location)
        config, guessed = None, set[Location]()
        for _ in range(4):
            try:
                config = RunConfig.model_validate(mended)
                break
            except ValidationError as error:
                errors = error.errors(include_url=False)  # type: ignore[arg-type]
            found = problems_of(errors, mended, self.text.written)  # type: ignore[arg-type]
            self.add(problem for problem in found if not _is_consequence(problem, changed, guessed))
            removed, renamed = _mend(mended, [problem.location for problem in found])
            changed |= removed
            guessed |= renamed
        if config is not None:
            for check in CROSS_CHECKS:
                self.add(problem for problem in check(config) if not _is_consequence(problem, changed, guessed))
        return config

    def add(self, problems: Any) -> None:
        known = {problem.location for problem in self.problems}
        self.problems += [problem for problem in problems if problem.location not in known]

    # --- where things came from ---

    def lines(self) -> list[str]:
        """One line per problem, `file:line: dotted.key: message`, in the order of the file; then the bad overrides."""
        found = []
        for problem in map(self.explain_bare, self.problems):
            places = [self.place_of((*problem.location, name), True) for name in problem.mentions]
            order, prefix = next((place for place in places if place[1]), None) or self.place_of(
                problem.location, False
            )
            name = f"{dotted(problem.location)}: " if problem.location else ""
            message = problem.message
            if any(override.location == problem.location for override in self.applied):
                for key in map(dotted, problem.suggested):  # as it is typed
                    message = message.replace(f" {key}", f" --{key}")
            found.append((order, f"{prefix}{name}{message}", problem.note))
        lines, notes = [], {""}
        for _, line, note in sorted(found, key=itemgetter(0)):
            lines.append(line if note in notes else f"{line}. {note}")
            notes.add(note)
        return lines + self.bad

    def explain_bare(self, problem: Problem) -> Problem:
        """`--optimizer.learning_rate` at the end of a line means true; the mistake is the missing value."""
        for override in self.applied:
            if override.bare and override.location == problem.location and field_at(problem.location) is not None:
                return Problem(problem.location, f"has no value; without one it means true. {problem.message}")
        return problem

    def place_of(self, location: Location, exactly: bool) -> tuple[tuple[Any, ...], str]:
        """(sort key, prefix) of the nearest place that gave `location`; no prefix if nothing gave it exactly."""
        for size in range(len(location), -1, -1):
            for position, override in reversed(list(enumerate(self.applied))):
                on_its_way = override.location[:size] == location and location not in self.text.lines
                if size and (override.location == location[:size] or on_its_way):
                    shown = override.text if len(override.text) <= 80 else override.text[:79] + "…"
                    return (1, position), f"{shown}: "
            if location[:size] in self.text.lines:
                line = self.text.lines[location[:size]]
                return (0, line), f"{self.file}:{line}: "
            if exactly:
                return (2,), ""
        return (0, 0) if self.file else (2,), f"{self.file}: " if self.file else ""


def _is_consequence(problem: Problem, changed: set[Location], guessed: set[Location]) -> bool:
    """Whether a problem may only exist because a wrong key was removed, or was put under a name that was guessed.

    A problem of the value alone, at the guessed key itself, is not one: the value is wrong under either name.
    """
    if problem.location in changed:
        return True
    named = set(re.findall(r"[\w.]+", problem.message))
    if any(dotted(key) in named or (key[:-1] == problem.location and key[-1] in named) for key in guessed):
        return True
    if problem.mentions:
        return any((*problem.location, name) in changed for name in problem.mentions)
    holds_keys = section_within(type_at(problem.location)) is not None
    return holds_keys and any(location[: len(problem.location)] == problem.location for location in changed)


def _mend(data: Any, locations: list[Location]) -> tuple[set[Location], set[Location]]:
    """Remove wrong keys from `data`; a misspelt key of the same section is put under its right name instead.

    Returns the locations whose absence may have consequences, and the right names that were guessed.
    """
    changed: set[Location] = set()
    guessed: set[Location] = set()
    for location in locations:
        found, value = _take_out(data, location)
        changed.add(location)
        if not found or field_at(location) is not None:
            continue
        suggestion = suggest_key(location) if isinstance(location[-1], str) else None
        if suggestion and suggestion.location[:-1] != location[:-1]:
            changed.add(suggestion.location)
        elif suggestion:
            section = reduce(getitem, suggestion.location[:-1], data)
            if isinstance(section, dict) and suggestion.location[-1] not in section:
                section[suggestion.location[-1]] = value
                changed.discard(location)
                guessed.add(suggestion.location)
    return changed, guessed


def _take_out(data: Any, location: Location) -> tuple[bool, Any]:
    """Remove a key; an entry of a list stays as a placeholder, so that the others keep their positions."""
    with suppress(LookupError, TypeError):  # nothing is there, or the location is ()
        section = reduce(getitem, location[:-1], data)
        if isinstance(section, dict) and location[-1] in section:
            return True, section.pop(location[-1])
    return False, None


def _without_empty_sections(data: dict[str, Any]) -> dict[str, Any]:
    """`schedule:` with nothing under it (all commented out) is the section with its defaults."""
    filled = dict(data)
    for name, value in data.items():
        known = RunConfig.model_fields.get(name)
        if value is None and known is not None and section_of(known.annotation) and not allows_null(known.annotation):
            filled[name] = {}
    return filled


def _silently_coerced(value: Any, location: Location) -> Iterator[Problem]:
    """What pydantic would accept silently: true as the number 1, and numbers that are not finite."""
    annotation = type_at(location)
    if annotation is None or (isinstance(value, dict) and "_target_" in value and is_component(annotation)):
        return
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _silently_coerced(item, (*location, key))
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _silently_coerced(item, (*location, position))
    elif isinstance(value, bool) and bool not in members(annotation) and {int, float} & set(members(annotation)):
        yield wrong_type(location, value)
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(location, f"{value} is not a finite number")
