"""Tensors -> one .safetensors file, streamed, hashed while it is written, fsynced.

The bytes equal those that the safetensors library writes for the same tensors (a test compares them). Its own writer is
not used because it needs all tensors at once as bytes objects, and the file would have to be read again for its checksum.
Format: https://huggingface.co/docs/safetensors  (8-byte little-endian header length, JSON header padded to 8, data).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steep.checkpoint.manifest import FileEntry
from steep.core.errors import CheckpointError

BLOCK_BYTES = 16 << 20  # long enough that the interpreter lock is free nearly all the time

# In the library's order: tensors of later types come first in a file, so that every tensor is aligned to its type.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_DTYPE_ORDER = {dtype: number for number, dtype in enumerate(DTYPE_NAMES)}


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> FileEntry:
    """Write `tensors` (any device, shape and dtype in DTYPE_NAMES) to `path`; returns its size and SHA-256.

    read: gives the data by name, one tensor at a time, where `tensors` has only shapes and dtypes (on the meta device).
    Equal tensors give equal bytes, whatever the order of the mapping. The file is fsynced, its folder is not.
    Tensors that share memory are written once per name. Raises CheckpointError for a dtype that the format does not have.
    """
    if sys.byteorder != "little":
        raise CheckpointError("checkpoints are written on little-endian machines only")
    unknown = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in DTYPE_NAMES]
    if unknown:
        raise CheckpointError(f"safetensors has no type for {', '.join(unknown)}")
    names = sorted(tensors, key=lambda name: (-_DTYPE_ORDER[tensors[name].dtype], name.encode("utf-8")))
    header = _header(tensors, names, metadata or {})
    digest, size = hashlib.sha256(header), len(header)
    with open(path, "wb", buffering=1 << 20) as file:
        file.write(header)
        for name in names:
            data = tensor_bytes(tensors[name] if read is None else read(name))
            for start in range(0, len(data), BLOCK_BYTES):
                block = data[start : start + BLOCK_BYTES]
                digest.update(block)
                file.write(block)
            size += len(data)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(size, digest.hexdigest())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _header(tensors: Mapping[str, Tensor], names: list[str], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        dtype, shape = DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
