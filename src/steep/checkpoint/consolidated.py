"""The small files beside the weights that make a folder loadable by `from_pretrained`: config, generation, tokenizer."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from torch import nn


def huggingface_files(model: nn.Module, tokenizer: Any = None) -> dict[str, bytes]:
    """The files of model/consolidated but the weights, by name. Made once per run: they do not change with training.

    model: a transformers model; tokenizer: a transformers tokenizer or None. `config.json` gets the class and the dtype
    of the weights as they are now, and loses what would run code or name hub kernels when it is loaded (`auto_map` and
    keys that begin with an underscore).
    """
    with tempfile.TemporaryDirectory() as folder:
        _config_of(model).save_pretrained(folder)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _config_of(model: nn.Module) -> Any:
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if hasattr(config, "auto_map"):
        del config.auto_map
    return config
