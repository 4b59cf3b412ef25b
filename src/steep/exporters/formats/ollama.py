"""Export for Ollama: the gguf format with a Modelfile beside it. `ollama create NAME -f Modelfile` in that folder takes it.

Ollama runs llama.cpp, so the file is verified as in the gguf format. The Modelfile's turns are checked against the tokenizer's.
"""

from __future__ import annotations

from pathlib import Path

from steep.core.files import write_text
from steep.exporters.format import ExportTask
from steep.exporters.formats import gguf
from steep.exporters.modelfile import modelfile
from steep.exporters.parity import Answers, Parity

DTYPES = gguf.DTYPES
DEFAULT_DTYPE = gguf.DEFAULT_DTYPE
ENDINGS = {*gguf.ENDINGS, "Modelfile"}


def check_task(task: ExportTask) -> None:
    """Raises ConfigError, ModelError, MissingExtraError for what the gguf format cannot do."""
    gguf.check_task(task)


def write(task: ExportTask, folder: Path) -> Answers:
    """Write the .gguf file and the Modelfile. Returns the answers that the file must give."""
    expected = gguf.write(task, folder)
    [weights] = folder.glob("*.gguf")
    text = modelfile(
        weights.name,
        task.loaded.hf_tokenizer,
        task.model.generation_config.to_diff_dict(),
        task.eos_ids(),
        task.model.config.max_position_embeddings,
        task.say,
    )
    write_text(folder / "Modelfile", text)
    return expected


def verify(task: ExportTask, folder: Path, expected: Answers) -> list[Parity]:
    """Compare the file as transformers' reader and llama.cpp see it. Raises ModelError, with the numbers, if they differ."""
    return gguf.verify(task, folder, expected)
