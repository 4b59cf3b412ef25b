"""How anything in steep tells the person something: it is given `say` and calls it with one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

Say = Callable[[str], None]
"""Prints one line for the person at the terminal."""


def tell(text: str) -> None:
    """Print a remark on standard error, beside the result on standard output."""
    print(text, file=sys.stderr)


def say_nothing(text: str) -> None:
    """For callers whose person has been told, or will be."""
