"""From what the user named (files, folders, globs, hub datasets) to a sorted list of files, each with its format.

Folders are searched recursively; hidden files and folders are ignored; files reached twice are taken once. Anything
that is not a regular file (a pipe, a device, a broken link) is an error, never skipped: reading it could block for ever.
"""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Union, cast

from steep.config.sections import checked_section
from steep.core.errors import DataError
from steep.core.listing import unlistable_folder
from steep.core.plugins import load_plugin, plugin_names
from steep.core.say import Say, tell
from steep.core.units import counted
from steep.sources.code_folder import CodeFolder, advice_lines, code_folder
from steep.sources.config import TEXT_FORMATS, SourceConfig
from steep.sources.document import Document
from steep.sources.dropped import DroppedCount, dropped_line
from steep.sources.files import content_suffix
from steep.sources.formats import TextFormat
from steep.sources.lingua import without_held_out

FORMATS = "steep.sources.formats"
HUB_PREFIX = "hub:"
STANDARD_INPUT = "-"


@dataclass(frozen=True)
class InputFile:
    """One file of a source."""

    path: Path
    format: str


def load_format(name: str) -> TextFormat:
    """The module of a format."""
    return cast(TextFormat, load_plugin(FORMATS, name))


def known_endings() -> dict[str, str]:
    """Ending -> format, over all formats."""
    return {ending: name for name in plugin_names(FORMATS) for ending in load_format(name).ENDINGS}


def expand_inputs(config: SourceConfig) -> list[InputFile]:
    """The files of a source, in the order of its paths and sorted within each.

    Raises DataError for a path that does not exist, a folder or glob without files, and endings that no format has.
    """
    found: dict[str, Path] = {}
    for file in [file for path in paths_of(config) for file in _expand(path, config.format)]:
        found.setdefault(str(file) if is_hub(file) else os.path.realpath(file), file)
    files = list(found.values())
    for file in files:
        try:
            str(file).encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{str(file)!a}: the name of the file is not UTF-8. Rename it.") from error
    if config.format not in ("auto", "store"):
        return [InputFile(file, "hub" if is_hub(file) else config.format) for file in files]
    endings = known_endings()
    unknown = [file for file in files if not is_hub(file) and content_suffix(file) not in endings]
    if unknown:
        names = sorted({content_suffix(file) or "(none)" for file in unknown})
        known = sorted(ending for ending, name in endings.items() if name != "code")
        advice = [f"  {line[:1].upper()}{line[1:]}\n" for line in advice_lines(names)]
        raise DataError(
            f"{counted(len(unknown), 'file')} of no known format: {', '.join(names)}, for example {unknown[0]}.\n"
            f"{''.join(advice)}"
            f"  Known endings: {', '.join(known)}, each also with .gz or .zst (not .parquet); and those of source code.\n"
            f"  Give a pattern that matches only the right files, or set format to one of: {', '.join(TEXT_FORMATS)}."
        )
    return [InputFile(file, "hub" if is_hub(file) else endings[content_suffix(file)]) for file in files]


def is_hub(path: Union[str, Path]) -> bool:
    """Whether a path names a dataset that the `datasets` library streams."""
    return str(path).startswith(HUB_PREFIX)


def paths_of(config: SourceConfig) -> list[str]:
    """The paths as the user wrote them, `~` expanded. Raises DataError if there are none."""
    path: Union[str, list[str], None] = config.path
    paths = [path] if isinstance(path, str) else list(path or [])
    if not paths:
        raise DataError("the source names no path")
    return [os.path.expanduser(path) for path in paths]


def code_folders(config: SourceConfig) -> list[tuple[str, CodeFolder]]:
    """The folders of a source that are read as code. Raises DataError."""
    if config.format not in ("auto", "store"):
        return []
    folders = [match for path in paths_of(config) for match in _folders(path)]
    found = [(folder, code_folder(Path(folder), folder_files(Path(folder)), known_endings())) for folder in folders]
    return [(folder, code) for folder, code in found if code is not None]


def _folders(path: str) -> list[str]:
    """The folders that a path or glob stands for."""
    matches = glob.glob(path, recursive=True) if glob.has_magic(path) and not os.path.isdir(path) else [path]
    return sorted(match for match in matches if os.path.isdir(match) and not _is_hidden(match))


