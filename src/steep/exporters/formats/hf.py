"""Export for transformers and programs that read its folders, such as vLLM: safetensors, configuration, tokenizer, card.

With `--quantize` the linear layers are written in 4 or 8 bits; see `quantized.py`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from steep.core.files import write_text
from steep.exporters.format import ExportTask, refuse
from steep.exporters.ids import check_ids, with_strings
from steep.exporters.parity import Answers, Bounds, Parity, answer, check, compare
from steep.exporters.quantized import BOUNDS, check_method, write_quantized
from steep.exporters.verify import ask_transformers
from steep.models.hf_config import quiet_transformers
from steep.models.load import cast_weights

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


def check_task(task: ExportTask) -> None:
    """Raises ConfigError, MissingExtraError for what this format cannot do."""
    refuse(task.options, "hf", tokenizer_pre="--to gguf", verify_with="--to gguf")
    if task.options.quantize is not None:
        check_method(task.options.quantize, task.dtype)


def write(task: ExportTask, folder: Path) -> Answers:
    """Write the model in the task's dtype, or quantized. Returns the answers that the folder must give."""
    _prepare_configurations(task)
    if task.options.quantize is not None:
        expected = write_quantized(task, folder)
    else:
        model = cast_weights(task.model, getattr(torch, task.dtype))
        expected = answer(model, task.questions, "trained")
        _save(model, folder, task.options.max_shard_size)
    task.loaded.hf_tokenizer.save_pretrained(folder)
    write_text(folder / "README.md", task.card)
    return expected


def verify(task: ExportTask, folder: Path, expected: Answers) -> list[Parity]:
    """Compare the folder as transformers loads it in a new process. Raises ModelError, with the numbers, if it differs."""
    bounds = DTYPES[task.dtype] if task.options.quantize is None else BOUNDS[task.options.quantize]
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


def _save(model: Any, folder: Path, max_shard_size: int | str) -> None:
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
