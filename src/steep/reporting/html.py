"""What the page says of values and of what is missing."""

from __future__ import annotations

from typing import Any

from steep.core.html import escape
from steep.metrics import MISSING
from steep.reporting.run_files import RunFiles


def missing(run: RunFiles, file_name: str, what: str) -> str:
    """The sentence shown in place of content that is missing, with the reason."""
    reason = run.problems.get(file_name, "contains none")
    return f'<p class="missing">No {escape(what)}: {escape(file_name)} {escape(reason)}.</p>\n'


def plain(value: Any) -> str:
    """A number with thousands separators and at most three decimals; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return MISSING if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}".rstrip("0").rstrip(".")
