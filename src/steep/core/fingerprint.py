"""One name for a value: the hash of its canonical JSON."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def fingerprint(value: Any) -> str:
    """32 hex digits that are equal for equal JSON values, whatever the order of their keys. Raises TypeError."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:32]
