"""nanoGPT's train.bin and val.bin: u16 ids and nothing else. The end-of-text token stands after each document.

Source: nanoGPT `data/openwebtext/prepare.py`. Weakness: nothing in such a file says what it is. Without `format: nanogpt` a
lone .bin is taken as one only if it does not look like anything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import numpy as np

from steep.core.errors import DataError
from steep.store.token_file import TokenFile

_OTHERS = {b"PK\x03\x04": "a zip archive or a PyTorch file", b"\x80\x02\x8a\x0a": "an old PyTorch file",
           b"\x1f\x8b\x08\x00": "gzip", b"\x1f\x8b\x08\x08": "gzip", b"(\xb5/\xfd": "Zstandard", b"GGUF": "a GGUF model",
           b"MMIDIDX": "a Megatron index", b"\x93NUMPY": "a NumPy array", b"\x7fELF": "a program"}  # fmt: skip
"""By at least four bytes: any two are an id."""
_PARTS_OF_MEGATRON = ("_document", "_sentence")
_LOOKED_AT = 1 << 20


def open_tokens(path: Path, *, asked_for: bool = False) -> TokenFile:
    """Check the size, and unless the format was `asked_for`, that it looks like u16 ids. Raises DataError."""
    problem = None if asked_for else what_else(path) or _looks_wrong(path)
    size = path.stat().st_size
    if problem is None and size % 2:
        problem = f"has {size:,} bytes, an odd number, so it holds no 16-bit ids; it was cut short or is something else"
    if problem is not None:
        raise DataError(f"{path}: {problem}.")
    note = (
        "" if asked_for else "has no header, so it is read as nanoGPT's 16-bit ids (`format: nanogpt` says so for good)"
    )
    return TokenFile(path, "nanogpt", np.dtype("<u2"), 0, size // 2, boundary_first=False, note=note)


def what_else(path: Path) -> Optional[str]:
    """What a file is by its first bytes, if it is something known that holds no tokens."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return next(
        (f"is {what}, not a file of tokens" for magic, what in _OTHERS.items() if start.startswith(magic)), None
    )


def _looks_wrong(path: Path) -> Optional[str]:
    if path.stem.endswith(_PARTS_OF_MEGATRON):
        return f"is a Megatron .bin by its name, and {path.stem}.idx is missing beside it; copy the index too"
    ids = np.fromfile(path, "<u2", _LOOKED_AT)
    high, low = ids[1::2], ids[::2]
    if len(high) >= 64 and (high < 32).mean() > 0.99 and (low < 32).mean() < 0.5:
        return (
            "has no header, and looks like 32-bit ids, which nanoGPT does not write. If it is a Megatron .bin, its .idx is "
            "missing beside it; if it is nanoGPT's, say `format: nanogpt`"
        )
    return None
