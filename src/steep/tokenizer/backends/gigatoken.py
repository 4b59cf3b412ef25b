"""gigatoken (extra `fast`): byte-level BPE and SentencePiece-type BPE, about thirty times as fast as the reference.

What version 0.10 does not do is done here:
- It always matches special tokens in text; it is built without them, so that all of a text is text.
- Its cache of words grows without bound (measured: 7 bytes of memory per byte of random words); it is built anew, in 0.2 s and
  with a cold cache, before the process grows by `MOST_GROWTH_BYTES`.
- It cannot split digits one by one before another splitting (SmolLM2, StarCoder); it is given the digits and the text between
  them.
- It refuses a byte-level vocabulary without a token for every byte (SmolLM2); the missing ones get ids that no token has, and
  a text in which one appears is encoded by the reference.
Weakness: one text of more than 50 MB in which hardly any word repeats takes more memory than the bound.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Optional

import numpy as np

from steep.runtime.device import resident_bytes
from steep.tokenizer.encode import EncodedTexts, TextEncoder, TextTokenizer

PACKAGE = "gigatoken"
MOST_GROWTH_BYTES = 384 * 2**20
_CUT = b"\xff"
GROWTH_PER_CHARACTER = 8
"""Bytes of memory that a character may add, in a text of new words."""


def build(tokenizer: TextTokenizer) -> GigatokenEncoder:
    """A gigatoken encoder with the ids of `tokenizer`. Raises ImportError without gigatoken, ValueError or
    another error for a tokenizer that gigatoken does not know."""
    content = json.loads(tokenizer.tokenizer_json)
    remove_special_tokens(content)
    kind = DigitSplitEncoder if remove_digit_split(content) else GigatokenEncoder
    return kind(content, tokenizer.encoder(), add_missing_bytes(content))


def remove_special_tokens(content: dict[str, Any]) -> None:
    """Change a tokenizer.json so that special tokens are not matched in text. Other added tokens stay: the reference finds
    them too. No id changes: those of the vocabulary are in the model, and the others are not used."""
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]


def remove_digit_split(content: dict[str, Any]) -> bool:
    """Take the splitting of digits one by one from the start of a tokenizer.json's pre-tokenizer; False if it is not there."""
    steps = (content["pre_tokenizer"] or {}).get("pretokenizers", [])
    if len(steps) < 2 or steps[0] != {"type": "Digits", "individual_digits": True}:
        return False
    content["pre_tokenizer"] = steps[1] if len(steps) == 2 else {"type": "Sequence", "pretokenizers": steps[1:]}
    return True


def add_missing_bytes(content: dict[str, Any]) -> Optional[int]:
    """Give each byte without a token an id beyond all others; returns the first of these, None if no byte is missing."""
    from tokenizers import pre_tokenizers

    model = content["model"]
    if model["type"] != "BPE" or model["byte_fallback"]:
        return None
    vocabulary: dict[str, int] = model["vocab"]
    missing = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys())
    first = 1 + max([*vocabulary.values(), *(token["id"] for token in content["added_tokens"])], default=-1)
    vocabulary.update({byte: first + number for number, byte in enumerate(missing)})
    return first if missing else None


@lru_cache(maxsize=1)
def digits() -> str:
    """Every character that the tokenizers library takes for a digit; its Unicode version may be newer than Python's."""
    from tokenizers import pre_tokenizers

    characters = "".join(chr(code) for code in range(0x20000) if not 0xD800 <= code < 0xE000)  # there are none beyond
    pieces = pre_tokenizers.Digits(individual_digits=True).pre_tokenize_str("a".join(characters))
    return "".join(piece for piece, _ in pieces if len(piece) == 1 and piece != "a")


