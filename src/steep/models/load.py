"""Loads a model to train: pretrained weights, or an architecture with fresh ones.

In: the model section of a configuration (or a `_target_`). Out: a causal language model in the given dtype on the given
device. Main choice: a downloaded model is data, not code: no remote code, and no weights but safetensors and .gguf.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steep.core.errors import ModelError, first_line
from steep.core.gguf_metadata import require_gguf
from steep.core.hub import cached_folder, explain_failure
from steep.core.section import Target
from steep.models.adapters import load_adapter
from steep.models.composite import auto_class
from steep.models.config import ModelConfig
from steep.models.fresh import build_fresh, build_target
from steep.models.generation_settings import check_generation_file
from steep.models.hf_config import quiet_transformers, read_config, read_gguf_config
from steep.models.quantize import quantize
from steep.models.reference import ADAPTER_CONFIG, adapted_settings, base_reference, resolve_reference
from steep.models.rope import extend_rope
from steep.models.weight_files import check_adapter_files, check_files, check_gguf_neighbours, check_hub_files


def load_model(
    config: ModelConfig | Target,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    allow_code: bool = True,
) -> nn.Module:
    """The model that the configuration names, in training mode, floating-point weights in `dtype`, on `device`.

    seed: fresh weights are a function of it alone, drawn in fp32 on the CPU; torch's generators keep their state.
    allow_code: as for `steep.core.targets.build`.
    Raises ModelError for a model that cannot be found, loaded or trained, MissingExtraError for .gguf without gguf.
    """
    if isinstance(config, Target):
        model = build_target(config, seed, allow_code)
    elif config.pretrained is not None:
        model = _load_pretrained(
            config.pretrained, config.revision, dtype, lambda found, source: extend_rope(found, config.rope, source)
        )
    else:
        assert config.config is not None
        model = build_fresh(config.config, config.revision, seed, rope=config.rope)
    if isinstance(config, ModelConfig) and config.quantize is not None:
        quantize(cast_weights(model.train(), dtype), config.quantize, dtype, device)
        return model
    return cast_weights(model.to(device=device), dtype).train()


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Floating-point parameters and saved buffers in `dtype`, in place. Buffers that are not saved keep theirs: rotary
    frequencies rounded to bf16 would give other logits than the model that transformers loads."""
    saved = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for tensor in {id(tensor): tensor for tensor in saved.values()}.values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
    return model


Adjust = Callable[[Any, str], None]
"""Changes a transformers configuration in place before the model is built; the text says where it comes from."""


def _load_pretrained(reference: str, revision: str | None, dtype: torch.dtype, adjust: Adjust) -> nn.Module:
    path = resolve_reference(reference) or cached_folder(reference, revision)
    if path is not None and (path / ADAPTER_CONFIG).is_file():
        return load_adapter(load_adapter_base(path, torch.float32, adjust), path, merge=True)
    if path is not None and path.suffix == ".gguf":
        return _load_gguf(path, dtype, adjust)
    source = str(path or reference)
    config = read_config(source, revision)
    adjust(config, source)
    if path is not None:
        check_files(path)
    else:
        check_hub_files(reference, revision)
    try:
        return _from_pretrained(source, revision=revision, config=config, dtype=dtype, use_safetensors=True)
    except OSError as error:
        raise ModelError(_no_weights(reference, path, error)) from error
    except ValueError:
        check_generation_file(source, revision)
        raise


def check_weights(reference: str, revision: str | None = None) -> None:
    """Raises ModelError for what `load_model` would refuse about these weights; no weight is read.

    A .gguf file, and a model of the hub that is not in the cache, are left to the run.
    """
    path = resolve_reference(reference) or cached_folder(reference, revision)
    if path is not None and (path / ADAPTER_CONFIG).is_file():
        check_adapter_files(path)
        check_weights(*base_reference(path))
        return
    if path is not None and path.suffix == ".gguf":
        check_gguf_neighbours(path)
    if path is None or not path.is_dir():
        return
    check_files(path)
    _from_pretrained(
        str(path), config=read_config(str(path)), dtype=torch.float32, use_safetensors=True, device_map="meta"
    )


def load_adapter_base(folder: Path, dtype: torch.dtype, adjust: Adjust = lambda config, source: None) -> nn.Module:
    """The base of the adapter in `folder`, with the vocabulary size and the positions that the adapter was trained with.

    Raises ModelError, before the base is read, for an adapter that could not be added to it.
    """
    check_adapter_files(folder)
    trained = adapted_settings(folder)
    rows = trained.pop("vocab_size", None)

    def as_trained(config: Any, source: str) -> None:
        for name, value in trained.items():
            setattr(config.get_text_config(), name, value)
        adjust(config, source)

    base, revision = base_reference(folder)
    model: Any = _load_pretrained(base, revision, dtype, as_trained)
    if rows is not None and rows != model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(rows, mean_resizing=False)  # the adapter brings the rows
    return model  # type: ignore[no-any-return]


def _load_gguf(path: Path, dtype: torch.dtype, adjust: Adjust) -> nn.Module:
    require_gguf(f"reading {path.name}")
    check_gguf_neighbours(path)
    try:
        config = read_gguf_config(path)
        adjust(config, path.name)
        return _forget_gguf(_from_pretrained(str(path.parent), gguf_file=path.name, config=config, dtype=dtype))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} could not be read as a GGUF model that transformers knows: {error}") from error


def _forget_gguf(model: Any) -> nn.Module:
    """Remove what transformers remembers of the file. The weights are dequantized by now, but it would refuse to save them, call
    a copy quantized, and write the model's name into config.json under a key that `make_config` refuses."""
    model.hf_quantizer = None
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model  # type: ignore[no-any-return]


def _from_pretrained(source: str, **arguments: Any) -> nn.Module:
    """transformers' loading, without remote code. Raises ModelError for weights that the files do not hold."""
    with quiet_transformers():
        model, info = auto_class(arguments["config"]).from_pretrained(
            source, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if missing or mismatched:
        names = ", ".join((missing + mismatched)[:3])
        raise ModelError(
            f"{source}: {len(missing + mismatched)} tensors of {type(model).__name__} are not in its weights or have "
            f"another shape, e.g. {names}. Is it a causal language model, and complete?"
        )
    return model  # type: ignore[no-any-return]


def _no_weights(source: str, path: Path | None, error: OSError) -> str:
    if path is None:
        return f"the weights of {explain_failure(source, error)}"
    return f"{source} holds no *.safetensors that transformers can load ({first_line(error)})"
