"""What .gguf files need: the package that reads them, and one string of their metadata without reading the rest.

Source: the GGUF specification (ggml/docs/gguf.md).
"""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import IO, Optional

from steep.core.errors import MissingExtraError

CONFIG_FIELD = "steep.config"
"""Where steep's own .gguf files hold transformers' configuration as JSON: llama.cpp ignores keys that it does not know, and
transformers does not read some of llama.cpp's keys that matter (rope scaling, head sizes, attention scale)."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


def require_gguf(purpose: str) -> None:
    """Raise MissingExtraError unless the package `gguf` is installed."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "gguf", purpose)


def read_string_field(path: Path, key: str) -> Optional[str]:
    """A string of a GGUF file's metadata; None if it is absent or the file is not GGUF version 2 or 3.

    Reads the metadata only, until the key is found.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF" or _number(file, "<I") not in (2, 3):
            return None
        _number(file, "<Q")  # tensors
        for _ in range(_number(file, "<Q")):
            name, kind = _string(file), _number(file, "<I")
            if name == key and kind == _STRING:
                return _string(file)
            _skip(file, kind)
    return None


def _number(file: IO[bytes], layout: str) -> int:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))[0]


def _string(file: IO[bytes]) -> str:
    return file.read(_number(file, "<Q")).decode("utf-8", errors="replace")


def _skip(file: IO[bytes], kind: int) -> None:
    if kind == _STRING:
        file.seek(_number(file, "<Q"), 1)
    elif kind == _ARRAY:
        element, count = _number(file, "<I"), _number(file, "<Q")
        if element in _SCALARS:
            file.seek(count * struct.calcsize(_SCALARS[element]), 1)
        else:
            for _ in range(count):
                _skip(file, element)
    else:
        file.seek(struct.calcsize(_SCALARS[kind]), 1)
