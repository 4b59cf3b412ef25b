"""Export of an adapter alone, in peft's layout: adapter_config.json, adapter_model.safetensors, tokenizer, card.

What is compared is the adapter on its base in fp32: the trained model (the adapter added to the weights) against peft's own
computation beside them in a new process. Weakness: whoever loads it needs the base that adapter_config.json names.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from steep.core.errors import ModelError
from steep.core.files import write_text
from steep.exporters.format import ExportTask, refuse
from steep.exporters.parity import Answers, Bounds, Parity, check, compare
from steep.exporters.verify import ask_transformers

DTYPES = {
    "float32": Bounds(
        1e-3, 1e-6, 1e-5, "the same numbers; an adapter beside a weight and in it differ in the order of sums"
    )
}
DEFAULT_DTYPE = "float32"
ENDINGS = {".json", ".safetensors", ".md", ".txt", ".model", ".jinja"}


def adapter_folder(task: ExportTask) -> Path:
    """Where the trained adapter lies. Raises ModelError for a model without one."""
    from steep.checkpoint.load import verified_reference
    from steep.models.reference import ADAPTER_CONFIG

    folder = Path(verified_reference(task.loaded.reference))
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{task.loaded.reference} holds no adapter: the whole model was trained. Export it with --to hf"
        )
    return folder


def check_task(task: ExportTask) -> None:
    """Raises ConfigError, ModelError for what this format cannot do."""
    refuse(task.options, "adapter", quantize="--to hf", tokenizer_pre="--to gguf", verify_with="--to gguf")
    adapter_folder(task)


def write(task: ExportTask, folder: Path) -> Answers:
    """Write the files as they were trained. Returns the trained model's answers."""
    shutil.copytree(adapter_folder(task), folder)
    write_text(folder / "README.md", task.card)
    return task.trained


def verify(task: ExportTask, folder: Path, expected: Answers) -> list[Parity]:
    """What peft makes of the folder in a new process. Raises ModelError, with the numbers, if it differs."""
    found = ask_transformers("adapter", folder, task.questions)
    parity = compare(task.trained, expected, found, task.questions.texts)
    check(parity, expected, DTYPES[task.dtype], found.greedy, f"the export {folder}")
    return [parity]
