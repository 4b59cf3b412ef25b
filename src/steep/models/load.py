"""Loads a model to train: pretrained weights, or an architecture with fresh ones.

In: the model section of a configuration (or a `_target_`). Out: a causal language model in the asked dtype on the asked
device. Main choice: a downloaded model is data, not code: no remote code, safetensors only, and a config.json that asks
for either is refused by name.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steep.core.errors import ConfigError, MissingExtraError, ModelError
from steep.core.gguf_metadata import CONFIG_FIELD, read_string_field
from steep.core.section import Target
from steep.models.adapters import ADAPTER_CONFIG, base_config_of, base_reference, load_adapter
from steep.models.config import ModelConfig, RopeConfig
from steep.models.quantize import quantize
from steep.models.rope import extend_rope, take_rope

HARMLESS_KEYS = ("_name_or_path", "_commit_hash", "_attn_implementation_autoset", "_sliding_window_pattern")
"""Underscore keys that transformers itself writes or wrote into config.json; they are dropped (layer_types says the last)."""

REQUIRED_SIZES = ("model_type", "vocab_size")
"""Keys that a configuration mapping must give: a default vocabulary would fit no tokenizer of the user's."""


def load_model(
    config: ModelConfig | Target,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> nn.Module:
    """The model that the configuration names, in training mode, floating-point weights in `dtype`, on `device`.

    seed: fresh weights are a function of it alone, drawn in fp32 on the CPU; torch's generators are left as they were.
    Raises ModelError for a model that cannot be found, loaded or trained, MissingExtraError for .gguf without gguf.
    """
    if isinstance(config, Target):
        model = build_target(config, seed)
    elif config.pretrained is not None:
        model = _load_pretrained(
            config.pretrained, config.revision, dtype, lambda found, source: extend_rope(found, config.rope, source)
        )
    else:
        assert config.config is not None
        model = build_fresh(config.config, config.revision, seed, rope=config.rope)
    method = None if isinstance(config, Target) else config.quantize
    if method is not None:
        quantize(cast_weights(model.train(), dtype), method, dtype, device)
        return model
    return cast_weights(model.to(device=device), dtype).train()


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Floating-point parameters and saved buffers in `dtype`, in place. Buffers that are not saved keep theirs: rotary
    frequencies rounded to bf16 give other logits than the model that transformers loads."""
    saved = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for tensor in {id(tensor): tensor for tensor in saved.values()}.values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
    return model


# ---- pretrained weights ----


Adjust = Callable[[Any, str], None]
"""Changes a transformers configuration, in place, before the model is built; told where it comes from."""


def _load_pretrained(reference: str, revision: str | None, dtype: torch.dtype, adjust: Adjust) -> nn.Module:
    path = resolve_reference(reference)
    if path is not None and (path / ADAPTER_CONFIG).is_file():
        return _load_merged(path, adjust)
    if path is not None and path.suffix == ".gguf":
        return _load_gguf(path, dtype, adjust)
    source = reference if path is None else str(path)
    config = read_config(source, revision)
    adjust(config, source)
    try:
        return _from_pretrained(source, revision=revision, config=config, dtype=dtype, use_safetensors=True)
    except OSError as error:
        raise ModelError(_no_weights(source, path, error)) from error


def _load_merged(folder: Path, adjust: Adjust) -> nn.Module:
    """The model under an adapter with the adapter added to its weights, in fp32."""
    return load_adapter(load_adapter_base(folder, torch.float32, adjust), folder, merge=True)


def load_adapter_base(folder: Path, dtype: torch.dtype, adjust: Adjust = lambda config, source: None) -> nn.Module:
    """The model that the adapter in `folder` belongs on: its base, as large and with the positions that the adapter was trained
    with."""
    trained = base_config_of(folder)

    def as_trained(config: Any, source: str) -> None:
        take_rope(config, trained)
        adjust(config, source)

    model: Any = _load_pretrained(base_reference(folder), None, dtype, as_trained)
    if trained is not None:
        rows = trained.get("vocab_size", model.config.vocab_size)
        if rows != model.config.vocab_size:
            model.resize_token_embeddings(rows, mean_resizing=False)  # the adapter brings the rows
    return model  # type: ignore[no-any-return]


def resolve_reference(reference: str) -> Path | None:
    """The folder or .gguf file that `reference` means: itself, or a run's or checkpoint's consolidated model.

    None if it is a hub id. Raises ModelError if it is a local path that holds no model.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        return _model_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.is_file():
        raise ModelError(
            f"{reference} is a file; needed is a folder with config.json and *.safetensors, or a .gguf file"
        )
    if path.suffix == ".gguf" or reference.startswith((".", "/", "~")) or reference.count("/") > 1:
        raise ModelError(f"{reference} does not exist")
    return None


def _model_folder(folder: Path) -> Path:
    """`folder` if it holds a model or an adapter; the consolidated one of a checkpoint; or that of a run's last checkpoint."""
    if _holds_model(folder):
        return folder
    if _holds_model(folder / "model" / "consolidated"):
        return folder / "model" / "consolidated"
    latest = folder / "checkpoints" / "LATEST"
    if latest.is_file():
        checkpoint = folder / "checkpoints" / latest.read_text(encoding="utf-8").strip()
        if _holds_model(checkpoint / "model" / "consolidated"):
            return checkpoint / "model" / "consolidated"
        raise ModelError(f"{latest} names {checkpoint.name}, which holds no model/consolidated/config.json")
    if (folder / "checkpoints").is_dir():
        raise ModelError(f"{folder} is a run without a complete checkpoint (checkpoints/LATEST is missing)")
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    found = f"; it holds {len(ggufs)} .gguf files, name one of them" if ggufs else ""
    raise ModelError(f"{folder} holds no config.json, no checkpoint and no run of steep{found}")


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()


def _load_gguf(path: Path, dtype: torch.dtype, adjust: Adjust) -> nn.Module:
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "gguf", f"reading {path.name}")
    try:
        config = read_gguf_config(path)
        adjust(config, path.name)
        return _forget_gguf(_from_pretrained(str(path.parent), gguf_file=path.name, config=config, dtype=dtype))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} could not be read as a GGUF model that transformers knows: {error}") from error


