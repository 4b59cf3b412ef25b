"""model/consolidated of a checkpoint: a folder that `from_pretrained` loads, made from the files of the ranks."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steep.checkpoint.manifest import FileEntry, contained_path, write_file
from steep.checkpoint.safetensors_writer import write_safetensors
from steep.checkpoint.shards import Index, files_of, open_files, rank_file, read_tensor
from steep.core.files import sha256_file
from steep.models.hf_config import without_hidden_keys

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # full disk, quota, file size limit


def write_consolidated(
    root: Path, written: Mapping[str, FileEntry], index: Index, weights_file: str, hf_files: Mapping[str, bytes]
) -> dict[str, FileEntry]:
    """Write model/consolidated of the checkpoint `root`; its files by name.

    written: the files of the ranks, by name. index: of the model. weights_file: what to call the file of the weights.
    One rank's file that holds the whole model is linked, which costs nothing. Those of several ranks are put together one
    tensor at a time. hf_files: the other files that transformers needs, from `huggingface_files`.
    """
    folder = "model/consolidated"
    name = f"{folder}/{weights_file}"
    sources = files_of(index) or {rank_file(0)}  # a model without tensors
    if len(sources) == 1:
        source = f"model/{sources.pop()}"
        _link_or_copy(root / source, root / name)
        files = {name: written[source]}
    else:
        opened = open_files(root / "model", sources)
        shapes = {key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for key, tensor in index.items()}
        files = {
            name: write_safetensors(
                root / name, shapes, {"format": "pt"}, read=lambda key: read_tensor(key, index[key], opened, "model")
            )
        }
    for file, data in hf_files.items():
        path = contained_path(root / folder, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        files[f"{folder}/{file}"] = write_file(path, data)
    return files


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        shutil.copyfile(source, target)  # file systems without hard links
        with open(target, "rb+") as file:
            os.fsync(file.fileno())
        if sha256_file(target) != sha256_file(source):
            raise OSError(errno.EIO, "the copy differs from what was written", str(target)) from error


def huggingface_files(model: nn.Module, tokenizer: Any = None) -> dict[str, bytes]:
    """The files of model/consolidated except the weights, by name: configuration, generation settings, tokenizer.

    Made once per run, since training does not change them. model: a transformers model; tokenizer: a transformers tokenizer
    or None. `config.json` gets the class of the model and the dtype of its weights. It loses what would run code or name
    hub kernels when it is loaded (`auto_map`, and keys that begin with an underscore unless their family declares them), and what
    says that the weights are quantized; all else is as transformers writes it.
    """
    with tempfile.TemporaryDirectory() as folder:
        _config_of(model).save_pretrained(folder)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    for name in ("config.json", "generation_config.json"):
        if name in files:
            written = json.loads(files[name])
            if (kept := without_hidden_keys(written)) != written:  # else the file stays as transformers wrote it
                files[name] = (json.dumps(kept, indent=2, sort_keys=True) + "\n").encode("utf-8")
    return files


def _config_of(model: nn.Module) -> Any:
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    for name in ("auto_map", "quantization_config"):  # the weights of a .gguf were dequantized before training
        if hasattr(config, name):
            delattr(config, name)
    return config
