"""A held-out text: which documents of which stores are scored and never trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray


class ScoredStore(Protocol):
    """What scoring needs of a token store."""

    document_lengths: NDArray[Any]

    @property
    def text_bytes(self) -> NDArray[Any] | None:
        """(num_documents,) UTF-8 bytes of each document's text, if they are known."""

    def read(self, document: int, start: int, count: int, out: NDArray[Any]) -> None:
        """Tokens [start, start+count) of `document` into `out`."""


@dataclass(frozen=True)
class HeldOutText:
    """A named text that is not trained on: some documents of some stores."""

    name: str
    parts: Sequence[tuple[ScoredStore, NDArray[Any]]]
    most_tokens: int | None = None
    """No more than this many are scored, whatever else is asked for."""
    role: str | None = None
    """Its role in the forgetting report, where the configuration or the role of its source gives one."""

    @property
    def num_tokens(self) -> int:
        """All its tokens; a score may take only the first of them."""
        return sum(int(store.document_lengths[documents].sum()) for store, documents in self.parts)
