"""Loads a folder whose weights are quantized (bitsandbytes, torchao), to be scored or to generate.

Training needs unquantized weights, which `model.quantize` then quantizes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

from steep.core.errors import MissingExtraError, ModelError
from steep.core.files import read_object
from steep.models.hf_config import make_config, quiet_transformers
from steep.models.quantize import calm_bitsandbytes
from steep.models.weight_files import check_files

METHODS = ("bitsandbytes", "torchao")
"""quant_method in config.json -> the package of the same name."""


def load_quantized(folder: str | Path, device: torch.device | str) -> nn.Module:
    """The model of a quantized folder as transformers loads it, in evaluation mode, on `device`.

    Raises ModelError for an unknown method or weights that are not safetensors, MissingExtraError without the package.
    """
    from transformers import AutoModelForCausalLM

    content = read_object(Path(folder) / "config.json")
    quantization = content.pop("quantization_config")
    method = quantization.get("quant_method", "unknown")
    if method not in METHODS:
        raise ModelError(f"{folder} is quantized by {method}; steep can use {' and '.join(METHODS)}")
    if importlib.util.find_spec(method) is None:
        raise MissingExtraError(method, "quant", f"using {folder}")
    check_files(Path(folder))
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