def _forget_gguf(model: Any) -> nn.Module:
    """The weights are dequantized by now, but transformers would refuse to save them and call a copy quantized; and what the file
    calls the model would stand in config.json under a key that `make_config` refuses."""
    model.hf_quantizer = None
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model  # type: ignore[no-any-return]


def read_gguf_config(path: Path) -> Any:
    """transformers' configuration of a .gguf file. Read once per process: its header takes some six seconds."""
    found = path.stat()
    return copy.deepcopy(_read_gguf_config(path, found.st_mtime_ns, found.st_size))


@lru_cache(maxsize=1)
def _read_gguf_config(path: Path, mtime_ns: int, size: int) -> Any:
    from transformers import AutoConfig

    own = read_string_field(path, CONFIG_FIELD)  # a file that steep exported
    if own is not None:
        return make_config(json.loads(own), path.name)
    return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)


def _from_pretrained(source: str, **arguments: Any) -> nn.Module:
    """transformers' loading, without remote code, refusing to make up weights that the files do not hold."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(
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
        return f"model {source!r}: its weights could not be loaded from the hub ({_first_line(error)})"
    pickles = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickles:
        return (
            f"{source} holds its weights as a pickle ({pickles[0].name}), which can run code when it is read; "
            "steep reads *.safetensors only. Convert it once where you trust it: load it with transformers, save_pretrained."
        )
    return f"{source} holds no *.safetensors that transformers can load ({_first_line(error)})"


# ---- configurations ----


def pretrained_config(reference: str, revision: str | None = None) -> Any:
    """transformers' configuration of a folder, hub id or .gguf file; no weight is read. Raises ModelError."""
    path = resolve_reference(reference)
    if path is not None and path.suffix == ".gguf":
        return read_gguf_config(path)
    return read_config(reference if path is None else str(path), revision)


def read_config(source: str, revision: str | None = None) -> Any:
    """transformers' configuration of a hub id, folder or config.json, checked. Raises ModelError."""
    return make_config(_read_config_dict(source, revision), source)


def make_config(content: dict[str, Any], source: str) -> Any:
    """A transformers configuration from the content of a config.json, refusing what would run code or cannot train."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if content.get("quantization_config"):
        method = content["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"{source} is quantized ({method}); training needs its unquantized weights, which "
            "model.quantize then quantizes itself"
        )
    _refuse_code(content, source)
    model_type = content.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{source}: its configuration has no model_type")
    known = _known_types()
    if model_type not in known:
        near = get_close_matches(model_type, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ModelError(f"{source}: this version of transformers has no model_type {model_type!r}.{hint}")
    cleaned = _without_underscores({key: value for key, value in content.items() if key != "model_type"})
    try:
        with quiet_transformers():
            config = AutoConfig.for_model(model_type, **cleaned)
    except (StrictDataclassError, TypeError, ValueError) as error:  # transformers checks types and sizes
        raise ModelError(f"{source}: transformers refuses the configuration: {error}") from error
    _require_causal(config, source)
    return config


def _read_config_dict(source: str, revision: str | None) -> dict[str, Any]:
    path = Path(source).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        return _download_config(source, revision)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no mapping")
    return content


def _download_config(source: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub.errors import HFValidationError
    from transformers import PretrainedConfig

    try:
        with quiet_transformers():
            content, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    except (OSError, HFValidationError) as error:
        offline = " The hub is switched off here (HF_HUB_OFFLINE)." if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise ModelError(
            f"model {source!r} is neither a local folder nor found on the hub or in its cache.{offline} "
            f"Give a local folder, a .gguf file, or a hub id that is reachable or cached. ({_first_line(error)})"
        ) from error
    if not content:
        raise ModelError(f"model {source!r} has no config.json")
    return dict(content)


def _refuse_code(content: dict[str, Any], source: str) -> None:
    if "auto_map" in content:
        known = content.get("model_type") in _known_types()
        what = "transformers has this family itself: remove auto_map from a local copy of config.json" if known else (
            "choose a model whose family is part of transformers"
        )  # fmt: skip
        raise ModelError(f"{source}: its config.json names code to run (auto_map), which steep never does; {what}")
    hidden = sorted(key for key in _all_keys(content) if key.startswith("_") and key not in HARMLESS_KEYS)
    if hidden:
        raise ModelError(
            f"{source}: its configuration sets {', '.join(hidden)}; keys with an underscore steer transformers' "
            "internals (they can name kernels to download) and are refused. Remove them from a local copy."
        )


def _all_keys(content: Any) -> Iterator[str]:
    """The keys of nested configurations."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield str(key)
            yield from _all_keys(value)


