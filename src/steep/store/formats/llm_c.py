"""llm.c's token files, which modded-nanogpt and older versions of Automodel share: 1,024 bytes of header, then ids.

Header: 256 × int32: magic 20240520, version 1, tokens (ids are u16), or magic 20240801, version 7, tokens (ids are u32).
The end-of-text token comes before each document. Source: llm.c `dev/data/data_common.py`, `llmc/dataloader.h`.
Weakness: no document index, no checksum, at most 2^31 - 1 tokens by the header; a count that wrapped around is accepted.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Optional

import numpy as np

from steep.core.errors import DataError
from steep.store.bos_index import token_path
from steep.store.formats import Evidence, Sniffed
from steep.store.shard import Shard, ShardOpener
from steep.store.token_file import (
    Documents,
    TokenFile,
    count_tokens,
    make_header,
    read_header,
    read_magic,
    write_tokens,
)

ENDINGS = (".bin",)
NAMES_SPLITS = True
BOUNDARY_FIRST = True
MAGIC_U16, VERSION_U16 = 20240520, 1
MAGIC_U32, VERSION_U32 = 20240801, 7
MAGIC_EVALUATION = 20240522
U16_IDS = 1 << 16
_KINDS: dict[tuple[int, int], np.dtype] = {
    (MAGIC_U16, VERSION_U16): np.dtype("<u2"),
    (MAGIC_U32, VERSION_U32): np.dtype("<u4"),
}


def sniff(path: Path) -> Optional[Sniffed]:
    """A .bin with one of llm.c's magic numbers, or the `.bos.idx` that Automodel once put beside one."""
    path = token_path(path)
    is_ours = read_magic(path) in (MAGIC_U16, MAGIC_U32, MAGIC_EVALUATION)
    return Sniffed(path, Evidence.HEADER) if is_ours else None


def accepts(sniffed: Optional[str]) -> bool:
    """Its own files."""
    return sniffed == "llm_c"


def open(path: Path, opener: ShardOpener) -> Shard:
    """Check header and size, and find the documents. Raises DataError."""
    header = read_header(path)
    magic, version = (int(header[0]), int(header[1])) if len(header) > 2 else (0, 0)
    if magic == MAGIC_EVALUATION:
        raise DataError(
            f"{path}: is one of llm.c's evaluation files (multiple choice, magic {MAGIC_EVALUATION}), not a text to train on."
        )
    dtype = _KINDS.get((magic, version))
    if dtype is None:
        raise DataError(
            f"{path}: magic {magic}, version {version}: llm.c's files have {MAGIC_U16} version {VERSION_U16} (u16) or "
            f"{MAGIC_U32} version {VERSION_U32} (u32)."
        )
    num_tokens = count_tokens(path, dtype.itemsize, int(header[2]))
    return opener.without_index(TokenFile(path, "llm_c", dtype, header.nbytes, num_tokens, BOUNDARY_FIRST))


def token_dtype(num_ids: int) -> np.dtype:
    """u16 where the ids fit, else u32."""
    return np.dtype("<u2" if num_ids <= U16_IDS else "<u4")


def write(prefix: Path, dtype: np.dtype, documents: Iterable[Documents]) -> None:
    """Write `prefix`.bin."""
    magic, version = next(kind for kind, of in _KINDS.items() if of == dtype)
    path = prefix.with_name(prefix.name + ".bin")
    write_tokens(path, dtype, documents, lambda count: make_header(magic, version, count))
