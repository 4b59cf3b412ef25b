"""Which backend encodes a source: a fast one where its ids are the reference's, else the reference, and a line that says why.

The verdict is reached on the first documents of the source and on a fixed set of hard strings, from those alone, so it is the
same for any number of workers. It decides how long the work takes, never an id.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from steep.core.errors import ConfigError
from steep.core.plugins import load_plugin, plugin_names
from steep.tokenizer.encode import BACKENDS, REFERENCE_BACKEND, TextEncoder, TextTokenizer
from steep.tokenizer.hard_strings import hard_strings

AUTO = "auto"
COMPARED_DOCUMENTS = 1000
COMPARED_CHARACTERS = 32_768
"""Of a longer document only so many are compared, so that the verdict takes seconds whatever the documents."""
LEAST_BYTES_FOR_AUTO = 20_000_000
"""Of smaller sources the reference makes ids about as fast as two tokenizers can be compared."""
BATCH_CHARACTERS = 1_000_000

NamedText = tuple[str, str]
"""How messages call a text, and the text."""

logger = logging.getLogger(__name__)


class BackendChooser:
    """Chooses for one source after the other; the hard strings are compared once.

    wanted: `auto` or the name of a backend. Raises ConfigError for a name that is none, and for one that is not installed.
    """

    def __init__(self, wanted: str, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        self._wanted = wanted
        self._missing: list[str] = []
        self._about_hard_strings: dict[str, str] = {}
        """Backend -> what is wrong with it, or an empty string."""
        names = fast_backend_names() if wanted == AUTO else [wanted]
        self._candidates = [name for name in names if name != REFERENCE_BACKEND and self._is_there(name)]
        self._told_missing = False

    def choose(self, source: str, source_bytes: int, documents: Iterable[NamedText]) -> str:
        """The name of the backend for a source.

        source: how messages call it. documents: its documents from the first on; at most 1,000 are taken, and none where
        there is nothing to choose.
        """
        if self._wanted == AUTO and source_bytes < LEAST_BYTES_FOR_AUTO:
            return REFERENCE_BACKEND
        first: list[NamedText] = []
        for name in self._candidates:
            if not first:
                first = [(id_, text[:COMPARED_CHARACTERS]) for id_, text in islice(documents, COMPARED_DOCUMENTS)]
            problem = self._problem_with_hard_strings(name) or self._difference(name, first)
            if not problem:
                return name
            logger.warning("%s: %s is used instead of %s, which %s", source, REFERENCE_BACKEND, name, problem)
        self._tell_missing()
        return REFERENCE_BACKEND

    def _is_there(self, name: str) -> bool:
        package = load_plugin(BACKENDS, name).PACKAGE
        if importlib.util.find_spec(package) is not None:
            return True
        if self._wanted != AUTO:
            raise ConfigError(
                f"tokenizer_backend {name} needs the package {package}, which is not installed: pip install 'steep[fast]'. "
                f"Or use {AUTO} or {REFERENCE_BACKEND}."
            )
        self._missing.append(name)
        return False

    def _tell_missing(self) -> None:
        if self._missing and not self._told_missing:
            logger.warning(
                "%s is used; with %s (pip install 'steep[fast]') this would be many times as fast",
                REFERENCE_BACKEND, " or ".join(self._missing),
            )  # fmt: skip
        self._told_missing = True

    def _problem_with_hard_strings(self, name: str) -> str:
        if name not in self._about_hard_strings:
            problem = self._problem_when_built(name) or self._difference(name, hard_strings(self._tokenizer).items())
            self._about_hard_strings[name] = problem
        return self._about_hard_strings[name]

    def _problem_when_built(self, name: str) -> str:
        try:
            self._tokenizer.encoder(name)
        except Exception as error:  # noqa: BLE001  (of any kind a library likes; it is told)
            return f"cannot take this tokenizer: {_first_line(error)}"
        return ""

    def _difference(self, name: str, texts: Iterable[NamedText]) -> str:
        try:
            return first_difference(self._tokenizer.encoder(name), self._tokenizer.encoder(), texts)
        except Exception as error:  # noqa: BLE001  (as above)
            return f"fails: {_first_line(error)}"


def fast_backend_names() -> list[str]:
    """Every backend but the reference."""
    return [name for name in plugin_names(BACKENDS) if name != REFERENCE_BACKEND]


def first_difference(encoder: TextEncoder, reference: TextEncoder, texts: Iterable[NamedText]) -> str:
    """Where the ids of two encoders first differ, in words; empty if they are equal for every text."""
    for batch in _batches(texts):
        mine, theirs = (each.encode([text for _, text in batch]) for each in (encoder, reference))
        if np.array_equal(mine.lengths, theirs.lengths) and np.array_equal(mine.ids, theirs.ids):
            continue
        for (name, _), a, b in zip(batch, _rows(*mine), _rows(*theirs), strict=True):
            if not np.array_equal(a, b):
                return _describe(name, a, b)
    return ""


def _describe(name: str, ids: np.ndarray, expected: np.ndarray) -> str:
    shorter = min(len(ids), len(expected))
    position = next(iter(np.flatnonzero(ids[:shorter] != expected[:shorter])), shorter)
    given, wanted = (str(row[position]) if position < len(row) else "no token" for row in (ids, expected))
    return f"gives other ids for {name!r}: {given} instead of {wanted} at token {position}"


def _rows(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(ids, np.cumsum(lengths)[:-1])


def _batches(texts: Iterable[NamedText]) -> Iterator[list[NamedText]]:
    batch: list[NamedText] = []
    characters = 0
    for name, text in texts:
        batch.append((name, text))
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
