"""datatrove's tokenized datasets: `.ds` holds u16 or u32 ids and nothing else, `.ds.index` u64 the end of each document.

Source: datatrove `pipeline/tokens/tokenizer.py`. The size of an id follows from the sizes of both files. Read only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import numpy as np

from steep.core.errors import DataError
from steep.store.formats import Evidence, Sniffed
from steep.store.shard import Shard, ShardOpener
from steep.store.token_file import TokenFile

ENDINGS = (".ds", ".ds.index", ".ds.metadata", ".ds.loss")
NAMES_SPLITS = True
_DTYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def sniff(path: Path) -> Optional[Sniffed]:
    """A .ds with an index beside it, or a file beside such a pair."""
    for ending in ENDINGS[1:]:
        if path.name.endswith(ending):
            path = path.with_name(path.name.removesuffix(ending) + ENDINGS[0])
    is_pair = path.suffix == ENDINGS[0] and path.is_file() and path.with_suffix(ENDINGS[1]).is_file()
    return Sniffed(path, Evidence.INDEX) if is_pair else None


def accepts(sniffed: Optional[str]) -> bool:
    """Its own files."""
    return sniffed == "datatrove"


def open(path: Path, opener: ShardOpener) -> Shard:
    """Check the index against the size of the tokens. Raises DataError."""
    dtype, offsets = _read_index(path)
    file = TokenFile(path, "datatrove", dtype, 0, int(offsets[-1]), boundary_first=False)
    return Shard(file, file.map_tokens(), np.diff(offsets), offsets[:-1])


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """Type of the ids, and (documents + 1,) int64 positions at which documents begin, then the end."""
    size = path.stat().st_size
    index_path = path.with_suffix(ENDINGS[1])
    raw = index_path.read_bytes()
    ends = np.frombuffer(raw, "<u8", len(raw) // 8).astype(np.int64)
    offsets = np.concatenate([[0], ends])
    total = int(offsets[-1])
    itemsize = size // total if total > 0 else 2
    if len(raw) % 8 or np.any(np.diff(offsets) < 0) or itemsize not in _DTYPES or total * itemsize != size:
        raise DataError(
            f"{path}: has {size:,} bytes, but {index_path.name} describes {len(ends):,} documents with {total:,} tokens "
            "of 2 or 4 bytes. One of them was cut short or is damaged; write or copy both again."
        )
    return _DTYPES[itemsize], offsets
