"""Formats of token files, one file each; the file's name is the `format` of a source of tokens.

To add a format, add one file with the names of `StoreFormat`, and of `WritableFormat` if steep can write it.
tests/contract/test_store_formats_contract.py checks every file in this folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Optional, Protocol, cast

import numpy as np

from steep.core.plugins import load_plugin, plugin_names
from steep.store.token_file import Documents

if TYPE_CHECKING:
    from steep.store.shard import Shard, ShardOpener

PACKAGE = "steep.store.formats"


class Evidence(IntEnum):
    """How sure a format is that a file is its own. Of several formats, the surest takes the file."""

    NAME = 1
    """The file's ending. Nothing in the file says what it is."""
    HEADER = 2
    """The first bytes of the file."""
    INDEX = 3
    """An index beside the file."""


class Sniffed(NamedTuple):
    """What `sniff` found."""

    path: Path
    """The file that holds the tokens."""
    evidence: Evidence


class StoreFormat(Protocol):
    """What every file of this folder has."""

    ENDINGS: tuple[str, ...]
    """Endings of the format's files: first that of the file that holds the tokens, then those of the files beside it."""
    NAMES_SPLITS: bool
    """Whether its files are named after their split (train.bin, val.bin). A folder with both splits is then refused."""

    def sniff(self, path: Path) -> Optional[Sniffed]:
        """The token file that `path` names or belongs to, if it may be of this format. Looks at names and first bytes only.

        Raises DataError for a file that cannot be read.
        """

    def accepts(self, sniffed: Optional[str]) -> bool:
        """Whether a file that looks like the format `sniffed` (None: like none) is opened as this one when the user names
        this one."""

    def open(self, path: Path, opener: ShardOpener) -> Shard:
        """Open a token file. Raises DataError naming what is wrong with it."""


class WritableFormat(StoreFormat, Protocol):
    """What a format has that steep also writes."""

    BOUNDARY_FIRST: Optional[bool]
    """Whether the boundary token comes before each document (True) or after it (False). None: the format has an index of
    documents and needs no boundary token."""

    def token_dtype(self, num_ids: int) -> np.dtype:
        """The dtype of ids below `num_ids`. Raises DataError if the format has none that is large enough."""

    def write(self, prefix: Path, dtype: np.dtype, documents: Iterable[Documents]) -> None:
        """Write `prefix`.bin, and what belongs beside it. Raises DataError for documents that the format cannot hold."""


@cache
def formats() -> dict[str, StoreFormat]:
    """The formats that can be read in place, by name."""
    return {name: cast(StoreFormat, load_plugin(PACKAGE, name)) for name in plugin_names(PACKAGE)}


def writable_formats() -> dict[str, WritableFormat]:
    """The formats that steep also writes, by name."""
    return {name: cast(WritableFormat, found) for name, found in formats().items() if hasattr(found, "write")}
