"""datatrove's tokenized datasets: `.ds` holds u16 or u32 ids and nothing else, `.ds.index` u64 the end of each document.

Source: datatrove `pipeline/tokens/tokenizer.py`. The size of an id follows from both sizes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from steep.core.errors import DataError

SUFFIX = ".ds"
COMPANIONS = (".ds.index", ".ds.metadata", ".ds.loss")
_DTYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def index_path(path: Path) -> Path:
    """The `.ds.index` of a `.ds` file."""
    return path.with_name(path.name + ".index")


def read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """Type of the ids, and (documents + 1,) int64 positions at which documents begin, with the end. Raises DataError."""
    size = path.stat().st_size
    raw = index_path(path).read_bytes()
    ends = np.frombuffer(raw, "<u8", len(raw) // 8).astype(np.int64)
    offsets = np.concatenate([[0], ends])
    total = int(offsets[-1])
    itemsize = size // total if total > 0 else 2
    if len(raw) % 8 or np.any(np.diff(offsets) < 0) or itemsize not in _DTYPES or total * itemsize != size:
        raise DataError(
            f"{path}: has {size:,} bytes, but {index_path(path).name} describes {len(ends):,} documents with {total:,} tokens "
            "of 2 or 4 bytes. One of them was cut short or is damaged; write or copy both again."
        )
    return _DTYPES[itemsize], offsets
