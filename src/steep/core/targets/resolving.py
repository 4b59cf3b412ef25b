"""From the name of a target to the callable, imported. A wrong name is an error that names the nearest right one."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, Union

from steep.core.errors import ConfigError
from steep.core.section import Target
from steep.core.targets.file_module import FILE_MODULE, import_file, own_words
from steep.core.targets.finding import split_file
from steep.core.targets.no_code import refusal, refusal_of_object, refused


def resolve(target: Union[Target, str], *, allow_code: bool = True) -> Callable[..., Any]:
    """The callable that a target names, imported. Raises ConfigError naming the nearest module or object."""
    written = target.target if isinstance(target, Target) else target
    if not allow_code and (reason := refusal(written)):
        raise refused(written, reason)
    file = split_file(written)
    if file is not None:
        found = _attribute(import_file(*file, written), file[1].split("."), written)
    else:
        found = _resolve_import_path(written, only_own=not allow_code)
    if not callable(found):
        raise ConfigError(_not_callable(found, written))
    if not allow_code and (reason := refusal_of_object(found, written)):
        raise refused(written, reason)
    return found  # type: ignore[no-any-return]


def _resolve_import_path(written: str, only_own: bool) -> Any:
    parts = written.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{written!r} is not the name of a callable; write package.module.name or ./file.py:name")
    module, used = _import_longest(parts, written)
    found: Any = module
    for position in range(used, len(parts)):
        found = _attribute(found, parts[position : position + 1], written)
        if only_own and isinstance(found, ModuleType) and found.__name__.partition(".")[0] != parts[0]:
            raise refused(written, f"{'.'.join(parts[: position + 1])} is the module {found.__name__!r}")
    return found


def _import_longest(parts: list[str], written: str) -> tuple[ModuleType, int]:
    """The module with the longest name that `parts` begin with, and how many parts that name has."""
    module = _import_module(parts[0], written)
    for count in range(2, len(parts)):
        name = ".".join(parts[:count])
        is_module = isinstance(vars(module).get(parts[count - 1], module), ModuleType)  # or not imported yet
        if not is_module or not hasattr(module, "__path__") or importlib.util.find_spec(name) is None:
            return module, count - 1
        module = _import_module(name, written)
    return module, len(parts) - 1


def _import_module(name: str, written: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        is_absent = isinstance(error, ModuleNotFoundError) and error.name == name
        raise ConfigError(f"{written}: {_no_such_module(name) if is_absent else own_words(error)}") from error


def _no_such_module(name: str) -> str:
    top = name.partition(".")[0]
    if Path(f"{top}.py").is_file() or Path(top).is_dir():
        place = f"./{top}.py:name" if Path(f"{top}.py").is_file() else f"./{top}/file.py:name"
        return (
            f"no package {top!r} is installed, but it is in the current directory: write {place}, or set PYTHONPATH=."
        )
    near = get_close_matches(top, {module.name for module in pkgutil.iter_modules()}, n=1, cutoff=0.75)
    hint = f"; did you mean {near[0]!r}?" if near else "; install it, or name a file as in ./my_model.py:build"
    return f"no package {top!r} is installed{hint}"


def _attribute(found: Any, names: list[str], written: str) -> Any:
    for name in names:
        try:
            found = getattr(found, name)
        except AttributeError as error:
            if name in _submodules(found):
                raise ConfigError(f"{written} is a module; name a function or class in it") from error
            owner = getattr(found, "__name__", type(found).__name__)
            public = [other for other in dir(found) if not other.startswith("_")]
            names_there = [*public, *_submodules(found)]
            same = [other for other in names_there if other.lower() == name.lower()]
            near = same[:1] or get_close_matches(name, names_there, n=1, cutoff=0.6)
            few = f"; it has {', '.join(public[:8])}" if 0 < len(public) <= 8 else ""
            hint = f"; did you mean {near[0]!r}?" if near else few
            raise ConfigError(f"{written}: {_display(owner)} has no {name!r}{hint}") from error
        except ImportError as error:  # transformers' lazy modules import on access
            raise ConfigError(f"{written}: {own_words(error)}") from error
    return found


def _display(owner: str) -> str:
    module = sys.modules.get(owner)
    file = getattr(module, "__file__", None)
    return f"the file {os.path.relpath(file)}" if file and owner.startswith(FILE_MODULE) else owner


def _submodules(found: Any) -> list[str]:
    return [module.name for module in pkgutil.iter_modules(found.__path__)] if hasattr(found, "__path__") else []


def _not_callable(found: Any, written: str) -> str:
    if not isinstance(found, ModuleType):
        return f"{written} is {found!r:.60}, which cannot be called; a function or class is needed"
    names = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
    own = [name for name in names if getattr(vars(found)[name], "__module__", None) == found.__name__]
    examples = ", ".join(f"{written}.{name}" for name in own[:3])
    return f"{written} is a module; name a function or class in it" + (f", such as {examples}" if examples else "")