class GigatokenEncoder(TextEncoder):
    """Encodes on the calling thread, text by text: a batch would be 20 % faster and comes as an awkward array, whose import
    takes as long as encoding 100 MB."""

    def __init__(
        self,
        content: dict[str, Any],
        reference: TextEncoder,
        first_missing_byte: Optional[int] = None,
        most_growth_bytes: int = MOST_GROWTH_BYTES,
    ):
        from importlib.metadata import version

        self.description = f"gigatoken {version('gigatoken')}"
        self.times_built = 0
        self._json = json.dumps(content, ensure_ascii=False)
        self._reference, self._first_missing_byte = reference, first_missing_byte
        self._most_growth_bytes = most_growth_bytes
        self._make()

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        if not texts:
            return EncodedTexts(np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.int64))
        characters = sum(map(len, texts))
        self._make_room(characters)
        encoded = self._encode(texts)
        self._encoded_characters += characters
        return encoded if self._first_missing_byte is None else self._mend(texts, encoded, self._first_missing_byte)

    def _mend(self, texts: Sequence[str], encoded: EncodedTexts, first_missing_byte: int) -> EncodedTexts:
        """The same, with texts that hold a byte without a token encoded by the reference."""
        positions = np.flatnonzero(encoded.ids >= first_missing_byte)
        if not len(positions):
            return encoded
        stops = np.cumsum(encoded.lengths)
        rows = np.split(encoded.ids, stops[:-1])
        for number in np.unique(np.searchsorted(stops, positions, side="right")):
            rows[number] = self._reference.encode([texts[number]]).ids
        return EncodedTexts(np.concatenate(rows), np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)))

    def _encode(self, texts: Sequence[str]) -> EncodedTexts:
        rows = [self._backend.encode(text) for text in texts]
        return EncodedTexts(np.concatenate(rows), np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)))

    def _make(self) -> None:
        from gigatoken.gigatoken_rs import load_hf_json

        self._backend: Any = None  # the old one goes before the new one comes
        self._backend = load_hf_json(self._json)
        self.times_built += 1
        self._encoded_characters = 0
        self._size_when_made = resident_bytes()

    def _make_room(self, characters: int) -> None:
        """Build anew if the cache could grow too large with `characters` more."""
        now, growth = resident_bytes(), GROWTH_PER_CHARACTER * self._encoded_characters
        if now is not None and self._size_when_made is not None:
            growth = now - self._size_when_made
        if self._encoded_characters and growth + GROWTH_PER_CHARACTER * characters > self._most_growth_bytes:
            self._make()


class DigitSplitEncoder(GigatokenEncoder):
    """The same for a tokenizer that splits digits off first: all texts go to gigatoken as one buffer, cut around each digit
    and between texts at a byte that UTF-8 does not have."""

    def _make(self) -> None:
        super()._make()
        self._is_rare_digit = np.zeros(0x110000, dtype=bool)
        self._is_rare_digit[[ord(one) for one in digits() if not one.isascii()]] = True

    def _encode(self, texts: Sequence[str]) -> EncodedTexts:
        from gigatoken.gigatoken_rs import BytesSource

        buffers = [self._cut(text) for text in texts]
        rows = self._backend.encode_batch(BytesSource([_CUT.join(buffers)], _CUT), parallel=False).layout
        starts = np.asarray(rows.offsets.data, dtype=np.int64)
        edges = np.cumsum([0, *map(_count_pieces, buffers)])
        return EncodedTexts(np.asarray(rows.content.data)[starts[0] : starts[-1]], np.diff(starts[edges]))

    def _cut(self, text: str) -> bytes:
        raw = text.encode("utf-8") if text.isascii() else self._cut_rare(text)
        for digit in b"0123456789":
            raw = raw.replace(b"%c" % digit, b"\xff%c\xff" % digit)
        return raw

    def _cut_rare(self, text: str) -> bytes:
        """The UTF-8 bytes with cuts around digits that are not ASCII."""
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        edges = [edge for digit in np.flatnonzero(self._is_rare_digit[codes]).tolist() for edge in (digit, digit + 1)]
        return _CUT.join(text[start:stop].encode("utf-8") for start, stop in pairwise([0, *edges, len(text)]))


def _count_pieces(raw: bytes) -> int:
    """How many non-empty pieces are between cuts."""
    cuts = np.flatnonzero(np.frombuffer(_CUT + raw + _CUT, dtype=np.uint8) == _CUT[0])
    return int(np.count_nonzero(np.diff(cuts) > 1))
