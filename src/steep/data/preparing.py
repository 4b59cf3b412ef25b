"""Progress over all texts of a run: each text source is prepared by itself, and a person sees one total."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from steep.sources.config import SourceConfig
from steep.sources.files import reading
from steep.sources.inputs import expand_inputs, is_hub
from steep.store.cache import store_paths

Progress = Callable[[int, int, int], None]
"""Called with bytes done, bytes in all and tokens written, while text is prepared."""


class OverAllTexts:
    """Takes the progress of one text after the other and passes on that of all. A text from the cache counts as done.

    sources: in the order in which they are opened; token stores among them count nothing. Raises DataError for missing files.
    """

    def __init__(self, sources: Sequence[SourceConfig], progress: Progress):
        self._progress = progress
        self._bytes = [text_bytes(source) for source in sources] if len(sources) > 1 else [0]
        self._current = self._tokens = self._tokens_before = 0

    def __call__(self, done_bytes: int, total_bytes: int, tokens: int) -> None:
        """The state of the current text."""
        self._bytes[self._current] = total_bytes
        self._tokens = tokens
        before = sum(self._bytes[: self._current])
        self._progress(before + done_bytes, sum(self._bytes), self._tokens_before + tokens)

    def next_text(self) -> None:
        """The current text is open; what follows is of the next."""
        self._tokens_before, self._tokens = self._tokens_before + self._tokens, 0
        self._current += 1


def text_bytes(source: SourceConfig) -> int:
    """Size on disk of the files of a text source; 0 for a token store, and for datasets of the hub, which do not say."""
    if store_paths(source):
        return 0
    size = 0
    for file in expand_inputs(source):
        if not is_hub(file.path):
            with reading(file.path):
                size += file.path.stat().st_size
    return size
