"""Where what can be made again is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_directory() -> Path:
    """$STEEP_CACHE, else ~/.cache/steep."""
    return Path(os.environ.get("STEEP_CACHE") or "~/.cache/steep").expanduser()
