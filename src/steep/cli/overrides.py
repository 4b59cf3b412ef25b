"""Which arguments of a command line are overrides: those that name a configuration key with a dot."""

from __future__ import annotations

from collections.abc import Sequence


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into what typer parses and the overrides: `--a.b value`, `--a.b=value`, `--a.b`.

    An override takes the next argument as its value unless that begins with `--`.
    """
    plain: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, _ = argument.partition("=")
        if not (argument.startswith("--") and "." in name):
            plain.append(argument)
            continue
        overrides.append(argument)
        if not equals and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return plain, overrides
