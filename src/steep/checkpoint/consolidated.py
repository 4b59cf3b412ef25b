"""The small files beside the weights that make a folder loadable by `from_pretrained`: config, generation, tokenizer."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

from torch import nn


def huggingface_files(model: nn.Module, tokenizer: Any = None) -> dict[str, bytes]:
    """The files of model/consolidated but the weights, by name. Made once per run: they do not change with training.

    model: a transformers model; tokenizer: a transformers tokenizer or None. `config.json` gets the class and the dtype
    of the weights as they are now, and loses what would run code or name hub kernels when it is loaded (`auto_map` and
    keys that begin with an underscore), and what says that the weights are quantized.
    """
    with tempfile.TemporaryDirectory() as folder:
        _config_of(model).save_pretrained(folder)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    for name in ("config.json", "generation_config.json"):
        if name in files:
            files[name] = _plain_json(files[name])
    return files


def _plain_json(data: bytes) -> bytes:
    """The JSON file without keys that begin with an underscore: transformers puts one into what it read from a .gguf."""
    return (json.dumps(_without_underscores(json.loads(data)), indent=2) + "\n").encode("utf-8")


def _without_underscores(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_underscores(item) for key, item in value.items() if not key.startswith("_")}
    return [_without_underscores(item) for item in value] if isinstance(value, list) else value


def _config_of(model: nn.Module) -> Any:
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    for name in ("auto_map", "quantization_config"):  # the weights of a .gguf were dequantized before training
        if hasattr(config, name):
            delattr(config, name)
    return config
