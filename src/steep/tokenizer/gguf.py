"""How a .gguf file says that text is split before merging, where transformers' conversion leaves it out.

transformers 5.23 builds the tokenizer of a .gguf from its vocabulary and merges and knows many values of
`tokenizer.ggml.pre`, but not those whose vocabularies split digits one by one (SmolLM2 among them): "  1" then becomes
other ids than the model was trained with, and other ids than llama.cpp computes. Here the split is put back.
Source of the names: llama.cpp `llama-vocab.cpp`, the pre-tokenizers whose first expression is \\p{N}.
"""

from __future__ import annotations

import json
import logging
import struct
from pathlib import Path
from typing import IO, Any, Optional

SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

logger = logging.getLogger(__name__)


def restore_digit_split(hf_tokenizer: Any, path: Path) -> None:
    """Make the tokenizer of a .gguf split digits one by one if the file says so and the conversion does not."""
    from tokenizers import pre_tokenizers

    kind = read_string_field(path, "tokenizer.ggml.pre")
    backend = hf_tokenizer.backend_tokenizer
    present = json.loads(backend.to_str())["pre_tokenizer"]
    if kind not in SINGLE_DIGITS or present is None or "Digits" in json.dumps(present):
        return
    logger.warning(
        "%s: digits are split one by one (tokenizer.ggml.pre is %r), which transformers leaves out", path.name, kind
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def read_string_field(path: Path, key: str) -> Optional[str]:
    """A string of a GGUF file's metadata; None if it is not there or the file is no GGUF of version 2 or 3.

    Source: the GGUF specification (ggml/docs/gguf.md). Reads the metadata only, until the key is found.
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
