"""Export of an adapter alone, in peft's layout: adapter_config.json, adapter_model.safetensors, tokenizer, card.

The comparison is of the adapter on its base in fp32: the trained model (the adapter added to the weights) against peft's own
computation (the adapter beside the weights) in a new process. Weakness: loading it needs the base that adapter_config.json names.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from steep.checkpoint.load import verified_reference
from steep.core.errors import ModelError
from steep.core.files import write_text
from steep.exporters.format import ExportTask, refuse
from steep.exporters.parity import Answers, Bounds, Parity, check, compare
from steep.exporters.verify import ask_transformers
from steep.models.reference import ADAPTER_CONFIG, base_reference, describe_origin

DTYPES = {
    "float32": Bounds(
        1e-3, 1e-6, 1e-5, "the same numbers; an adapter beside a weight and one added to it differ in the order of sums"
    )
}
DEFAULT_DTYPE = "float32"
ENDINGS = {".json", ".safetensors", ".md", ".txt", ".model", ".jinja"}


def adapter_folder(task: ExportTask) -> Path:
    """The folder of the trained adapter. Raises ModelError for a model without one."""
    folder = Path(verified_reference(task.loaded.reference))
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{task.loaded.reference} has no adapter: the whole model was trained. Export it with --to hf")
    return folder


def check_task(task: ExportTask) -> None:
    """Raises ConfigError, ModelError for what this format cannot do."""
    refuse(task.options, "adapter", quantize="--to hf", tokenizer_pre="--to gguf", verify_with="--to gguf")
    base, _ = base_reference(adapter_folder(task))
    if describe_origin(base) is not None:
        raise ModelError(
            f"{task.loaded.reference} is an adapter on a base that is an adapter itself ({base}), and peft would load it "
            "wrongly: export the whole model with --to hf, or train it on an exported base"
        )


def write(task: ExportTask, folder: Path) -> Answers:
    """Write the files as they were trained. Returns the trained model's answers."""
    shutil.copytree(adapter_folder(task), folder)
    write_text(folder / "README.md", task.card)
    return task.trained


def verify(task: ExportTask, folder: Path, expected: Answers) -> list[Parity]:
    """Compare the folder as peft loads it in a new process. Raises ModelError, with the numbers, if it differs."""
    found = ask_transformers("adapter", folder, task.questions)
    parity = compare(task.trained, expected, found, task.questions.texts)
    check(parity, expected, DTYPES[task.dtype], found.greedy, f"the export {folder}")
    return [parity]
