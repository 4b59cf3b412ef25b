"""A table of text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """One line per row, the first `left` columns flush left and the others flush right. A row may lack its last cells."""
    columns = max(map(len, rows), default=0)
    widths = [max(len(row[number]) for row in rows if number < len(row)) for number in range(columns)]
    return [
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    ]
