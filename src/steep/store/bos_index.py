"""`.bos.idx`: where documents begin in the `.bin` beside it, as NeMo Automodel writes it, often wrongly.

int32 without a header. Automodel's reader takes the values as token positions, its writer stores byte positions, so each
file must be checked. Versions of Automodel have put it beside files with llm.c's header as well as their own.
Source: Automodel 0.7.0 `nanogpt_dataset.py`, `nanogpt_data_processor.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import numpy as np

from steep.core.files import atomic_writer
from steep.store.token_file import HEADER_BYTES, TokenFile

INDEX_SUFFIX = ".bos.idx"


def index_path(path: Path) -> Path:
    """The `.bos.idx` beside a `.bin`; it need not exist."""
    return path.with_suffix(INDEX_SUFFIX)


def token_path(path: Path) -> Path:
    """The `.bin` beside a `.bos.idx`; any other path as it is."""
    return path.with_name(path.name.removesuffix(INDEX_SUFFIX) + ".bin") if path.name.endswith(INDEX_SUFFIX) else path


def read_bos_index(file: TokenFile, tokens: np.ndarray, bos: int) -> tuple[Optional[np.ndarray], str]:
    """Token positions of BOS from `.bos.idx`, ascending int64, and a remark if there is one; None if every reading is wrong.

    The values are token positions if each of them holds `bos`, else the byte positions that Automodel's writer stores, with
    values that overflowed 32 bits corrected.
    """
    path = index_path(file.path)
    raw = path.read_bytes()
    if len(raw) % 4 or not raw:
        return None, f"{path.name} has {len(raw):,} bytes, which is not a list of 32-bit numbers"
    values = np.frombuffer(raw, "<u4").astype(np.int64)
    values[1:] += np.cumsum(np.diff(values) < 0) << 32
    if _all_point_at(values, tokens, bos):
        return values, ""
    positions, rest = np.divmod(values - HEADER_BYTES, file.dtype.itemsize)
    if not rest.any() and _all_point_at(positions, tokens, bos):
        remark = f"documents from {path.name}, whose values are byte positions, as Automodel's writer stores them"
        return positions, remark
    return (
        None,
        f"{path.name} does not point at the token {bos} that begins each document, neither as token nor byte positions",
    )


def write_bos_index(path: Path, lengths: np.ndarray) -> None:
    """Write token positions, as Automodel's reader takes them. lengths: (documents,) int64, each with its BOS."""
    with atomic_writer(index_path(path), sync_folder=False) as file:
        file.write((np.cumsum(lengths) - lengths).astype("<i4").tobytes())


def _all_point_at(positions: np.ndarray, tokens: np.ndarray, token: int) -> bool:
    if positions[0] < 0 or positions[-1] >= len(tokens) or np.any(np.diff(positions) <= 0):
        return False
    return bool(np.all(tokens[positions] == token))
