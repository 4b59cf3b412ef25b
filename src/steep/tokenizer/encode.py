"""Text to ids with the `tokenizers` library alone: no torch, no transformers, so that worker processes start fast.

In: a `tokenizers.Tokenizer` and what to put around a document. Out: ids. Special tokens that appear literally in a text are
encoded as text. Nothing is ever truncated or padded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Protocol

import numpy as np

from steep.core.errors import ModelError
from steep.core.files import read_object, write_json, write_text
from steep.core.fingerprint import fingerprint
from steep.core.plugins import load_plugin

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BACKEND_FILE = "tokenizer.json"
POLICY_FILE = "steep_tokenizer.json"
BACKENDS = "steep.tokenizer.backends"
REFERENCE_BACKEND = "huggingface"
_PARTS_THAT_MAKE_IDS = ("added_tokens", "normalizer", "pre_tokenizer", "model")


class EncodedTexts(NamedTuple):
    """The ids of several texts, one after the other."""

    ids: np.ndarray
    """(tokens,) unsigned integers of 32 bits or more."""
    lengths: np.ndarray
    """(texts,) int64: how many of the ids belong to each text; 0 for a text of which nothing is left."""


class TextEncoder(Protocol):
    """What a backend gives: ids of texts, without BOS and EOS, special tokens in text as text."""

    description: str
    """Name and version, for the manifest and messages."""

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """The ids of each text."""


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and its policy: which tokens go before and after a document."""

    backend: Tokenizer
    bos_id: Optional[int]
    eos_id: Optional[int]
    append_eos: bool
    prepend_bos: bool
    vocab_size: int
    """Largest id + 1, over the vocabulary and the added tokens."""
    description: str = ""
    """Where it came from, for messages."""

    @cached_property
    def tokenizer_json(self) -> str:
        """The content of tokenizer.json."""
        return self.backend.to_str()

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of everything that decides ids: vocabulary, merges, normalization, splitting, BOS/EOS policy."""
        backend = json.loads(self.tokenizer_json)
        return fingerprint([{part: backend.get(part) for part in _PARTS_THAT_MAKE_IDS}, self.policy])

    @property
    def eos_token(self) -> Optional[str]:
        """The end-of-text token as text; None if there is none."""
        return None if self.eos_id is None else self.backend.id_to_token(self.eos_id)

    @property
    def policy(self) -> dict[str, Any]:
        """What goes around a document, as JSON."""
        return {name: getattr(self, name) for name in ("bos_id", "eos_id", "append_eos", "prepend_bos")}

    @property
    def num_extra_tokens(self) -> int:
        """Tokens around each document: 0, 1 or 2."""
        return int(self.append_eos) + int(self.prepend_bos)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text with BOS and EOS as configured: one (tokens,) int64 array per text."""
        ids, lengths = self.with_ends(self.encoder().encode(texts))
        return np.split(ids.astype(np.int64), np.cumsum(lengths)[:-1]) if len(lengths) else []

    def with_ends(self, encoded: EncodedTexts) -> EncodedTexts:
        """The same with BOS before and EOS after each text, as configured."""
        if not self.num_extra_tokens:
            return encoded
        lengths = encoded.lengths + self.num_extra_tokens
        stops = np.cumsum(lengths)
        ids = np.empty(int(lengths.sum()), dtype=encoded.ids.dtype)
        of_text = np.ones(len(ids), dtype=bool)
        if self.prepend_bos:
            ids[stops - lengths] = self.bos_id
            of_text[stops - lengths] = False
        if self.append_eos:
            ids[stops - 1] = self.eos_id
            of_text[stops - 1] = False
        ids[of_text] = encoded.ids
        return EncodedTexts(ids, lengths)

    def encoder(self, name: str = REFERENCE_BACKEND) -> TextEncoder:
        """The backend `name` for this tokenizer, built when it is first needed and kept.

        Raises ConfigError for an unknown name, and whatever the backend raises for a tokenizer that it cannot take.
        """
        built: dict[str, TextEncoder] = self.__dict__.setdefault("_encoders", {})
        if name not in built:
            built[name] = load_plugin(BACKENDS, name, what="data.prepare.backend").build(self)
        return built[name]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS and EOS."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, special tokens shown."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_text(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of a document's ids, without the BOS and EOS around it."""
        return self.decode([i for i in ids if i not in (self.bos_id, self.eos_id)])

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and steep_tokenizer.json into `directory`, which is made if it does not exist."""
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / BACKEND_FILE, self.tokenizer_json)
        write_json(directory / POLICY_FILE, {**self.policy, "description": self.description})

    @classmethod
    def load(cls, directory: Path) -> TextTokenizer:
        """Read what `save` wrote. Raises ModelError if it is missing or damaged."""
        try:
            policy = read_object(directory / POLICY_FILE)
        except (OSError, ValueError) as error:
            raise ModelError(f"{directory}: holds no tokenizer saved by steep: {error}") from error
        return make_text_tokenizer(backend_from_file(directory / BACKEND_FILE), **policy)


def backend_from_file(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Raises ModelError."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:
        raise ModelError(f"{path}: is not a tokenizer.json of the tokenizers library: {error}") from error


def make_text_tokenizer(
    backend: Tokenizer,
    *,
    bos_id: Optional[int],
    eos_id: Optional[int],
    append_eos: bool,
    prepend_bos: bool,
    description: str = "",
) -> TextTokenizer:
    """A TextTokenizer over its own copy of `backend`, without truncation and padding, special tokens in text as text.

    Raises ModelError if EOS or BOS is needed and the tokenizer has none.
    """
    from tokenizers import Tokenizer

    if append_eos and eos_id is None:
        raise ModelError(
            f"the tokenizer {description or 'given'} has no end-of-sequence token, and append_eos is on. "
            "Use a tokenizer folder whose tokenizer_config.json names eos_token, or set tokenizer.append_eos: false "
            "(the model then never learns to stop)."
        )
    if prepend_bos and bos_id is None:
        raise ModelError(
            f"the tokenizer {description or 'given'} has no beginning-of-sequence token, and prepend_bos is on. "
            "Set tokenizer.prepend_bos: false, or use a tokenizer whose tokenizer_config.json names bos_token."
        )
    own = Tokenizer.from_str(backend.to_str())
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = True
    vocab_size = 1 + max(own.get_vocab(with_added_tokens=True).values(), default=-1)
    return TextTokenizer(own, bos_id, eos_id, append_eos, prepend_bos, vocab_size, description)
