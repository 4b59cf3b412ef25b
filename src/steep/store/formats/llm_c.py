"""llm.c's token files, which modded-nanogpt and older versions of Automodel share: 1,024 bytes of header, then ids.

Header: 256 × int32: magic 20240520, version 1, tokens (ids are u16), or magic 20240801, version 7, tokens (ids are u32).
The end-of-text token stands before each document. Source: llm.c `dev/data/data_common.py`, `llmc/dataloader.h`.
Weakness: no document index, no checksum, at most 2^31 - 1 tokens by the header; a count that wrapped around is accepted.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from steep.core.errors import DataError
from steep.store.token_file import TokenFile, count_tokens, read_header

MAGIC_U16, VERSION_U16 = 20240520, 1
MAGIC_U32, VERSION_U32 = 20240801, 7
MAGIC_EVALUATION = 20240522
MAGICS = (MAGIC_U16, MAGIC_U32, MAGIC_EVALUATION)
_KINDS: dict[tuple[int, int], np.dtype] = {
    (MAGIC_U16, VERSION_U16): np.dtype("<u2"),
    (MAGIC_U32, VERSION_U32): np.dtype("<u4"),
}


def open_tokens(path: Path) -> TokenFile:
    """Check header and size. Raises DataError."""
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
    return TokenFile(path, "llm_c", dtype, header.nbytes, num_tokens, boundary_first=True)
