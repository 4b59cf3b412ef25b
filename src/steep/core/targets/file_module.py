"""A Python file as a module of its own, and the errors of foreign code in one line."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import traceback
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Optional

from steep.core.errors import ConfigError
from steep.core.targets.finding import absolute

FILE_MODULE = "steep_target_"


def import_file(file: str, name: str, written: str) -> ModuleType:
    """Import a file under its own name; sys.path is not changed. An unchanged file is imported once."""
    path = absolute(file)
    if path.suffix != ".py" or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"{written!r} is not the name of a callable; write ./file.py:name, or package.module.name")
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{written}: {_unreadable(path, file, error)}") from error
    digest = hashlib.sha256(str(path).encode() + b"\0" + source).hexdigest()[:12]
    module_name = f"{FILE_MODULE}{path.stem}_{digest}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None, "a .py file has a spec"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickling look up a class's module there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ConfigError(f"{written}: {own_words(error, path)}") from error
    return module


def _unreadable(path: Path, file: str, error: OSError) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"the file {file} cannot be read: {error.strerror}"
    there = [entry.name for entry in path.parent.glob("*.py")] if path.parent.is_dir() else []
    near = get_close_matches(path.name, there, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; it was looked for at {path}"
    return f"the file {file} does not exist{hint}"


def own_words(error: BaseException, path: Optional[Path] = None) -> str:
    """An exception of foreign code in one line: where it was raised, what it says, and the remedy if it is known."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_relative(error.filename)}:{error.lineno}: SyntaxError: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if path is not None and frame.filename == str(path)]
    package = os.path.dirname(__file__)
    foreign = [f for f in frames if os.path.dirname(f.filename) != package and "importlib" not in f.filename]
    last = (own or foreign)[-1:]
    place = f"{_relative(last[0].filename)}:{last[0].lineno}: " if last else ""
    hint = _neighbour_hint(error, path.parent) if path is not None and isinstance(error, ModuleNotFoundError) else ""
    return f"{place}{type(error).__name__}: {error}{hint}"


def _neighbour_hint(error: ModuleNotFoundError, folder: Path) -> str:
    """What to do if the missing module lies beside the file."""
    top = str(error.name).partition(".")[0]
    if not (folder / f"{top}.py").exists() and not (folder / top).is_dir():
        return ""
    return f". {top} is beside it, but a file is imported alone: set PYTHONPATH={_relative(str(folder))}"


def _relative(file: str) -> str:
    relative = os.path.relpath(file)
    return file if relative.startswith(os.path.join("..", "..")) else relative