def _without_underscores(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    return {key: _without_underscores(value) for key, value in content.items() if not str(key).startswith("_")}


def _known_types() -> list[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return list(CONFIG_MAPPING_NAMES)


def _require_causal(config: Any, source: str) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind = type(config)
    needed = "needed is a causal language model such as Llama, Qwen, Gemma, SmolLM or GPT-2"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{source} is an encoder-decoder ({config.model_type}); {needed}")
    if kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise ModelError(
            f"{source} is an encoder ({config.model_type}), trained to fill gaps, not to continue; {needed}"
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{source}: {config.model_type} is not a causal language model in transformers; {needed}")


# ---- fresh weights ----


def build_fresh(
    description: str | dict[str, Any],
    revision: str | None,
    seed: int,
    dtype: torch.dtype = torch.float32,
    rope: RopeConfig | None = None,
) -> nn.Module:
    """A transformers model of this architecture with weights drawn from `seed`."""
    from transformers import AutoModelForCausalLM

    if isinstance(description, str):
        config = read_config(_config_source(description), revision)
    else:
        config = _config_from_mapping(description)
    extend_rope(config, rope, "model.config")
    with _seeded(seed), quiet_transformers():
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=dtype)
    return model


def _config_source(description: str) -> str:
    """A config.json as it is; folders, runs and checkpoints resolved; hub ids unchanged."""
    if Path(description).expanduser().is_file() and not description.endswith(".gguf"):
        return description
    path = resolve_reference(description)
    if path is not None and path.suffix == ".gguf":
        raise ModelError(f"model.config={description}: a .gguf file holds weights; use model.pretrained")
    return description if path is None else str(path)


def _config_from_mapping(mapping: dict[str, Any]) -> Any:
    """A configuration from the user's mapping: required sizes, no unknown keys, no end-of-text id out of range."""
    missing = [key for key in REQUIRED_SIZES if key not in mapping]
    if missing:
        raise ModelError(f"model.config needs {' and '.join(missing)}; given are: {', '.join(mapping) or 'no keys'}")
    config = make_config(mapping, "model.config")
    _refuse_unknown_keys(mapping, config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        if name not in mapping and isinstance(value, int) and value >= config.vocab_size:
            setattr(config, name, None)  # the family's default belongs to another vocabulary
    return config


OLD_ROPE_KEYS = {"rope_theta", "rope_scaling"}
"""What most config.json files say instead of `rope_parameters`; transformers reads them into it."""


def _refuse_unknown_keys(mapping: dict[str, Any], config: Any) -> None:
    known = set(type(config)().to_dict()) | set(type(config).attribute_map) | {"model_type", "torch_dtype"}
    if hasattr(config, "rope_parameters"):
        known |= OLD_ROPE_KEYS
        if "sliding_attention" in (config.rope_parameters or {}):
            known.add("rope_local_base_freq")
    unknown = [key for key in mapping if key not in known]
    if unknown:
        near = get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ModelError(f"model.config: {config.model_type} has no setting {', '.join(map(repr, unknown))}.{hint}")


def build_target(target: Target, seed: int) -> nn.Module:
    """What a `_target_` returns, its fresh weights drawn from `seed`. Raises ConfigError if that is no module."""
    from steep.core.targets import build

    with _seeded(seed):
        model = build(target, location="model")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: {target.target} returned {type(model).__name__}; needed is a torch.nn.Module")
    return model


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's CPU generator starts at `seed` inside and is put back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers' own switches for progress bars and warnings, put back after: errors still show."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
