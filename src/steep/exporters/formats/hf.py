"""Export for transformers and programs that read its folders, such as vLLM: safetensors, configuration, tokenizer, card.

With `--quantize` the linear layers are written in 4 or 8 bits, through transformers' own integration of bitsandbytes and torchao:
the model is written unquantized into a scratch folder, loaded by transformers with the quantization, and saved, so the served
model is what transformers itself makes. Disk: the unquantized model for a while. Memory: the trained model is freed first.
"""

from __future__ import annotations

import copy
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch

from steep.core.errors import ConfigError, MissingExtraError
from steep.core.files import temporary_path, write_text
from steep.exporters.format import ExportTask, check_ids, refuse, with_strings
from steep.exporters.parity import Answers, Bounds, Parity, answer, check, compare
from steep.exporters.verify import ask_transformers
from steep.models.composite import auto_class, is_composite, processor_files
from steep.models.config import QUANTIZING_PACKAGES
from steep.models.document_attention import use_own_attention
from steep.models.hf_config import quiet_transformers
from steep.models.load import cast_weights
from steep.models.quantize import calm_bitsandbytes, check_nf4_runs_here
from steep.runtime.optional_packages import quiet_imports

SAME_KERNELS = "same weights, same kernels: only the order of sums may differ"
DTYPES = {
    "float32": Bounds(1e-4, 1e-6, 1e-5, SAME_KERNELS),
    "bfloat16": Bounds(1e-2, 2e-2, 2e-2, SAME_KERNELS + "; bf16 has 8 significant bits"),
    "float16": Bounds(2e-3, 2e-3, 2e-3, SAME_KERNELS + "; fp16 has 11 significant bits"),
}
"""Logits against the trained model in the same dtype: a few units in the last place (2**-23, 2**-8, 2**-11) over tens of layers.
KL and loss against fp32: about ten times the usual cost of rounding every weight and activation."""
DEFAULT_DTYPE = "bfloat16"
ENDINGS = {".json", ".safetensors", ".md", ".txt", ".model", ".jinja"}

EIGHT_BITS = "8 bits hold a weight to 0.4 % of its row's largest"
QUANTIZED_BOUNDS = {
    "nf4": Bounds(2e-2, 0.5, 0.3, "4 bits hold a weight to about 5 % of its block's largest"),
    "int8": Bounds(2e-2, 0.05, 0.05, EIGHT_BITS + ", and activations are rounded in the same way"),
    "torchao_int8": Bounds(2e-2, 0.05, 0.05, EIGHT_BITS),
}
"""Logits against the quantized model in this process (the same numbers: nearly exact); KL and loss against the trained model."""


def check_task(task: ExportTask) -> None:
    """Raises ConfigError, MissingExtraError for what this format cannot do."""
    refuse(task.options, "hf", tokenizer_pre="--to gguf", verify_with="--to gguf")
    method = task.options.quantize
    if method is not None and method not in QUANTIZING_PACKAGES:
        raise ConfigError(f"--quantize {method}: use one of {', '.join(QUANTIZING_PACKAGES)}")
    if method is not None and importlib.util.find_spec(QUANTIZING_PACKAGES[method]) is None:
        raise MissingExtraError(QUANTIZING_PACKAGES[method], "quant", f"--quantize {method}")
    if method == "nf4":
        check_nf4_runs_here(task.model)


def write(task: ExportTask, folder: Path) -> Answers:
    """Write the model in the task's dtype, or quantized. Returns the answers that the folder must give."""
    _prepare_configurations(task)
    if task.options.quantize is not None:
        expected = _write_quantized(task, task.options.quantize, folder)
    else:
        model: Any = cast_weights(task.model, getattr(torch, task.dtype))
        use_own_attention(model)  # in bf16 another kernel may send a token to another expert
        expected = answer(model, task.questions, "trained")
        with quiet_transformers():
            model.save_pretrained(folder, max_shard_size=task.options.max_shard_size)
    task.loaded.hf_tokenizer.save_pretrained(folder)
    if is_composite(task.model.config) and task.loaded.folder is not None:
        for name, data in processor_files(task.loaded.folder).items():
            (folder / name).write_bytes(data)
    write_text(folder / "README.md", task.card)
    return expected


def verify(task: ExportTask, folder: Path, expected: Answers) -> list[Parity]:
    """Compare the folder as transformers loads it in a new process. Raises ModelError, with the numbers, if it differs."""
    bounds = DTYPES[task.dtype] if task.options.quantize is None else QUANTIZED_BOUNDS[task.options.quantize]
    questions = with_strings(task, normal_only=False)
    found = ask_transformers("hf", folder, questions)
    parity = compare(task.trained, expected, found, task.questions.texts)
    check(parity, expected, bounds, found.greedy, f"the export {folder}")
    check_ids(task, [found], questions)
    return [parity]


def _prepare_configurations(task: ExportTask) -> None:
    model: Any = task.model
    eos_ids = sorted(task.eos_ids())
    generation = copy.deepcopy(model.generation_config)
    if eos_ids:
        generation.eos_token_id = eos_ids[0] if len(eos_ids) == 1 else eos_ids
    generation.use_cache = True
    model.generation_config = generation
    model.config.use_cache = True  # off in training, on for serving


def _write_quantized(task: ExportTask, method: str, folder: Path) -> Answers:
    """Write `task.model` quantized into `folder`; the answers of the quantized model in this process."""
    dtype = getattr(torch, task.dtype)
    calm_bitsandbytes()
    scratch = temporary_path(folder.parent / f"unquantized-{folder.name}")
    try:
        with quiet_imports(), quiet_transformers():
            cast_weights(task.model, dtype).save_pretrained(scratch)  # type: ignore[operator]
            task.model.to("meta")  # one model in memory at a time
            model: Any = auto_class(task.model.config).from_pretrained(
                scratch, quantization_config=_quantization(method, dtype), dtype=dtype, device_map="cpu"
            )
            model.eval()
            model.save_pretrained(folder, max_shard_size=task.options.max_shard_size)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    # After saving: bitsandbytes may repack the weights at the first use.
    return answer(model, task.questions, "trained")


def _quantization(method: str, dtype: torch.dtype) -> Any:
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
