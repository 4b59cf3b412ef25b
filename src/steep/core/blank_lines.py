"""Text of a model, which may go on with empty lines for pages, for people to read."""

from __future__ import annotations

import re

MANY = re.compile(r"\n(?:[^\S\n]*\n){2,}[^\S\n]*")
"""A line's end and two or more empty lines."""


def fold_blank_lines(text: str) -> str:
    """The text with a note in place of two or more empty lines in a row, also at its end."""

    def note(found: re.Match[str]) -> str:
        count = found[0].count("\n") - (
            found.end() < len(text)
        )  # at the end of the text the last line is empty as well
        return f"\n[{count} blank lines]" + ("\n" if found.end() < len(text) else "")

    return MANY.sub(note, text)
