"""NeMo Automodel's nanoGPT files: 1,024 bytes of header, then ids, and a `.bos.idx` beside them.

Header: 256 × int32: magic 278895051, version 1, tokens, bytes per token (2 or 4). Older versions wrote llm.c's header
(20240520, u16). The BOS token comes before each document.
Source: Automodel 0.7.0 `nanogpt_dataset.py`, `nanogpt_data_processor.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Optional

import numpy as np

from steep.core.errors import DataError
from steep.store.bos_index import INDEX_SUFFIX, token_path, write_bos_index
from steep.store.formats import Evidence, Sniffed, llm_c
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

ENDINGS = (".bin", INDEX_SUFFIX)
NAMES_SPLITS = True
BOUNDARY_FIRST = True
MAGIC, VERSION = 278895051, 1
_DTYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def sniff(path: Path) -> Optional[Sniffed]:
    """A .bin with Automodel's magic number, or the `.bos.idx` beside one."""
    path = token_path(path)
    return Sniffed(path, Evidence.HEADER) if read_magic(path) == MAGIC else None


def accepts(sniffed: Optional[str]) -> bool:
    """Its own files, and those of llm.c, whose header Automodel once wrote."""
    return sniffed in ("automodel", "llm_c")


def open(path: Path, opener: ShardOpener) -> Shard:
    """Check header and size, and find the documents. Raises DataError."""
    header = read_header(path)
    magic, version, count, itemsize = map(int, header[:4]) if len(header) >= 4 else (0, 0, 0, 0)
    if magic == llm_c.MAGIC_U16:
        return llm_c.open(path, opener)
    if magic != MAGIC or version != VERSION or itemsize not in _DTYPES:
        raise DataError(
            f"{path}: magic {magic}, version {version}, {itemsize} bytes per token: Automodel's files have {MAGIC}, "
            f"version {VERSION}, 2 or 4 bytes, or llm.c's older header."
        )
    num_tokens = count_tokens(path, itemsize, count)
    return opener.without_index(
        TokenFile(path, "automodel", _DTYPES[itemsize], header.nbytes, num_tokens, BOUNDARY_FIRST, begins_with_boundary=True)
    )  # fmt: skip


token_dtype = llm_c.token_dtype


def write(prefix: Path, dtype: np.dtype, documents: Iterable[Documents]) -> None:
    """Write `prefix`.bin and `prefix`.bos.idx, whose values are token positions."""
    path = prefix.with_name(prefix.name + ".bin")
    lengths = write_tokens(path, dtype, documents, lambda count: make_header(MAGIC, VERSION, count, dtype.itemsize))
    write_bos_index(path, lengths)
