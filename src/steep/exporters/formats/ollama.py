"""Export for Ollama: the gguf form with a Modelfile beside it. `ollama create NAME -f Modelfile` in that folder takes it.

Ollama runs llama.cpp, so what is verified is the file, as in the gguf form, and that the Modelfile's turns are the tokenizer's.
"""

from __future__ import annotations

from pathlib import Path

from steep.core.files import write_text
from steep.exporters.format import ExportJob
from steep.exporters.formats import gguf
from steep.exporters.modelfile import modelfile
from steep.exporters.parity import Answers, Parity

DTYPES = gguf.DTYPES
DEFAULT_DTYPE = gguf.DEFAULT_DTYPE
ENDINGS = {*gguf.ENDINGS, "Modelfile"}


def check_job(job: ExportJob) -> None:
    """Raises for what the gguf form cannot do."""
    gguf.check_job(job)


def write(job: ExportJob, folder: Path) -> Answers:
    """Write the .gguf file and the Modelfile. Returns what the file must answer."""
    expected = gguf.write(job, folder)
    [weights] = folder.glob("*.gguf")
    text, said = modelfile(
        weights.name,
        job.loaded.hf_tokenizer,
        job.model.generation_config.to_diff_dict(),
        job.eos_ids(),
        job.model.config.max_position_embeddings,
    )
    write_text(folder / "Modelfile", text)
    job.say(said)
    return expected


def verify(job: ExportJob, folder: Path, expected: Answers) -> list[Parity]:
    """What transformers' reader and llama.cpp make of the file."""
    return gguf.verify(job, folder, expected)
