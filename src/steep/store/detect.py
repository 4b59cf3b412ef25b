"""Which files are tokens, and of which format: told by names and first bytes alone.

In: a path that the user gave. Out: the files of a store with their formats, or None.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Optional

from steep.core.errors import DataError
from steep.store.formats import automodel, datatrove, llm_c, nanogpt
from steep.store.token_file import read_header

FORMATS = ("megatron", "nanogpt", "llm_c", "automodel", "datatrove")
"""What can be read in place."""

_HELD_OUT = re.compile(r"(?i)(^|[_.-])(val|valid|validation|dev|test)([_.-]|\d|$)")
_TRAINING = re.compile(r"(?i)(^|[_.-])train([_.-]|\d|$)")
_ENDINGS = (".bin", ".idx", datatrove.SUFFIX, *datatrove.COMPANIONS)
_BESIDE_TOKENS = {"args.json", "meta.pkl", "prepare.py", "readme.md", "readme.txt", "license"}


def megatron_prefix(path: Path) -> Optional[Path]:
    """The common part of a .bin/.idx pair from a path that has .bin, .idx or neither; None if there is no pair."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    pair = [prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx")]
    return prefix if all(file.is_file() for file in pair) else None


def token_file(path: Path) -> Optional[tuple[Path, str]]:
    """The file with the tokens that a path belongs to, and its format; None if it belongs to none.

    path: a .bin or .ds file, one of those that stand beside it (.idx, .bos.idx, .ds.index), or a Megatron prefix.
    """
    if path.name.endswith(automodel.INDEX_SUFFIX):
        path = path.with_name(path.name.removesuffix(automodel.INDEX_SUFFIX) + ".bin")
    for suffix in datatrove.COMPANIONS:
        if path.name.endswith(suffix):
            path = path.with_name(path.name.removesuffix(suffix) + datatrove.SUFFIX)
    prefix = megatron_prefix(path)
    if prefix is not None:
        return prefix.with_name(prefix.name + ".bin"), "megatron"
    if not path.is_file():
        return None
    if path.suffix == datatrove.SUFFIX and datatrove.index_path(path).is_file():
        return path, "datatrove"
    if path.suffix != ".bin" or nanogpt.what_else(path) is not None:
        return None
    header = read_header(path)
    magic = int(header[0]) if len(header) else 0
    if magic == automodel.MAGIC:
        return path, "automodel"
    return path, "llm_c" if magic in llm_c.MAGICS else "nanogpt"


def token_files(folder: Path, asked_for: Optional[str] = None) -> list[tuple[Path, str]]:
    """The token files of a folder, sorted by name, with their formats; empty unless all that lies there belongs to them.

    asked_for: a format; then other files are no obstacle, and each .bin is taken for that format.
    Raises DataError for a folder that holds both training and held-out files: joined, the model would train on both.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file())
    if asked_for is None and not all(name.endswith(_ENDINGS) or name.lower() in _BESIDE_TOKENS for name in names):
        return []  # before any file is opened: this may be a folder of a million texts
    found = {folder / name: token_file(folder / name) for name in names}
    known = dict.fromkeys(entry for entry in found.values() if entry is not None)
    strangers = [path for path, entry in found.items() if entry is None and path.name.lower() not in _BESIDE_TOKENS]
    if asked_for is not None:  # whatever a .bin looks like; opening it says what is wrong
        ending = datatrove.SUFFIX if asked_for == "datatrove" else ".bin"
        known = dict.fromkeys((path, asked_for) for path in found if path.suffix == ending)
    elif strangers:
        return []
    _refuse_mixed_splits(folder, [path for path, kind in known if kind != "megatron"])
    return list(known)


def as_asked(path: Path, asked_for: str) -> tuple[Path, str]:
    """The file of tokens that `path` belongs to, as the format that the user named. Raises DataError if it is none."""
    entry = token_file(path)
    found = None if entry is None else entry[1]
    if asked_for == "nanogpt" and found != "megatron":
        return path, asked_for  # needs no sign of it
    if entry is None or found is None or not _can_be(found, asked_for):
        what = (
            "no file of tokens that steep knows"
            if found is None
            else f"{found} by its first bytes or what lies beside it"
        )
        raise DataError(f"{path}: format is {asked_for}, but the file is {what}. Formats: auto, {', '.join(FORMATS)}.")
    return entry[0], asked_for


def _can_be(found: str, asked_for: str) -> bool:
    """Automodel once wrote llm.c's header."""
    return found == asked_for or (found, asked_for) == ("llm_c", "automodel")


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
