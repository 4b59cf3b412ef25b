"""Streamed text wrapped to the terminal's width, word by word; unchanged where the output is not a terminal."""

from __future__ import annotations

import re
import shutil
from typing import TextIO

from steep.trackers.backends.console import clean_text, encodable, is_terminal


class Wrapped:
    """Writes text as it comes. A word is held back until it is complete, so that it can move to the next line.

    first: written before the first piece, or at the end if there is none; not written if the block raises before that.
    """

    def __init__(self, stream: TextIO, first: str = ""):
        self._first = first
        self._stream = stream
        self._wraps = is_terminal(stream)
        self._width = shutil.get_terminal_size().columns
        self._column = 0
        self._held = ""

    def __enter__(self) -> Wrapped:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._first and kind is not None:
            return
        self.write("")
        self._put(self._held)
        self._put("\n")
        self._stream.flush()

    def write(self, text: str) -> None:
        """Write the complete words of `text`; control characters are made visible."""
        text = self._held + clean_text(self._first + text)
        self._first = ""
        self._held = ""
        if self._wraps:
            *pieces, self._held = re.split(r"(?<=[\s])", text)
        else:
            pieces = [text]
        for piece in pieces:
            self._put(piece)
        self._stream.flush()

    def _put(self, piece: str) -> None:
        visible = piece.rstrip()
        if self._wraps and self._column and self._column + len(visible) > self._width:
            self._stream.write("\n")
            self._column = 0
        if self._wraps and not visible and piece != "\n" and self._column + len(piece) > self._width:
            return  # a space at the edge is the line break
        self._stream.write(encodable(piece, self._stream))
        self._column = 0 if piece.endswith("\n") else self._column + len(piece)
