"""Loads a folder whose weights are quantized (bitsandbytes, torchao), to be scored or to generate.

Training needs unquantized weights, which `model.quantize` then quantizes.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steep.core.errors import MissingExtraError, ModelError
from steep.models.hf_config import make_config, quiet_transformers

METHODS = ("bitsandbytes", "torchao")
"""quant_method in config.json -> the package of the same name."""


def quantization_of(folder: str | Path) -> dict[str, Any] | None:
    """The quantization_config of a model folder; None if it has none or is not a folder."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    found = content.get("quantization_config") if isinstance(content, dict) else None
    return found if isinstance(found, dict) else None


def load_quantized(folder: str | Path, device: torch.device | str) -> nn.Module:
    """The model of a quantized folder as transformers loads it, in evaluation mode, on `device`.

    Raises ModelError for an unknown method or weights that are not safetensors, MissingExtraError without the package.
    """
    from transformers import AutoModelForCausalLM

    content = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    quantization = content.pop("quantization_config")
    method = quantization.get("quant_method", "unknown")
    if method not in METHODS:
        raise ModelError(f"{folder} is quantized by {method}; steep can use {' and '.join(METHODS)}")
    if importlib.util.find_spec(method) is None:
        raise MissingExtraError(method, "quant", f"using {folder}")
    calm_bitsandbytes()
    config = make_config(content, str(folder))
    config.quantization_config = quantization
    try:
        with quiet_transformers():
            model: nn.Module = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype="auto",
                device_map={"": str(device)},
                use_safetensors=True,
                trust_remote_code=False,
            )
    except OSError as error:
        raise ModelError(f"{folder}: its quantized weights cannot be loaded: {error}") from error
    return model.eval()


def calm_bitsandbytes() -> None:
    """Silence its 8-bit product, which warns at every call of every layer that its input is rounded to fp16."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
