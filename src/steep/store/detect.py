"""Which files hold tokens, and in which format, judged by names and first bytes alone.

In: a path that the user gave. Out: the files of a store with their formats, or None.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Optional

from steep.core.errors import DataError
from steep.store.formats import formats

_HELD_OUT = re.compile(r"(?i)(^|[_.-])(val|valid|validation|dev|test)([_.-]|\d|$)")
_TRAINING = re.compile(r"(?i)(^|[_.-])train([_.-]|\d|$)")
_BESIDE_TOKENS = {"args.json", "meta.pkl", "prepare.py", "readme.md", "readme.txt", "license"}


def token_file(path: Path) -> Optional[tuple[Path, str]]:
    """The file of tokens that a path names or belongs to, and its format; None if no format knows it.

    path: a file of tokens, one that belongs to it (.idx, .bos.idx, .ds.index), or a Megatron prefix.
    """
    sniffed = {name: known.sniff(path) for name, known in formats().items()}
    found = [(result.evidence, name, result.path) for name, result in sniffed.items() if result is not None]
    if not found:
        return None
    _, name, file = max(found, key=lambda entry: entry[0])
    return file, name


def token_files(folder: Path, asked_for: Optional[str] = None) -> list[tuple[Path, str]]:
    """The token files of a folder, sorted by name, with their formats; empty if there are other files.

    asked_for: a format. Then other files are allowed, and each file with the format's ending is taken to be of it.
    Raises DataError for a folder that holds both training and held-out files: joined, the model would train on both.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file())
    endings = tuple(ending for known in formats().values() for ending in known.ENDINGS)
    if asked_for is None and not all(name.endswith(endings) or name.lower() in _BESIDE_TOKENS for name in names):
        return []  # before any file is opened: this may be a folder of a million texts
    found = {folder / name: token_file(folder / name) for name in names}
    known = dict.fromkeys(entry for entry in found.values() if entry is not None)
    strangers = [path for path, entry in found.items() if entry is None and path.name.lower() not in _BESIDE_TOKENS]
    if asked_for is not None:  # what is wrong with a file is found when it is opened
        ending = formats()[asked_for].ENDINGS[0]
        known = dict.fromkeys((path, asked_for) for path in found if path.suffix == ending)
    elif strangers:
        return []
    _refuse_mixed_splits(folder, [path for path, name in known if formats()[name].NAMES_SPLITS])
    return list(known)


def as_asked(path: Path, asked_for: str) -> tuple[Path, str]:
    """The file of tokens that `path` belongs to, as the format that the user named. Raises DataError if it cannot be that."""
    entry = token_file(path)
    found = None if entry is None else entry[1]
    if not formats()[asked_for].accepts(found):
        what = "not a file of tokens that steep knows"
        if found is not None:
            what = f"{found} by its first bytes or what lies beside it"
        names = ", ".join(formats())
        raise DataError(f"{path}: format is {asked_for}, but the file is {what}. Formats: auto, {names}.")
    return (path if entry is None else entry[0]), asked_for


def _refuse_mixed_splits(folder: Path, paths: list[Path]) -> None:
    held_out = [path for path in paths if _HELD_OUT.search(path.stem)]
    training = [path for path in paths if _TRAINING.search(path.stem)]
    if held_out and training:
        raise DataError(
            f"{folder}: holds training files ({training[0].name}) and held-out files ({held_out[0].name}); together the model "
            f"would be trained on what it is scored on. Give one kind, for example {folder}/*{_kind(training[0])}*."
        )


def _kind(path: Path) -> str:
    match = _TRAINING.search(path.stem)
    return match.group(0).strip("_.-0123456789") if match else path.stem
