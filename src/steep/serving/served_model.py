"""The files that a server is given for what a person names: a run, checkpoint, model folder, hub id or .gguf file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steep.checkpoint.load import verified_reference
from steep.core.errors import ModelError
from steep.core.say import Say
from steep.evaluation.model_reference import Reference, model_reference
from steep.models.reference import ADAPTER_CONFIG

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServedModel:
    """What a server loads: a folder or a hub id, or the .gguf file if it is one."""

    folder: str
    gguf: Path | None = None


def served_model(reference: Reference, say: Say) -> ServedModel:
    """Of a run the newest complete checkpoint, every byte verified. Raises ModelError for what no server loads by itself."""
    named = model_reference(reference).model
    folder = getattr(named, "pretrained", None)
    if folder is None:
        raise ModelError(
            f"{reference} was built by a _target_ and has no folder that a server loads; steep chat talks to it"
        )
    folder = verified_reference(str(folder), say)
    if Path(folder).is_dir() and len(files := sorted(Path(folder).glob("*.gguf"))) == 1:
        folder = str(files[0])  # the folder of a gguf or ollama export
    if folder.endswith(".gguf"):
        return ServedModel(folder, Path(folder))
    if Path(folder, ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{reference} is an adapter, and a server needs the whole model: steep export {reference} --to hf writes it to a "
            "folder, which can be served"
        )
    return ServedModel(folder)
