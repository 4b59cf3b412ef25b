"""Building blocks of the page. Everything that comes from a run goes through `escape`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from steep.metrics import MISSING
from steep.reporting.run_files import RunFiles


def escape(text: object) -> str:
    """The text with markup escaped, and characters that HTML forbids (NUL, surrogates) replaced by a visible one."""
    return html.escape("".join(char if _is_allowed(char) else "\N{REPLACEMENT CHARACTER}" for char in str(text)))


def _is_allowed(char: str) -> bool:
    code = ord(char)
    if code < 0x20:
        return char in "\n\t"
    return not (0x7F <= code <= 0x9F or 0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", numbers_from: int = 1) -> str:
    """A table of plain values that scrolls sideways on its own. Columns from `numbers_from` on are numbers."""

    def cell(tag: str, number: int, value: object) -> str:
        css = ' class="number"' if number >= numbers_from else ""
        return f"<{tag}{css}>{escape(value)}</{tag[:2]}>"

    head_row = "".join(cell('th scope="col"', number, name) for number, name in enumerate(head))
    lines = ["".join(cell("td" if n else 'th scope="row"', n, value) for n, value in enumerate(row)) for row in rows]
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    caption = f"<caption>{escape(caption)}</caption>" if caption else ""
    inner = f"{caption}<thead><tr>{head_row}</tr></thead>\n<tbody>\n{body}</tbody>"
    return f'<div class="scroll" tabindex="0"><table>{inner}</table></div>\n'


def details(summary: str, content: str) -> str:
    """A part of the page that is collapsed until the reader opens it."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}</details>\n"


def missing(run: RunFiles, file_name: str, what: str) -> str:
    """The sentence shown in place of content that is missing, with the reason."""
    reason = run.problems.get(file_name, "contains none")
    return f'<p class="missing">No {escape(what)}: {escape(file_name)} {escape(reason)}.</p>\n'


def plain(value: Any) -> str:
    """A number with thousands separators and at most three decimals; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return MISSING if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}".rstrip("0").rstrip(".")
