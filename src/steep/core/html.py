"""Building blocks of HTML, for the report and for notebooks. Everything that comes from a run goes through `escape`."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence


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


def notebook_table(
    head: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", numbers_from: int = 1
) -> str:
    """The same for a notebook, which has a style of its own: it sets cells flush right."""
    made = table(head, rows, caption, numbers_from)
    for tag in ("<td>", '<th scope="row">', '<th scope="col">'):
        made = made.replace(tag, f'{tag[:-1]} style="text-align: left">')
    return made.replace("<caption>", '<caption style="text-align: left; white-space: nowrap">')


def preformatted(text: str) -> str:
    """Text as it is, with its spaces and line ends."""
    return f"<pre>{escape(text)}</pre>\n"


def picture(png: bytes, description: str) -> str:
    """A PNG inside the page. description: what is said where it cannot be seen."""
    content = base64.b64encode(png).decode("ascii")
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{content}" style="max-width: 100%; height: auto">\n'


def bars(sizes: Mapping[str, float], shown: Mapping[str, str]) -> str:
    """A table with a bar for each size, all to one scale. shown: the sizes as text."""
    largest = max([*sizes.values(), 1])
    right = ' style="text-align: right"'
    bar = "height: 0.8em; background: #0f6b6b; width:"
    rows = "".join(
        f'<tr><th scope="row" style="text-align: left">{escape(name)}</th><td{right}>{escape(shown[name])}</td>'
        f'<td style="width: 22em"><div style="{bar} {100 * size / largest:.1f}%"></div></td></tr>\n'
        for name, size in sizes.items()
    )
    return f"<table>\n{rows}</table>\n"
