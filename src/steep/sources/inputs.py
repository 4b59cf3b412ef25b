"""From what the user named (files, folders, globs) to a sorted list of files, each with its format.

Folders are searched recursively; hidden files and folders are ignored; files reached twice are taken once.
"""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Union

from steep.core.errors import DataError
from steep.core.plugins import load_plugin, plugin_names
from steep.sources.config import SourceConfig
from steep.sources.files import content_suffix

NOT_FORMATS = ("config", "document", "files", "inputs")


@dataclass(frozen=True)
class InputFile:
    """One file of a source."""

    path: Path
    format: str


def format_names() -> list[str]:
    """The formats that can be read: the file names in steep/sources/."""
    return plugin_names("steep.sources", NOT_FORMATS)


def load_format(name: str) -> ModuleType:
    """The module of a format: `read(path, config, span=None)`, `ENDINGS`, and `split(path, part_bytes)` if it has parts."""
    return load_plugin("steep.sources", name, NOT_FORMATS)


def known_endings() -> dict[str, str]:
    """Ending -> format, over all formats."""
    return {ending: name for name in format_names() for ending in load_format(name).ENDINGS}


def expand_inputs(config: SourceConfig) -> list[InputFile]:
    """The files of a source, in the order of its paths and sorted within each.

    Raises DataError for a path that is not there, a folder or glob without files, and endings that tell no format.
    """
    files = _unique([file for path in paths_of(config) for file in expand_path(path)])
    if config.format not in ("auto", "store"):
        return [InputFile(file, config.format) for file in files]
    endings = known_endings()
    unknown = [file for file in files if content_suffix(file) not in endings]
    if unknown:
        raise DataError(_unknown_endings(unknown, endings))
    return [InputFile(file, endings[content_suffix(file)]) for file in files]


def paths_of(config: SourceConfig) -> list[str]:
    """The paths as the user wrote them, `~` expanded. Raises DataError if there is none."""
    path: Union[str, list[str], None] = config.path
    paths = [path] if isinstance(path, str) else list(path or [])
    if not paths:
        raise DataError("the source names no path")
    return [os.path.expanduser(path) for path in paths]


def expand_path(path: str) -> list[Path]:
    """The files that one path, folder or glob stands for. Raises DataError if there are none."""
    if os.path.isdir(path):
        files = folder_files(Path(path))
        if not files:
            raise DataError(f"{path}: the folder holds no files (hidden files are ignored).")
        return files
    if os.path.isfile(path):
        return [Path(path)]
    if os.path.lexists(path):
        raise DataError(f"{path}: is neither a file nor a folder (a broken link or a device?).")
    if glob.has_magic(path):
        matches = sorted(glob.glob(path, recursive=True), key=lambda match: Path(match).parts)
        files = [file for match in matches for file in _matched(match)]
        if not files:
            raise DataError(
                f"{path}: the pattern matches no file. Quote it so that the shell leaves it alone, and check the folder."
            )
        return files
    raise DataError(f"{path}: there is no such file or folder{_nearest_existing(path)}.")


def folder_files(folder: Path) -> list[Path]:
    """All files below `folder`, sorted by path, links followed once: a loop of links ends."""
    found: list[Path] = []
    seen: set[str] = set()
    for directory, names, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        found += [Path(directory, name) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda path: path.parts)


def _matched(match: str) -> list[Path]:
    if os.path.isdir(match):
        return [] if os.path.basename(match.rstrip("/")).startswith(".") else folder_files(Path(match))
    return [Path(match)]


def _unique(files: list[Path]) -> list[Path]:
    kept: dict[str, Path] = {}
    for file in files:
        kept.setdefault(os.path.realpath(file), file)
    return list(kept.values())


def _nearest_existing(path: str) -> str:
    parent = Path(path).absolute().parent
    while not parent.exists():
        parent = parent.parent
    return f" (the nearest that exists is {parent})"


def _unknown_endings(unknown: list[Path], endings: dict[str, str]) -> str:
    names = sorted({content_suffix(file) or "(none)" for file in unknown})
    return (
        f"{len(unknown)} file(s) have endings that tell no format: {', '.join(names)}, for example {unknown[0]}.\n"
        f"  Known endings: {', '.join(sorted(endings))}, each also with .gz or .zst (not .parquet).\n"
        f"  Give a pattern that takes only the right files, or set format to one of: {', '.join(format_names())}."
    )
