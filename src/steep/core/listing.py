"""Folders that may not be listed: Python's glob passes over them without a word."""

from __future__ import annotations

import glob
import os
from pathlib import Path


def unlistable_folder(pattern: str) -> str | None:
    """A folder in which a glob pattern looks, and which may not be listed or entered; None without one."""
    parts = Path(pattern).parts
    for number, part in enumerate(parts):
        if not glob.has_magic(part):
            continue
        above = os.path.join(*parts[:number], "") if number else "./"
        inside = glob.glob(os.path.join(above, "**", ""), recursive=True) if part == "**" else glob.glob(above)
        for folder in [above, *inside]:
            if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
                return folder.rstrip("/")
    return None


def may_be_seen(path: str) -> bool:
    """Whether a path is there, a broken link included, or is in a folder that may not be entered, so that nobody knows."""
    try:
        os.lstat(path)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
