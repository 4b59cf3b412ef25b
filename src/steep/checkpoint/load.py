"""A checkpoint on disk -> state: the newest complete one is found, verified and read, whatever the world size that wrote it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from steep.checkpoint.manifest import (
    MANIFEST_NAME,
    FormatTooNewError,
    Manifest,
    contained_path,
    file_problems,
    read_json_file,
    read_manifest,
)
from steep.checkpoint.retention import checkpoint_folders, read_latest
from steep.checkpoint.shards import files_of, open_files, read_index, read_tensor
from steep.core.errors import CheckpointError
from steep.core.files import read_text
from steep.core.say import Say, say_nothing

MODEL_FILES = ("config.json", "adapter_config.json")
"""One of them makes a folder a model: transformers' or peft's."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Tensors are read when asked for; they are views of the files, so copy what is kept."""

    path: Path
    manifest: Manifest
    train_state: dict[str, Any]
    optimizer_state: dict[str, Any]
    config_yaml: str

    def model_tensors(self) -> dict[str, Tensor]:
        """Global parameters and buffers by name."""
        return load_tensors(self.path, "model")

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Global optimizer state by `<parameter name>.<state key>`."""
        return load_tensors(self.path, "optim")

    def rng(self, rank: int = 0) -> dict[str, Any]:
        """The random number generators of a rank, for `restore_rng`."""
        return _read_mapping(self.path, f"rng/rank_{rank:05d}.json")


def find_checkpoint(path: str | os.PathLike[str], say: Say = say_nothing) -> Path:
    """The newest complete checkpoint of a run folder, a folder of checkpoints, or `path` itself if it is a checkpoint.

    The one that LATEST names comes first, then the others by step. Every file of the one chosen has been verified.
    `say` is told which were passed over, each line naming the file at fault. Raises CheckpointError if there is none,
    saying why; if `path` is itself a damaged checkpoint; or for one of a later format.
    """
    path = Path(path)
    if (path / MANIFEST_NAME).exists():
        verify(path)
        return path
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    folders, latest = checkpoint_folders(checkpoints), read_latest(checkpoints)
    passed_over = []
    if folders and latest not in [folder.name for folder in folders]:
        passed_over += ["LATEST names a checkpoint that is not there" if latest else "LATEST is missing or unreadable"]
    for candidate in sorted(folders, key=lambda folder: folder.name != latest):
        problems = checkpoint_problems(candidate)
        if not problems:
            for line in [*passed_over, f"using {candidate.name}"] if passed_over else []:
                say(line)
            return candidate
        passed_over.append(f"{candidate.name} cannot be used: {'; '.join(problems)}")
    reasons = "\n  ".join(passed_over) or "there is none"
    raise CheckpointError(f"no usable checkpoint in {checkpoints}:\n  {reasons}")


def verified_reference(reference: str, say: Say = say_nothing) -> str:
    """What to load a model from: for a run or checkpoint, the folder for transformers in its newest complete checkpoint.

    Anything else comes back as it is, and so does a run whose checkpoints hold no such folder; the folder for transformers
    itself is verified with its checkpoint. `say` is told which checkpoints were passed over. Raises CheckpointError if a run or
    checkpoint has no complete one.
    """
    path = Path(reference).expanduser()
    if (path.parent.name, path.name) == ("model", "consolidated") and (path.parent.parent / MANIFEST_NAME).is_file():
        verify(path.parent.parent)
        return reference
    if not ((path / "checkpoints").is_dir() or (path / "train_state.json").is_file() or _holds_checkpoints(path)):
        return reference
    folder = find_checkpoint(path, say) / "model" / "consolidated"
    return str(folder) if any((folder / name).is_file() for name in MODEL_FILES) else reference


def _holds_checkpoints(path: Path) -> bool:
    """Whether it is a run's folder of checkpoints."""
    return path.name == "checkpoints" and bool(checkpoint_folders(path))


def checkpoint_problems(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, each line naming a file; empty if it is complete. Raises FormatTooNewError."""
    try:
        manifest = read_manifest(checkpoint)
        return file_problems(checkpoint, manifest) or _index_problems(checkpoint, manifest)
    except FormatTooNewError:
        raise
    except CheckpointError as error:
        return [str(error)]


def verify(checkpoint: str | os.PathLike[str]) -> Manifest:
    """Check every file of a checkpoint against its manifest. Raises CheckpointError naming those at fault."""
    checkpoint = Path(checkpoint)
    if problems := checkpoint_problems(checkpoint):
        raise CheckpointError(f"{checkpoint} cannot be used: {'; '.join(problems)}")
    return read_manifest(checkpoint)


def open_checkpoint(checkpoint: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint that `find_checkpoint` or `verify` has passed. Raises CheckpointError."""
    checkpoint = Path(checkpoint)
    return Checkpoint(
        path=checkpoint,
        manifest=read_manifest(checkpoint),
        train_state=_read_mapping(checkpoint, "train_state.json"),
        optimizer_state=_read_mapping(checkpoint, "optim/state.json"),
        config_yaml=read_text(checkpoint / "config.yaml"),
    )


def _read_mapping(checkpoint: Path, name: str) -> dict[str, Any]:
    content = read_json_file(contained_path(checkpoint, name), name)
    if not isinstance(content, dict):
        raise CheckpointError(f"{name}: is not a mapping")
    return content


def _index_problems(checkpoint: Path, manifest: Manifest) -> list[str]:
    """Shards of files that the manifest does not vouch for would be read unverified."""
    problems = []
    for part in ("model", "optim"):
        files = {f"{part}/{file}" for file in files_of(read_index(checkpoint, part))}
        problems += [f"{part}/shards.json: names {f}, which the manifest lacks" for f in files - manifest.files.keys()]
    return problems


def load_tensors(checkpoint: str | os.PathLike[str], part: str) -> dict[str, Tensor]:
    """The global tensors of `part` ("model" or "optim") by name, on the CPU, put together from every rank's file.

    A tensor that lies whole in one file is a memory-mapped view of it: reading costs nothing until it is used.
    Raises CheckpointError naming the file and tensor at fault.
    """
    folder = Path(checkpoint) / part
    index = read_index(Path(checkpoint), part)
    files = open_files(folder, files_of(index))
    return {name: read_tensor(name, tensor, files, part) for name, tensor in index.items()}
