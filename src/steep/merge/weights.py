"""Weights of a folder, opened lazily, and their linear combination, one tensor at a time in fp32.

Sources: WiSE-FT (arXiv 2109.01903) for blending, LAWA (2306.03241) and PMA (2505.12082) for averaging, task arithmetic
(2212.04089) for adding a difference. Weakness: the result is held in memory once before it is written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from steep.checkpoint.load import verified_reference
from steep.core.errors import ConfigError, ModelError
from steep.core.files import atomic_folder, read_object, write_json, write_text
from steep.core.say import Say
from steep.evaluation.loaded_model import note_adapter_merge
from steep.evaluation.model_reference import run_of
from steep.models.config import ModelConfig
from steep.models.hf_config import quiet_transformers
from steep.models.load import load_model
from steep.models.reference import ADAPTER_CONFIG, ADAPTER_WEIGHTS, resolve_reference
from steep.models.weight_files import check_adapter_files, check_files, index_names
from steep.tokenizer.hf_tokenizer import load_hf_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NOT_COPIED = (".safetensors", ".bin", ".gguf", ".md", ".pt")


class FolderWeights(Mapping[str, Tensor]):
    """Tensors of a model folder's safetensors by name, each read when asked for. Raises ModelError."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self._open = [safe_open(path, framework="pt") for path in _weight_files(self.folder)]
        self._file_of = {name: file for file in self._open for name in file.keys()}  # noqa: SIM118 (no mapping)

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, without reading it."""
        return list(self._file_of[name].get_slice(name).get_shape())


class MergedAdapter(FolderWeights):
    """The weights of an adapter's base with the adapter added in fp32, as a model folder that exists as long as this object.

    replaced: tensors by the adapter's names, instead of its own. Raises ModelError. Weakness: the whole model is on disk once,
    in the folder for temporary files.
    """

    def __init__(self, adapter: Path, replaced: Mapping[str, Tensor] | None = None):
        self._made = tempfile.TemporaryDirectory(prefix="steep-merged-")
        made = Path(self._made.name)
        source = adapter if replaced is None else _adapter_with(adapter, replaced, made / "adapter")
        model: Any = load_model(ModelConfig(pretrained=str(source)))
        with quiet_transformers():
            model.save_pretrained(made / "model")
        load_hf_tokenizer(str(source)).save_pretrained(made / "model")
        super().__init__(made / "model")


def _adapter_with(adapter: Path, replaced: Mapping[str, Tensor], out: Path) -> Path:
    check_adapter_files(adapter)
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    if unknown := sorted(replaced.keys() - tensors.keys()):
        raise ModelError(f"{adapter} has no {unknown[0]} ({len(unknown)} such tensors)")
    shutil.copytree(adapter, out)
    made = {}
    for name, tensor in tensors.items():
        twins = (other for other in replaced if tensors[other].shape == tensor.shape and tensors[other].equal(tensor))
        known = name if name in replaced else next(twins, None)  # peft saves tied tensors under both names
        made[name] = (tensor if known is None else replaced[known].to(tensor.dtype)).contiguous().clone()
    save_file(made, out / ADAPTER_WEIGHTS, {"format": "pt"})
    return out


class ModelWeights(dict[str, Tensor]):
    """Tensors by name of a model that must be loaded to be read (a .gguf file, a hub id). Tied weights count once."""

    def __init__(self, reference: str, revision: str | None = None):
        super().__init__()
        self.folder = Path(reference)
        seen: set[int] = set()
        for name, tensor in load_model(ModelConfig(pretrained=reference, revision=revision)).state_dict().items():
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                self[name] = tensor

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor."""
        return list(self[name].shape)


Weights = Union[FolderWeights, ModelWeights]


