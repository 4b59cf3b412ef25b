"""A wrong call of a function of `import steep` is answered like a wrong key of a configuration: with what was probably meant."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Protocol, TypeVar, cast

from steep.core.errors import CallError
from steep.core.file_errors import explain_file_error

Function = TypeVar("Function", bound=Callable[..., Any])


class Readable(Protocol):
    """A result that Python shows as text for people. Its dataclass is made with repr=False."""

    def to_text(self) -> str:
        """For people."""

    def __repr__(self) -> str:
        return self.to_text()


def public(function: Function) -> Function:
    """The function, which raises CallError for an argument that is misspelt, missing or too many, and FileError for what the
    file system refuses.

    Its name, docstring and signature stay as they are.
    """
    signature = inspect.signature(function)
    names = [name for name, parameter in signature.parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    takes_any = len(names) < len(signature.parameters)

    @functools.wraps(function)
    def checked(*arguments: Any, **keywords: Any) -> Any:
        if not takes_any:
            refuse_unknown(function.__name__, keywords, names)
        try:
            signature.bind(*arguments, **keywords)
        except TypeError as error:
            raise CallError(f"steep.{function.__name__}: {error}. It takes {', '.join(names)}") from None
        try:
            return function(*arguments, **keywords)
        except Exception as error:
            explained = explain_file_error(error)
            if explained is None:
                raise
            raise explained from error

    return cast(Function, checked)


def refuse_unknown(function: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise CallError if a keyword that was given is not known."""
    names = list(known)
    lines = []
    for name in given:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            lines.append(f"steep.{function} has no keyword {name} (given {given[name]!r:.60}){hint}")
    if lines:
        raise CallError("\n".join([*lines, f"It takes {', '.join(names)}"]))
