"""shards.json: which rank's file holds which part of each tensor, and tensors read by it.

Like everything that is read from a checkpoint, it may be altered or hostile: every fault becomes a CheckpointError.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steep.checkpoint.manifest import canonical_text, contained_path, read_json_file
from steep.checkpoint.pieces import Piece
from steep.checkpoint.safetensors_writer import DTYPE_NAMES
from steep.core.errors import CheckpointError

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Shard:
    """The part of a tensor that one file holds: a box at `offset` of the global tensor."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GlobalTensor:
    """A tensor of a checkpoint. Its shards cover it exactly once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shards: tuple[Shard, ...]


Index = dict[str, GlobalTensor]
"""Global tensors by name."""


def rank_file(rank: int) -> str:
    """The name of the file with a rank's tensors, in model/ and in optim/."""
    return f"rank_{rank:05d}.safetensors"


def index_of(pieces: Iterable[Piece], file: str) -> Index:
    """The index of one rank's pieces, which lie in `file`."""
    return {
        piece.name: GlobalTensor(
            piece.tensor.dtype, piece.global_shape, (Shard(file, piece.offset, tuple(piece.tensor.shape)),)
        )
        for piece in pieces
    }


def merge_indexes(indexes: Iterable[Index], part: str) -> Index:
    """The index of all ranks. Raises CheckpointError where they contradict each other or do not cover a tensor exactly once."""
    merged: Index = {}
    for index in indexes:
        for name, tensor in index.items():
            known = merged.setdefault(name, GlobalTensor(tensor.dtype, tensor.shape, ()))
            if (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
                raise CheckpointError(
                    f"{part}: the ranks disagree about {name}: {known.dtype} {known.shape} and {tensor.dtype} {tensor.shape}"
                )
            merged[name] = GlobalTensor(tensor.dtype, tensor.shape, known.shards + tensor.shards)
    try:
        for name, tensor in merged.items():
            _check_cover(name, tensor)
    except ValueError as error:
        raise CheckpointError(f"{part}: {error}") from error
    return merged


def index_text(index: Index) -> str:
    """The index as it is on disk."""
    tensors = {
        name: {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "shards": [
            {"file": shard.file, "offset": list(shard.offset), "shape": list(shard.shape)} for shard in tensor.shards]}
        for name, tensor in sorted(index.items())
    }  # fmt: skip
    return canonical_text({"tensors": tensors})


def read_index(checkpoint: Path, part: str) -> Index:
    """The index of `part` ("model" or "optim"), checked. Raises CheckpointError."""
    label = f"{part}/shards.json"
    content = read_json_file(contained_path(checkpoint, label), label)
    try:
        return {name: _global_tensor(name, entry) for name, entry in content["tensors"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{label}: is not an index of tensors ({error})") from error


def files_of(index: Index) -> set[str]:
    """The names of all files that hold a shard."""
    return {shard.file for tensor in index.values() for shard in tensor.shards}


def open_files(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """The safetensors files `names` in `folder`, memory-mapped. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    files = {}
    for name in sorted(names):
        try:
            files[name] = safe_open(contained_path(folder, name), framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder.name}/{name}: cannot be read ({error})") from error
    return files


def read_tensor(name: str, tensor: GlobalTensor, files: Mapping[str, Any], part: str) -> Tensor:
    """The global tensor on the CPU: a view of the file that holds all of it, or else put together in new memory."""
    if len(tensor.shards) == 1 and tensor.shards[0].shape == tensor.shape:
        return _read_shard(name, tensor, tensor.shards[0], files, part)
    assembled = torch.empty(tensor.shape, dtype=tensor.dtype)
    for shard in tensor.shards:
        box = tuple(slice(start, start + size) for start, size in zip(shard.offset, shard.shape, strict=True))
        assembled[box] = _read_shard(name, tensor, shard, files, part)
    return assembled


def _read_shard(name: str, tensor: GlobalTensor, shard: Shard, files: Mapping[str, Any], part: str) -> Tensor:
    from safetensors import SafetensorError

    try:
        data: Tensor = files[shard.file].get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{part}/{shard.file}: {name} cannot be read ({error})") from error
    if tuple(data.shape) != shard.shape or data.dtype != tensor.dtype:
        found = f"{data.dtype} {tuple(data.shape)}"
        raise CheckpointError(f"{part}/{shard.file}: {name} is {found}, shards.json has {tensor.dtype} {shard.shape}")
    return data


def _global_tensor(name: str, entry: Mapping[str, Any]) -> GlobalTensor:
    shards = tuple(Shard(str(s["file"]), _sizes(s["offset"]), _sizes(s["shape"])) for s in entry["shards"])
    tensor = GlobalTensor(_DTYPES[entry["dtype"]], _sizes(entry["shape"]), shards)
    _check_cover(name, tensor)
    return tensor


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(n, int) and 0 <= n < 2**48 for n in value):
        raise ValueError(f"{str(value)[:40]} is not a list of sizes")
    return tuple(value)


def _check_cover(name: str, tensor: GlobalTensor) -> None:
    """Raises ValueError unless the shards lie inside of the tensor and cover each of its elements once."""
    for shard in tensor.shards:
        ends = [start + size for start, size in zip(shard.offset, shard.shape, strict=True)]
        if len(ends) != len(tensor.shape) or any(end > size for end, size in zip(ends, tensor.shape, strict=True)):
            raise ValueError(f"{name}: a shard in {shard.file} lies outside of {tensor.shape}")
    # Boxes inside that do not overlap and have as many elements as the tensor cover it.
    elements = sum(math.prod(shard.shape) for shard in tensor.shards)
    if elements != math.prod(tensor.shape) or _overlap(tensor.shards):
        raise ValueError(f"{name}: its shards do not cover {tensor.shape} exactly once")


def _overlap(shards: tuple[Shard, ...]) -> bool:
    """Whether two shards share an element. Quadratic in the shards of one tensor, at most one per rank."""
    filled = [shard for shard in shards if math.prod(shard.shape)]
    return any(_meet(a, b) for i, a in enumerate(filled) for b in filled[:i])


def _meet(a: Shard, b: Shard) -> bool:
    dims = zip(a.offset, a.shape, b.offset, b.shape, strict=True)
    return all(a_start < b_start + b_size and b_start < a_start + a_size for a_start, a_size, b_start, b_size in dims)
