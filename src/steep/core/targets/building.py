"""Targets called: first their arguments are compared with the signatures of what they name, then nested targets are built."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from difflib import get_close_matches
from typing import Any, Union

from steep.core.errors import ConfigError
from steep.core.say import Say
from steep.core.section import Target
from steep.core.targets.file_module import own_words
from steep.core.targets.finding import Location, TargetProblems, as_target, dotted, in_front, walk
from steep.core.targets.no_code import WHAT_NO_CODE_ALLOWS, announce, code_arguments, refusal
from steep.core.targets.resolving import resolve


def check(value: Any, *, given: Collection[str] = (), allow_code: bool = True, location: str = "") -> None:
    """Resolve every target in `value` and compare its arguments with the callable's signature; call nothing.

    given: arguments that steep will add to the outermost target (`extra` of `build`).
    Raises TargetProblems listing everything: refused targets, unknown names, unknown and missing arguments.
    """
    start: Location = tuple(location.split(".")) if location else ()
    found = [(place, in_front(dotted(place)), target) for place, target in walk(value, start)]
    problems = [
        f"{front}{target.target} is refused by --no-code: {reason}"
        for _, front, target in found
        if not allow_code and (reason := refusal(target.target))
    ]
    if problems:
        raise TargetProblems(problems, f"{WHAT_NO_CODE_ALLOWS}.")  # before anything is imported
    for place, front, target in found:
        code = [] if allow_code else list(code_arguments(target.arguments, place))
        try:
            function = resolve(target, allow_code=allow_code)
        except ConfigError as error:
            problems += [f"{front}{error}", *code]
        else:
            lines = signature_problems(function, target, given if place == start else ())
            problems += [*code, *(f"{front}{line}" for line in lines)]
    if problems:
        raise TargetProblems(problems)


def check_run(config: Any, say: Say, allow_code: bool) -> None:
    """Print every foreign target of a RunConfig before it is imported, then check all signatures.

    Raises ConfigError with every problem. Imports what the targets name, torch and transformers too; loads no weights.
    """
    announce(config, say)
    problems = []
    for name, given in (("model", ()), ("optimizer", ("params",)), ("trackers", ())):
        try:
            check(getattr(config, name), given=given, allow_code=allow_code, location=name)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def signature_problems(found: Callable[..., Any], target: Target, given: Collection[str] = ()) -> list[str]:
    """What is wrong with a target's arguments: one line each. Empty for callables that have no readable signature."""
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):  # some functions written in C have none
        return []
    named = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    written = target.target
    both = [name for name in target.arguments if name in given]
    problems = [f"{written}: {name} is given by steep; leave it out" for name in both]
    if not takes_any:
        problems += [f"{written} {_unknown_argument(name, named)}" for name in target.arguments if name not in named]
        problems += [f"{written} does not take {name!r}, which steep gives it" for name in given if name not in named]
    known = {*target.arguments, *given}
    missing = [name for name, p in named.items() if p.default is p.empty and name not in known]
    problems += [f"{written} needs the argument {_annotated(name, named)}, which is not given" for name in missing]
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    problems += [f"{written} takes {name!r} by position only; wrap it in your own function" for name in positional]
    return problems


def _unknown_argument(name: str, named: dict[str, inspect.Parameter]) -> str:
    if name.startswith("_") and name.endswith("_"):
        return f"cannot be given {name!r}: of Hydra's keys steep knows only _target_"
    near = get_close_matches(name, list(named), n=1, cutoff=0.55)
    takes = f". It takes: {', '.join(named)}" if named else ". It takes no arguments"
    return f"has no argument {name!r}" + (f"; did you mean {near[0]!r}?" if near else takes)


def _annotated(name: str, named: dict[str, inspect.Parameter]) -> str:
    annotation = named[name].annotation
    if annotation is inspect.Parameter.empty:
        return repr(name)
    return f"{name!r} ({annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)})"


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
    if not allow_code and (problems := list(code_arguments(arguments, location))):
        raise TargetProblems(problems)  # what a nested target became
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
