"""NeMo Automodel's nanoGPT files: 1,024 bytes of header, then ids, and a `.bos.idx` beside them that is often wrong.

Header: 256 × int32: magic 278895051, version 1, tokens, bytes per token (2 or 4). Older versions wrote llm.c's header
(20240520, u16). The BOS token stands before each document. `.bos.idx` is int32 without header: Automodel's reader takes its
values as token positions, its writer stores byte positions, so each file must be looked at.
Source: Automodel 0.7.0 `nanogpt_dataset.py`, `nanogpt_data_processor.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import numpy as np

from steep.core.errors import DataError
from steep.store.formats import llm_c
from steep.store.token_file import HEADER_BYTES, TokenFile, count_tokens, read_header

MAGIC, VERSION = 278895051, 1
INDEX_SUFFIX = ".bos.idx"
_DTYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def open_tokens(path: Path) -> TokenFile:
    """Check header and size. Raises DataError."""
    header = read_header(path)
    magic, version, count, itemsize = map(int, header[:4]) if len(header) >= 4 else (0, 0, 0, 0)
    if magic == llm_c.MAGIC_U16:
        return llm_c.open_tokens(path)
    if magic != MAGIC or version != VERSION or itemsize not in _DTYPES:
        raise DataError(
            f"{path}: magic {magic}, version {version}, {itemsize} bytes per token: Automodel's files have {MAGIC}, "
            f"version {VERSION}, 2 or 4 bytes, or llm.c's older header."
        )
    num_tokens = count_tokens(path, itemsize, count)
    return TokenFile(path, "automodel", _DTYPES[itemsize], header.nbytes, num_tokens, boundary_first=True)


def index_path(path: Path) -> Path:
    """The `.bos.idx` beside a `.bin`; it need not be there."""
    return path.with_suffix(INDEX_SUFFIX)


def read_bos_index(file: TokenFile, tokens: np.ndarray, bos: int) -> tuple[Optional[np.ndarray], str]:
    """Token positions of BOS from `.bos.idx`, ascending int64, and how they were read; None if every reading is wrong.

    Taken as token positions if every one holds `bos`, else as the byte positions that Automodel's writer stores, with values
    that ran over 32 bits put right.
    """
    path = index_path(file.path)
    raw = path.read_bytes()
    if len(raw) % 4 or not raw:
        return None, f"{path.name} has {len(raw):,} bytes, which is no list of 32-bit numbers"
    values = np.frombuffer(raw, "<u4").astype(np.int64)
    values[1:] += np.cumsum(np.diff(values) < 0) << 32
    if _all_point_at(values, tokens, bos):
        return values, f"documents from {path.name}"
    positions, rest = np.divmod(values - HEADER_BYTES, file.dtype.itemsize)
    if not rest.any() and _all_point_at(positions, tokens, bos):
        return (
            positions,
            f"documents from {path.name}, whose values are byte positions, as Automodel's writer stores them",
        )
    return (
        None,
        f"{path.name} does not point at the token {bos} that begins each document, neither as token nor byte positions",
    )


def _all_point_at(positions: np.ndarray, tokens: np.ndarray, token: int) -> bool:
    if positions[0] < 0 or positions[-1] >= len(tokens) or np.any(np.diff(positions) <= 0):
        return False
    return bool(np.all(tokens[positions] == token))
