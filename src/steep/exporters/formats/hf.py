"""Export for transformers (and what reads its folders, such as vLLM): safetensors, config, tokenizer, generation_config, card.

With `--quantize` the linear layers are written in 4 or 8 bits; see `quantized.py`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from steep.core.files import write_text
from steep.exporters.format import ExportTask, refuse
from steep.exporters.ids import check_ids, with_strings
from steep.exporters.parity import Answers, Bounds, Parity, answer, check, compare
from steep.exporters.verify import ask_transformers

SAME_KERNELS = "same weights, same kernels: only the order of sums may differ"
DTYPES = {
    "float32": Bounds(1e-4, 1e-6, 1e-5, SAME_KERNELS),
    "bfloat16": Bounds(1e-2, 2e-2, 2e-2, SAME_KERNELS + "; bf16 keeps 8 bits of every number"),
    "float16": Bounds(2e-3, 2e-3, 2e-3, SAME_KERNELS + "; fp16 keeps 11 bits of every number"),
}
"""Logits against the trained model in the same dtype: a few units of the last place (2**-23, 2**-8, 2**-11) over some tens of
layers. KL and loss against fp32: what rounding every weight and activation costs, some ten times what is usual."""
DEFAULT_DTYPE = "bfloat16"
ENDINGS = {".json", ".safetensors", ".md", ".txt", ".model", ".jinja"}


def check_task(task: ExportTask) -> None:
    """Raises ConfigError, MissingExtraError for what this format cannot do."""
    refuse(task.options, "hf", tokenizer_pre="--to gguf", verify_with="--to gguf")
    if task.options.quantize is not None:
        from steep.exporters.quantized import check_method

        check_method(task.options.quantize, task.dtype)


def write(task: ExportTask, folder: Path) -> Answers:
    """Write the model in the task's dtype, or quantized. Returns the answers that the folder must repeat."""
    from steep.models.load import cast_weights

    _prepare_configurations(task)
    if task.options.quantize is not None:
        from steep.exporters.quantized import write_quantized

        expected = write_quantized(task, folder)
    else:
        import torch

        model = cast_weights(task.model, getattr(torch, task.dtype))
        expected = answer(model, task.questions, "trained")
        _save(model, folder, task.options.max_shard_size)
    task.loaded.hf_tokenizer.save_pretrained(folder)
    write_text(folder / "README.md", task.card)
    return expected


def verify(task: ExportTask, folder: Path, expected: Answers) -> list[Parity]:
    """What transformers makes of the folder in a new process. Raises ModelError with the numbers if it is another model."""
    from steep.exporters.quantized import BOUNDS

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
    model.config.use_cache = True  # off in training, but whoever serves the model wants it


def _save(model: Any, folder: Path, max_shard_size: int | str) -> None:
    from steep.models.hf_config import quiet_transformers

    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
