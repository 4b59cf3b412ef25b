"""How a .gguf file says that text is split before merging, where the conversion of transformers omits it.

transformers 5.23 builds the tokenizer of a .gguf from its vocabulary and merges and knows many values of
`tokenizer.ggml.pre`, but not those whose vocabularies split digits one by one (SmolLM2 among them): "  1" then gets
other ids than in the model's training and in llama.cpp. Here the split is restored.
Source of the names: llama.cpp `llama-vocab.cpp`, the pre-tokenizers whose first expression is \\p{N}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from steep.core.gguf_metadata import read_string_field
from steep.core.say import Say

SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")


def restore_digit_split(hf_tokenizer: Any, path: Path, say: Say) -> None:
    """Make the tokenizer of a .gguf split digits one by one if the file says so and the conversion does not; say it."""
    from tokenizers import pre_tokenizers

    kind = read_string_field(path, "tokenizer.ggml.pre")
    backend = hf_tokenizer.backend_tokenizer
    present = json.loads(backend.to_str())["pre_tokenizer"]
    if kind not in SINGLE_DIGITS or present is None or "Digits" in json.dumps(present):
        return
    say(f"{path.name}: digits are split one by one (tokenizer.ggml.pre is {kind!r}), which transformers leaves out")
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
