"""nanoGPT's train.bin and val.bin: u16 ids and nothing else. The end-of-text token comes after each document.

Source: nanoGPT `data/openwebtext/prepare.py`. Weakness: nothing in such a file says what it is. Without `format: nanogpt` a
lone .bin is read as one only if it does not look like anything else.
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
from steep.store.token_file import Documents, TokenFile, write_tokens

ENDINGS = (".bin",)
NAMES_SPLITS = True
BOUNDARY_FIRST = False
U16_IDS = 1 << 16
_OTHERS = {b"PK\x03\x04": "a zip archive or a PyTorch file", b"\x80\x02\x8a\x0a": "an old PyTorch file",
           b"\x1f\x8b\x08\x00": "gzip", b"\x1f\x8b\x08\x08": "gzip", b"(\xb5/\xfd": "Zstandard", b"GGUF": "a GGUF model",
           b"MMIDIDX": "a Megatron index", b"\x93NUMPY": "a NumPy array", b"\x7fELF": "a program"}  # fmt: skip
"""At least four bytes each: any two are an id."""
_PARTS_OF_MEGATRON = ("_document", "_sentence")
_LOOKED_AT = 1 << 20


def sniff(path: Path) -> Optional[Sniffed]:
    """Any .bin that does not begin like something known that holds no tokens. Another format's header outweighs this."""
    path = token_path(path)
    if path.suffix != ENDINGS[0] or not path.is_file() or _what_else(path) is not None:
        return None
    return Sniffed(path, Evidence.NAME)


def accepts(sniffed: Optional[str]) -> bool:
    """Any file without an index of Megatron's: nothing in a nanoGPT file says that it is one."""
    return sniffed != "megatron"


def open(path: Path, opener: ShardOpener) -> Shard:
    """Check the size, and unless the user named the format, that the file looks like u16 ids. Raises DataError."""
    asked_for = opener.asked_for is not None
    problem = None if asked_for else _what_else(path) or _looks_wrong(path)
    size = path.stat().st_size
    if problem is None and size % 2:
        problem = (
            f"has {size:,} bytes, an odd number, so it does not hold 16-bit ids; it was cut short or is something else"
        )
    if problem is not None:
        raise DataError(f"{path}: {problem}.")
    note = "" if asked_for else "has no header, so it is read as nanoGPT's 16-bit ids (set `format: nanogpt` to say so)"
    return opener.without_index(TokenFile(path, "nanogpt", np.dtype("<u2"), 0, size // 2, BOUNDARY_FIRST, note=note))


def token_dtype(num_ids: int) -> np.dtype:
    """u16. Raises DataError for more ids."""
    if num_ids > U16_IDS:
        raise DataError(
            f"nanoGPT's files hold 16-bit ids, and this tokenizer has {num_ids:,}. Write llm_c or automodel, which have "
            "32-bit ids."
        )
    return np.dtype("<u2")


def write(prefix: Path, dtype: np.dtype, documents: Iterable[Documents]) -> None:
    """Write `prefix`.bin."""
    write_tokens(prefix.with_name(prefix.name + ".bin"), dtype, documents)


def _what_else(path: Path) -> Optional[str]:
    """What a file is by its first bytes, if it is a known kind that holds no tokens."""
    try:
        with path.open("rb") as file:
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
            "missing; if it is nanoGPT's, set `format: nanogpt`"
        )
    return None
