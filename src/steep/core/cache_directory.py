"""Where what can be made again is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

from steep.core.errors import FileError


def default_cache_directory() -> Path:
    """$STEEP_CACHE, else ~/.cache/steep. Raises FileError for a user without a home, as in a container under any id."""
    try:
        return Path(os.environ.get("STEEP_CACHE") or "~/.cache/steep").expanduser()
    except RuntimeError as error:
        raise FileError(
            "this user has no home directory, so there is no folder for the cache: set the variable STEEP_CACHE"
        ) from error
