"""The hf format with linear layers in 4 or 8 bits, through transformers' own integration of bitsandbytes and torchao.

The model is written unquantized into a scratch folder, loaded by transformers with the quantization, and saved, so the served
model is what transformers itself makes. Disk: the unquantized model for a while. Memory: the trained model is freed first.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steep.core.errors import ConfigError, MissingExtraError
from steep.core.files import temporary_path
from steep.exporters.parity import Answers, Bounds, answer
from steep.models.hf_config import quiet_transformers
from steep.models.load import cast_weights
from steep.models.load_quantized import calm_bitsandbytes

if TYPE_CHECKING:
    from steep.exporters.format import ExportTask

PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao_int8": "torchao"}
BOUNDS = {
    "nf4": Bounds(2e-2, 0.5, 0.3, "4 bits hold a weight to about 5 % of its block's largest"),
    "int8": Bounds(
        2e-2,
        0.05,
        0.05,
        "8 bits hold a weight to 0.4 % of its row's largest, and activations are rounded in the same way",
    ),
    "torchao_int8": Bounds(2e-2, 0.05, 0.05, "8 bits hold a weight to 0.4 % of its row's largest"),
}
"""Logits against the quantized model in this process (the same numbers: nearly exact); KL and loss against the trained model."""


def check_method(method: str, dtype: str) -> None:
    """Raises ConfigError for an unknown method, MissingExtraError without its package."""
    if method not in PACKAGES:
        raise ConfigError(f"--quantize {method}: use one of {', '.join(PACKAGES)}")
    if importlib.util.find_spec(PACKAGES[method]) is None:
        raise MissingExtraError(PACKAGES[method], "quant", f"--quantize {method}")


def write_quantized(task: ExportTask, folder: Path) -> Answers:
    """Write `task.model` quantized into `folder`; the answers of the quantized model in this process."""
    import torch
    from transformers import AutoModelForCausalLM

    assert task.options.quantize is not None
    dtype = getattr(torch, task.dtype)
    calm_bitsandbytes()
    scratch = temporary_path(folder.parent / f"unquantized-{folder.name}")
    try:
        with quiet_transformers():
            cast_weights(task.model, dtype).save_pretrained(scratch)  # type: ignore[operator]
            task.model.to("meta")  # one model in memory at a time
            model: Any = AutoModelForCausalLM.from_pretrained(
                scratch, quantization_config=_configuration(task.options.quantize, dtype), dtype=dtype, device_map="cpu"
            )
            model.eval()
            model.save_pretrained(folder, max_shard_size=task.options.max_shard_size)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return answer(
        model, task.questions, "trained"
    )  # after saving: bitsandbytes may repack the weights at the first use


def _configuration(method: str, dtype: Any) -> Any:
    if method == "torchao_int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
