"""The reference: the `tokenizers` library itself, on as many threads as TOKENIZERS_PARALLELISM allows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from steep.tokenizer.encode import EncodedTexts, TextEncoder, TextTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PACKAGE = "tokenizers"


def build(tokenizer: TextTokenizer) -> HuggingFaceEncoder:
    """The reference encoder of `tokenizer`."""
    return HuggingFaceEncoder(tokenizer.backend)


class HuggingFaceEncoder(TextEncoder):
    """Encodes with `encode_batch_fast`, which computes no offsets."""

    def __init__(self, backend: Tokenizer):
        import tokenizers

        self.description = f"huggingface (tokenizers {tokenizers.__version__})"
        self._backend = backend

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        rows = [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        return EncodedTexts(np.fromiter(chain.from_iterable(rows), np.uint32, int(lengths.sum())), lengths)
