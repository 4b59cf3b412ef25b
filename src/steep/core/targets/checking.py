"""The arguments of targets compared with the signatures of what they name, before anything is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Optional

from steep.core.errors import ConfigError
from steep.core.say import Say
from steep.core.section import Target
from steep.core.targets.finding import Location, TargetProblems, dotted, in_front, walk
from steep.core.targets.no_code import WHAT_NO_CODE_ALLOWS, announce, code_arguments, refusal
from steep.core.targets.resolving import resolve


def check(value: Any, *, given: Collection[str] = (), allow_code: bool = True, location: str = "") -> None:
    """Resolve every target in `value` and compare its arguments with the callable's signature; call nothing.

    given: arguments that steep will add to the outermost target (`extra` of `build`).
    Raises TargetProblems listing everything: refused targets, unknown names, unknown and missing arguments.
    """
    problems = [problem for checked in _check_all(value, given, allow_code, location) for problem in checked.problems]
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


@dataclass(frozen=True)
class _Checked:
    location: str
    callable: Optional[Callable[..., Any]]
    problems: list[str]


def _check_all(value: Any, given: Collection[str], allow_code: bool, location: str) -> list[_Checked]:
    start: Location = tuple(location.split(".")) if location else ()
    found = list(walk(value, start))
    if not allow_code and (
        refused := [_refused_line(place, target) for place, target in found if refusal(target.target)]
    ):
        raise TargetProblems(refused, f"{WHAT_NO_CODE_ALLOWS}.")  # before anything is imported
    return [_check_one(place, target, given if place == start else (), allow_code) for place, target in found]


def _refused_line(place: Location, target: Target) -> str:
    return f"{in_front(dotted(place))}{target.target} is refused by --no-code: {refusal(target.target)}"


def _check_one(place: Location, target: Target, given: Collection[str], allow_code: bool) -> _Checked:
    location = dotted(place)
    problems = [] if allow_code else list(code_arguments(_without_nested(target.arguments), place))
    try:
        found = resolve(target, allow_code=allow_code)
    except ConfigError as error:
        return _Checked(location, None, [f"{in_front(location)}{error}", *problems])
    problems += [f"{in_front(location)}{line}" for line in signature_problems(found, target, given)]
    return _Checked(location, found, problems)


def _without_nested(value: Any) -> Any:
    """The arguments without nested targets, which are checked separately."""
    if isinstance(value, dict):
        return {
            key: _without_nested(item)
            for key, item in value.items()
            if not (isinstance(item, dict) and "_target_" in item)
        }
    return [_without_nested(item) for item in value] if isinstance(value, list) else value


def signature_problems(found: Callable[..., Any], target: Target, given: Collection[str] = ()) -> list[str]:
    """What is wrong with a target's arguments: one line each. Empty for callables that have no readable signature."""
    parameters = _parameters(found)
    if parameters is None:
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


def _parameters(found: Callable[..., Any]) -> Optional[dict[str, inspect.Parameter]]:
    try:
        return dict(inspect.signature(found).parameters)
    except (TypeError, ValueError):  # some functions written in C have none
        return None


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