def open_weights(
    reference: str,
    say: Say,
    revision: str | None = None,
    adapter_tensors: Mapping[str, Tensor] | None = None,
) -> Weights:
    """Tensors by name: the verified weights of a run or checkpoint, or those of a folder, a .gguf file or a hub id.

    An adapter is added to its base in fp32, with `adapter_tensors` instead of its own. `say` is told of checkpoints that are
    skipped. Raises ModelError, CheckpointError.
    """
    found = verified_reference(reference, say)
    path = resolve_reference(found)
    if path is not None and (path / ADAPTER_CONFIG).is_file():
        note_adapter_merge(path, run_of(reference), say)
        return MergedAdapter(path, adapter_tensors)
    if path is not None and path.is_dir():
        return FolderWeights(path)
    return ModelWeights(found, revision)


def _weight_files(folder: Path) -> list[Path]:
    check_files(folder)
    if (folder / INDEX).is_file():
        return [folder / name for name in index_names(folder / INDEX, folder)]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    raise ModelError(f"{folder} has neither {WEIGHTS} nor {INDEX}; export the model with `steep export --to hf` first")


def check_same(first: Weights, second: Weights) -> None:
    """Raises ModelError naming the first difference of names or shapes."""
    for one, other in ((first, second), (second, first)):
        if missing := sorted(set(one) - set(other)):
            raise ModelError(
                f"{one.folder} has {missing[0]} ({len(missing)} such tensors), and {other.folder} does not"
            )
    for name in first:
        if first.shape(name) != second.shape(name):
            raise ModelError(
                f"{name} has shape {first.shape(name)} in {first.folder} and {second.shape(name)} in {second.folder}"
            )


def combine(sources: Sequence[Weights], factors: Sequence[float], like: int = -1) -> dict[str, Tensor]:
    """The sum of factor x weights over the sources, in fp32, stored in the dtypes of `sources[like]`.

    A single source with factor 1 (the others 0) comes out bit for bit, in its own dtypes. Raises ModelError if the models differ.
    """
    for other in sources[1:]:
        check_same(sources[0], other)
    used = [(source, factor) for source, factor in zip(sources, factors, strict=True) if factor != 0]
    if len(used) == 1 and used[0][1] == 1:
        return dict(used[0][0])
    return {name: _combined(name, used, sources[like]) for name in sources[0]}


def _combined(name: str, used: Sequence[tuple[Weights, float]], like: Weights) -> Tensor:
    kept = like[name]
    if not kept.is_floating_point():
        if any(not torch.equal(source[name], kept) for source, _ in used):
            raise ModelError(f"{name} holds integers that differ between the models, so it cannot be averaged")
        return kept
    total = torch.zeros(kept.shape, dtype=torch.float32)
    for source, factor in used:
        total.add_(source[name].float(), alpha=factor)
    return total.to(kept.dtype)


def require_free(out: str | os.PathLike[str]) -> Path:
    """`out` as a path. Raises ConfigError if it exists."""
    if Path(out).exists():
        raise ConfigError(f"{out} already exists; choose another --out")
    return Path(out)


def write_model(
    tensors: Mapping[str, Tensor],
    files_from: Path,
    out: str | os.PathLike[str],
    card: str,
    *,
    config_from: Path | None = None,
    finish: Callable[[Path], None] = lambda temporary: None,
) -> Path:
    """Write a model folder in one step: config and tokenizer of `files_from`, these weights, a card.

    config_from: another folder for config.json. finish: called with the folder before it is renamed; may add files or raise.
    Raises ConfigError if `out` exists.
    """
    folder = require_free(out)
    with atomic_folder(folder) as temporary:
        temporary.mkdir()
        for path in sorted(files_from.iterdir()):
            if path.is_file() and path.suffix not in NOT_COPIED and path.name != INDEX:
                shutil.copyfile(path, temporary / path.name)
        weights = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(weights, temporary / WEIGHTS, {"format": "pt"})
        if config_from is not None:
            shutil.copyfile(config_from / "config.json", temporary / "config.json")
        config = read_object(temporary / "config.json")
        floats = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
        if len(floats) == 1:
            config.pop("torch_dtype", None)
            write_json(temporary / "config.json", {**config, "dtype": floats.pop()})
        write_text(temporary / "README.md", card)
        finish(temporary)
    return folder
