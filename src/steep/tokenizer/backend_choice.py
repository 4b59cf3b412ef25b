"""Which backend encodes a source: a fast one if its ids equal the reference's, else the reference, with a line that says why.

The choice depends only on the first documents of the source and on a fixed set of hard strings, so it is the same for any number
of workers. It decides how long the work takes, never an id.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from steep.core.errors import ConfigError, first_line
from steep.core.plugins import load_plugin, plugin_names
from steep.core.say import Say, tell
from steep.tokenizer.encode import BACKENDS, REFERENCE_BACKEND, TextEncoder, TextTokenizer
from steep.tokenizer.hard_strings import hard_strings

AUTO = "auto"
COMPARED_DOCUMENTS = 1000
COMPARED_CHARACTERS = 32_768
"""Only this many characters of a document are compared, so that the choice takes seconds whatever the documents."""
LEAST_BYTES_FOR_AUTO = 20_000_000
"""For smaller sources the reference makes ids about as fast as two tokenizers can be compared."""
BATCH_CHARACTERS = 1_000_000

NamedText = tuple[str, str]
"""The name of a text in messages, and the text."""


class BackendChooser:
    """Chooses a backend for one source after another; the hard strings are compared once.

    wanted: `auto` or the name of a backend. say: told why the reference is used. Raises ConfigError for an unknown name and
    for a backend that is not installed.
    """

    def __init__(self, wanted: str, tokenizer: TextTokenizer, say: Say = tell):
        self._say, self._tokenizer, self._wanted = say, tokenizer, wanted
        self._missing: list[str] = []
        """Backends that are not installed, until the person has been told."""
        self._about_hard_strings: dict[str, str] = {}
        """What is wrong with each backend, or an empty string."""
        names = fast_backend_names() if wanted == AUTO else [wanted]
        self._candidates = [name for name in names if name != REFERENCE_BACKEND and self._is_there(name)]

    def choose(self, source: str, source_bytes: int, documents: Iterable[NamedText]) -> str:
        """The name of the backend for a source.

        source: its name in messages. documents: its documents from the first on; at most 1,000 are taken, and none if there is
        nothing to choose.
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
            self._say(f"{source}: {REFERENCE_BACKEND} is used instead of {name}, which {problem}")
        if self._missing:
            self._say(
                f"{REFERENCE_BACKEND} is used; with {' or '.join(self._missing)} (pip install 'steep[fast]') this would be many "
                "times as fast"
            )
            self._missing = []
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

    def _problem_with_hard_strings(self, name: str) -> str:
        if name not in self._about_hard_strings:
            try:
                self._tokenizer.encoder(name)
            except Exception as error:  # noqa: BLE001  (a library may raise anything; it is said)
                problem = f"cannot take this tokenizer: {first_line(error)[:200]}"
            else:
                problem = self._difference(name, hard_strings(self._tokenizer).items())
            self._about_hard_strings[name] = problem
        return self._about_hard_strings[name]

    def _difference(self, name: str, texts: Iterable[NamedText]) -> str:
        try:
            return first_difference(self._tokenizer.encoder(name), self._tokenizer.encoder(), texts)
        except Exception as error:  # noqa: BLE001  (as above)
            return f"fails: {first_line(error)[:200]}"


def fast_backend_names() -> list[str]:
    """Every backend but the reference."""
    return [name for name in plugin_names(BACKENDS) if name != REFERENCE_BACKEND]


def first_difference(encoder: TextEncoder, reference: TextEncoder, texts: Iterable[NamedText]) -> str:
    """Where the ids of two encoders first differ, in words; empty if they are equal for every text."""
    for batch in _batches(texts):
        encoded = [each.encode([text for _, text in batch]) for each in (encoder, reference)]
        rows = (np.split(ids, np.cumsum(lengths)[:-1]) for ids, lengths in encoded)
        for (name, _), ids, expected in zip(batch, *rows, strict=True):
            if not np.array_equal(ids, expected):
                shorter = min(len(ids), len(expected))
                position = next(iter(np.flatnonzero(ids[:shorter] != expected[:shorter])), shorter)
                given, wanted = (str(row[position]) if position < len(row) else "no token" for row in (ids, expected))
                return f"gives other ids for {name!r}: {given} instead of {wanted} at token {position}"
    return ""


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