def _in_folder(folder: Path, format: str) -> list[Path]:
    """The files of a folder that are read."""
    files = without_held_out(folder_files(folder))
    code = code_folder(folder, files, known_endings()) if format in ("auto", "store") else None
    return files if code is None else code.files


def _expand(path: str, format: str) -> list[Path]:
    """The files that one path, folder or glob stands for. Raises DataError if there are none, or they cannot be seen."""
    if is_hub(path):
        return [Path(path)]
    check_readable(path)
    if os.path.isdir(path):
        files = _in_folder(Path(path), format)
        if not files:
            raise DataError(f"{path}: the folder holds no files (hidden files are ignored).")
        return files
    if os.path.isfile(path):
        return [Path(path)]
    if path == STANDARD_INPUT:
        raise DataError("- is standard input, which only `steep prepare -` reads. Prepare it to a token store first.")
    if os.path.lexists(path):
        raise DataError(
            f"{path}: is neither a file nor a folder but {_kind(Path(path))}. Give a regular file; to read a "
            "pipe: steep prepare - < PIPE"
        )
    if glob.has_magic(path):
        matches = sorted(glob.glob(path, recursive=True), key=lambda match: Path(match).parts)
        if (closed := unlistable_folder(path)) is not None:
            check_readable(closed)
        files = [file for match in matches for file in _matched(match, format)]
        if not files:
            raise DataError(
                f"{path}: the pattern matches no file. Quote it so that the shell does not expand it, and check the folder."
            )
        return files
    nearest = next(parent for parent in Path(path).absolute().parents if parent.exists())
    raise DataError(f"{path}: there is no such file or folder (the nearest that exists is {nearest}).")


def folder_files(folder: Path) -> list[Path]:
    """All files below `folder`, sorted by path. Links are followed once, so that a loop of links ends."""
    found: list[Path] = []
    seen: set[str] = set()
    for directory, names, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        real = os.path.realpath(directory)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        found += [_regular(Path(directory, name)) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda path: path.parts)


def check_readable(path: str) -> None:
    """Raise DataError for a path in a folder that may not be entered, and for a folder that may not be listed."""
    try:
        os.stat(path)
    except OSError as error:  # it need not exist: a glob, standard input, a store's prefix
        if isinstance(error, PermissionError):
            raise DataError(f"{path}: {error.strerror}. Change its permissions or those of its folder.") from error
    if os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK):
        _unreadable(PermissionError(errno.EACCES, os.strerror(errno.EACCES), path.rstrip("/")))


def _unreadable(error: OSError) -> None:
    """For a folder that cannot be listed: its files would be left out without a word."""
    raise DataError(
        f"{error.filename}: the folder cannot be read: {error.strerror}. Change its permissions, or give a pattern without it."
    ) from error


def _matched(match: str, format: str) -> list[Path]:
    if not os.path.isdir(match):
        return [_regular(Path(match))]
    return [] if _is_hidden(match) else _in_folder(Path(match), format)


def _is_hidden(path: str) -> bool:
    return os.path.basename(path.rstrip("/")).startswith(".")


def _regular(path: Path) -> Path:
    """The path, if it is a regular file. Raises DataError."""
    if not os.path.isfile(path):
        raise DataError(
            f"{path}: is {_kind(path)}, not a regular file. Remove it, or give a pattern that does not match it."
        )
    return path


_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a broken link",
}


def _kind(path: Path) -> str:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        mode = os.lstat(path).st_mode if os.path.lexists(path) else 0
    return _KINDS.get(stat.S_IFMT(mode), "something that cannot be read")


def read_texts(paths: Union[str, Sequence[str]], say: Say = tell) -> list[str]:
    """Every document of files, folders or globs, in memory. say: told of dropped records. Raises DataError for no document."""
    source = checked_section(SourceConfig, {"path": [paths] if isinstance(paths, str) else list(paths)})
    texts, dropped = [], DroppedCount()
    for file in expand_inputs(source):
        for record in load_format(file.format).read(file.path, source):
            if isinstance(record, Document):
                texts.append(record.text)
            else:
                dropped.add(record)
    ledger = {"records_read": len(texts) + dropped.dropped.total(), "documents_kept": len(texts), **dropped.to_ledger()}
    line = dropped_line(", ".join(paths_of(source)), ledger)
    if not texts:
        raise DataError(f"{paths}: holds no document{f' ({line})' if line else ''}")
    if line is not None:
        say(line)
    return texts
