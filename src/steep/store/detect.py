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
_TRAINING = re.compile(r"(?i)(^|[_.-])(?P<split>train)([_.-]|\d|$)")
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
    named = [path for path, name in known if formats()[name].NAMES_SPLITS]
    held_out = [path for path in named if _HELD_OUT.search(path.stem)]
    training = {path: match for path in named if (match := _TRAINING.search(path.stem))}
    if held_out and training:
        path, match = next(iter(training.items()))
        raise DataError(
            f"{folder}: holds training files ({path.name}) and held-out files ({held_out[0].name}); together the model "
            f"would be trained on what it is scored on. Give one kind, for example {folder}/*{match.group('split')}*."
        )
    return list(known)


def as_asked(path: Path, asked_for: str) -> tuple[Path, str]:
    """The file of tokens that `path` belongs to, as the format that the user named. Raises DataError if it cannot be that."""
    file, found = token_file(path) or (path, None)
    if not formats()[asked_for].accepts(found):
        what = (
            f"{found} by its first bytes or what lies beside it" if found else "not a file of tokens that steep knows"
        )
        names = ", ".join(formats())
        raise DataError(f"{path}: format is {asked_for}, but the file is {what}. Formats: auto, {names}.")
    return file, asked_for
