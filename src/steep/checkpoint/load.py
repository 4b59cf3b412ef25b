"""A checkpoint on disk -> state: the newest one that is whole is found, verified and read, for any world size."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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
from steep.checkpoint.safetensors_writer import DTYPE_NAMES
from steep.core.errors import CheckpointError

MODEL_FILES = ("config.json", "adapter_config.json")
"""One of them makes a folder a model: transformers' or peft's."""

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


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


def find_checkpoint(path: str | os.PathLike[str]) -> tuple[Path, list[str]]:
    """The newest whole checkpoint of a run folder, a folder of checkpoints, or `path` itself if it is a checkpoint.

    The one that LATEST names comes first, then the others by step. Every file of the one chosen has been verified.
    Returns it and messages about those passed over, each naming the file at fault. Raises CheckpointError if there is
    none, saying why; if `path` is itself a damaged checkpoint; or for one of a later format.
    """
    path = Path(path)
    if (path / MANIFEST_NAME).exists():
        verify(path)
        return path, []
    checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    messages: list[str] = []
    for candidate in _candidates(checkpoints, messages):
        problems = checkpoint_problems(candidate)
        if not problems:
            return candidate, [*messages, f"using {candidate.name}"] if messages else []
        messages.append(f"{candidate.name} cannot be used: {'; '.join(problems)}")
    reasons = "\n  ".join(messages) or "there is none"
    raise CheckpointError(f"no usable checkpoint in {checkpoints}:\n  {reasons}")


def verified_reference(reference: str) -> tuple[str, list[str]]:
    """What to load a model from: for a run or checkpoint, the folder for transformers in its newest whole checkpoint.

    Returns it, and messages about checkpoints that were passed over. Anything else comes back as it is, and so does a run whose
    checkpoints hold no such folder. Raises CheckpointError if a run or checkpoint has no whole one.
    """
    path = Path(reference).expanduser()
    if not ((path / "checkpoints").is_dir() or (path / "train_state.json").is_file()):
        return reference, []
    checkpoint, messages = find_checkpoint(path)
    folder = checkpoint / "model" / "consolidated"
    is_model = any((folder / name).is_file() for name in MODEL_FILES)
    return (str(folder) if is_model else reference), messages


def _candidates(checkpoints: Path, messages: list[str]) -> list[Path]:
    folders = checkpoint_folders(checkpoints)
    latest = read_latest(checkpoints)
    named = [folder for folder in folders if folder.name == latest]
    if folders and not named:
        messages.append("LATEST names no checkpoint that is there" if latest else "LATEST is missing or unreadable")
    return named + [folder for folder in folders if folder.name != latest]


def checkpoint_problems(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, each line naming a file; empty if it is whole. Raises FormatTooNewError."""
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
        config_yaml=(checkpoint / "config.yaml").read_text(encoding="utf-8"),
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
        index = _read_index(checkpoint, part)
        files = {f"{part}/{shard.file}" for tensor in index.values() for shard in tensor.shards}
        problems += [f"{part}/shards.json: names {f}, which the manifest lacks" for f in files - manifest.files.keys()]
    return problems


@dataclass(frozen=True)
class _Shard:
    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _GlobalTensor:
    dtype: torch.dtype
    shape: tuple[int, ...]
    shards: list[_Shard]


def load_tensors(checkpoint: str | os.PathLike[str], part: str) -> dict[str, Tensor]:
    """The global tensors of `part` ("model" or "optim") by name, on the CPU, put together from every rank's file.

    A tensor that lies whole in one file is a memory-mapped view of it: reading costs nothing until it is used.
    Raises CheckpointError naming the file and tensor at fault.
    """
    folder = Path(checkpoint) / part
    index = _read_index(Path(checkpoint), part)
    files = _open_files(folder, {shard.file for tensor in index.values() for shard in tensor.shards})
    return {name: _assemble(name, tensor, files, part) for name, tensor in index.items()}


def _open_files(folder: Path, names: set[str]) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    files = {}
    for name in sorted(names):
        try:
            files[name] = safe_open(contained_path(folder, name), framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder.name}/{name}: cannot be read ({error})") from error
    return files


def _assemble(name: str, tensor: _GlobalTensor, files: Mapping[str, Any], part: str) -> Tensor:
    if len(tensor.shards) == 1 and tensor.shards[0].shape == tensor.shape:
        return _read_shard(name, tensor, tensor.shards[0], files, part)
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    for shard in tensor.shards:
        place = tuple(slice(o, o + size) for o, size in zip(shard.offset, shard.shape, strict=True))
        whole[place] = _read_shard(name, tensor, shard, files, part)
    return whole


def _read_shard(name: str, tensor: _GlobalTensor, shard: _Shard, files: Mapping[str, Any], part: str) -> Tensor:
    from safetensors import SafetensorError

    try:
        data: Tensor = files[shard.file].get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{part}/{shard.file}: {name} cannot be read ({error})") from error
    if tuple(data.shape) != shard.shape or data.dtype != tensor.dtype:
        found = f"{data.dtype} {tuple(data.shape)}"
        raise CheckpointError(f"{part}/{shard.file}: {name} is {found}, shards.json has {tensor.dtype} {shard.shape}")
    return data


def _read_index(checkpoint: Path, part: str) -> dict[str, _GlobalTensor]:
    label = f"{part}/shards.json"
    content = read_json_file(contained_path(checkpoint, label), label)
    try:
        return {name: _global_tensor(name, entry) for name, entry in content["tensors"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{label}: is not an index of tensors ({error})") from error


def _global_tensor(name: str, entry: Mapping[str, Any]) -> _GlobalTensor:
    shape = _sizes(entry["shape"])
    shards = [_Shard(str(s["file"]), _sizes(s["offset"]), _sizes(s["shape"])) for s in entry["shards"]]
    for shard in shards:
        ends = [start + size for start, size in zip(shard.offset, shard.shape, strict=True)]
        if len(ends) != len(shape) or any(end > size for end, size in zip(ends, shape, strict=True)):
            raise ValueError(f"{name}: a shard in {shard.file} lies outside of {shape}")
    if sum(math.prod(shard.shape) for shard in shards) != math.prod(shape) or _overlap(shards):
        raise ValueError(f"{name}: its shards do not cover {shape} exactly once")
    return _GlobalTensor(_DTYPES[entry["dtype"]], shape, shards)


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(n, int) and 0 <= n < 2**48 for n in value):
        raise ValueError(f"{str(value)[:40]} is not a list of sizes")
    return tuple(value)


def _overlap(shards: list[_Shard]) -> bool:
    """Whether two shards share an element. Quadratic in the shards of one tensor, at most one per rank."""
    filled = [shard for shard in shards if math.prod(shard.shape)]
    return any(_meet(a, b) for i, a in enumerate(filled) for b in filled[:i])


def _meet(a: _Shard, b: _Shard) -> bool:
    dims = zip(a.offset, a.shape, b.offset, b.shape, strict=True)
    return all(a_start < b_start + b_size and b_start < a_start + a_size for a_start, a_size, b_start, b_size in dims)
