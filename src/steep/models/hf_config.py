"""transformers' configuration of a model, read without running its code. In: a reference. Out: a configuration, checked.

Main choice: a downloaded model is data, not code. A config.json that names code to run or kernels to download is refused by name.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from steep.core.errors import ModelError
from steep.core.files import read_object
from steep.core.gguf_metadata import CONFIG_FIELD, read_string_field, require_gguf
from steep.core.hub import cached_folder, explain_failure
from steep.models.composite import is_composite
from steep.models.reference import ADAPTER_CONFIG, adapted_settings, base_reference, resolve_reference
from steep.runtime.optional_packages import quiet_imports

HARMLESS_KEYS = (
    "_name_or_path", "_commit_hash", "_attn_implementation_autoset", "_sliding_window_pattern", "_pad_token_id"
)  # fmt: skip
"""Underscore keys that versions of transformers write into config.json. They are dropped: layer_types replaces
_sliding_window_pattern, and the text_config of Idefics 3 and SmolVLM has the padding token that is used."""

FLOAT_TAG = "__float__"
SPECIAL_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}
"""How transformers writes floats that JSON has no word for: `{"__float__": "Infinity"}`."""


def pretrained_config(reference: str, revision: str | None = None) -> Any:
    """transformers' configuration of a folder, hub id or .gguf file; no weight is read. Raises ModelError.

    That of an adapter is its base's, with the vocabulary and the positions that the adapter was trained with.
    """
    path = resolve_reference(reference)
    folder = path or cached_folder(reference, revision)
    if folder is not None and (folder / ADAPTER_CONFIG).is_file():
        config = pretrained_config(*base_reference(folder))
        for name, value in adapted_settings(folder).items():
            setattr(config.get_text_config(), name, value)
        return config
    if path is not None and path.suffix == ".gguf":
        return read_gguf_config(path)
    return read_config(reference if path is None else str(path), revision)


def read_config(source: str, revision: str | None = None) -> Any:
    """transformers' configuration of a hub id, folder or config.json, checked. Raises ModelError."""
    path = Path(source).expanduser()
    if not path.exists() and (folder := cached_folder(source, revision)) is not None:
        path = folder
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        return make_config(_download_config(source, revision), source)
    return make_config(read_object(file), source)


def make_config(content: dict[str, Any], source: str) -> Any:
    """A configuration from the content of a config.json. Raises ModelError for one that would run code or cannot train."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    content = with_special_floats(content)
    if content.get("quantization_config"):
        method = content["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"{source} is quantized ({method}); training needs the unquantized weights, which model.quantize then quantizes"
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
    cleaned = without_hidden_keys(content)
    del cleaned["model_type"]
    try:
        with quiet_transformers():
            config = AutoConfig.for_model(model_type, **cleaned)
    except (StrictDataclassError, TypeError, ValueError) as error:  # transformers checks types and sizes
        raise ModelError(f"{source}: transformers refuses the configuration: {error}") from error
    _require_causal(config, source)
    return config


NAMES_IN_CODE = re.compile(
    r"""\bconfig\.(?!json\b)([a-z]\w*)                          # config.head_dim
    |\bgetattr\(\s*(?:self\.)?config,\s*"([a-z]\w*)"  # getattr(config, "head_dim", None)
    |\bkwargs(?:\.pop|\.get|\.setdefault)?[([]\s*"([a-z]\w*)"  # kwargs.pop("rope_theta", None)
    """,
    re.VERBOSE,
)
"""Where the code of a family in transformers names a key of its configuration."""

SAVED_KEYS = (
    "model_type", "torch_dtype", "pretraining_tp", "task_specific_params", "tokenizer_class", "n_ctx", "n_special",
    "predict_special_tokens", "max_window_layers", "use_sliding_window", "aux_loss_alpha", "seq_aux", "ep_size", "moe_layer_freq",
    "num_nextn_predict_layers", "scoring_func", "topk_method",
)  # fmt: skip
"""Keys that published config.json files of these families have, and that transformers keeps without using them."""


def known_keys(config: Any) -> set[str]:
    """The keys that a config.json of this family may have: those that its class declares or renames, and those that the code of
    the family reads without declaring them (transformers keeps every other key as an attribute, so a typo would be one too)."""
    from transformers import PretrainedConfig

    kind = type(config)
    known = set(PretrainedConfig().to_dict()) | {field.name for field in dataclasses.fields(kind)}
    known |= set(kind.attribute_map) | set(kind.attribute_map.values()) | set(SAVED_KEYS)
    for source in (kind.__module__, kind.__module__.replace(".configuration_", ".modeling_")):
        spec = importlib.util.find_spec(source)
        if spec is not None and spec.origin is not None:
            for match in NAMES_IN_CODE.finditer(Path(spec.origin).read_text(encoding="utf-8")):
                known.update(name for name in match.groups() if name)
    known = {key for key in known if not callable(getattr(kind, key, None))}
    if hasattr(config, "rope_parameters"):
        known |= {
            "rope_theta",
            "rope_scaling",
            "partial_rotary_factor",
        }  # what most config.json files give instead; transformers converts them
        if "sliding_attention" in (config.rope_parameters or {}):
            known.add("rope_local_base_freq")
    return known


def _download_config(source: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub.errors import HFValidationError
    from transformers import PretrainedConfig

    try:
        with quiet_transformers():
            content, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    except (OSError, HFValidationError) as error:
        raise ModelError(f"model {explain_failure(source, error)}") from error
    if not content:
        raise ModelError(f"model {source!r} has no config.json")
    return dict(content)


def _refuse_code(content: dict[str, Any], source: str) -> None:
    if "auto_map" in content:
        known = content.get("model_type") in _known_types()
        what = "transformers includes this family: remove auto_map from a local copy of config.json" if known else (
            "choose a model whose family is part of transformers"
        )  # fmt: skip
        raise ModelError(
            f"{source}: its config.json names code to run (auto_map), and steep never runs such code; {what}"
        )
    weights = content.get("transformers_weights")
    if weights is not None and not (isinstance(weights, str) and weights.endswith(".safetensors")):
        raise ModelError(
            f"{source}: its config.json names {weights!r:.80} as its weights (transformers_weights), which may be a pickle, and "
            "pickles can run code when read; steep reads *.safetensors only. Remove that key from a local copy."
        )
    hidden = sorted(set(_hidden_keys(content)) - set(HARMLESS_KEYS))
    if hidden:
        raise ModelError(
            f"{source}: its configuration sets {', '.join(hidden)}; keys with an underscore control transformers' "
            "internals (they can name kernels to download) and are refused. Remove them from a local copy."
        )


def _hidden_keys(content: Any) -> Iterator[str]:
    """The keys with an underscore, of nested configurations too, that are no settings of their family."""
    if isinstance(content, list):
        for item in content:
            yield from _hidden_keys(item)
    if isinstance(content, dict):
        own = _own_underscore_keys(content.get("model_type"))
        for key, value in content.items():
            if str(key).startswith("_") and key not in own and not _is_special_float(content):
                yield str(key)
            yield from _hidden_keys(value)


def without_hidden_keys(content: Any) -> Any:
    """The JSON value without the keys that `make_config` refuses or drops: those with an underscore that their family does not
    declare. What transformers needs to read the configuration back stays as it writes it."""
    if isinstance(content, list):
        return [without_hidden_keys(item) for item in content]
    if not isinstance(content, dict) or _is_special_float(content):
        return content
    own = _own_underscore_keys(content.get("model_type"))
    return {
        key: without_hidden_keys(value) for key, value in content.items() if not str(key).startswith("_") or key in own
    }


@lru_cache(maxsize=64)
def _own_underscore_keys(model_type: Any) -> frozenset[str]:
    """Settings with an underscore that the configuration class of a family declares (OPT's `_remove_final_layer_norm`). Those of
    transformers' base class, which choose kernels, are not among them."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    if not isinstance(model_type, str) or model_type not in _known_types():
        return frozenset()
    declared, internal = (
        {f.name for f in dataclasses.fields(kind)} for kind in (CONFIG_MAPPING[model_type], PretrainedConfig)
    )
    return frozenset(name for name in declared - internal if name.startswith("_"))


def with_special_floats(content: Any) -> Any:
    """The JSON value with transformers' `{"__float__": "Infinity"}` as the float that it stands for."""
    if isinstance(content, list):
        return [with_special_floats(item) for item in content]
    if not isinstance(content, dict):
        return content
    if _is_special_float(content):
        return SPECIAL_FLOATS[content[FLOAT_TAG]]
    return {key: with_special_floats(value) for key, value in content.items()}


def _is_special_float(content: dict[Any, Any]) -> bool:
    return len(content) == 1 and content.get(FLOAT_TAG) in SPECIAL_FLOATS


def _known_types() -> list[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return list(CONFIG_MAPPING_NAMES)


def _require_causal(config: Any, source: str) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind = type(config)
    needed = "use a causal language model such as Llama, Qwen, Gemma, SmolLM or GPT-2"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{source} is an encoder-decoder ({config.model_type}); {needed}")
    if is_composite(config):
        return
    if kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise ModelError(
            f"{source} is an encoder ({config.model_type}), trained to fill gaps, not to continue text; {needed}"
            + (". is_decoder: true in its config.json makes it one" if hasattr(config, "is_decoder") else "")
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{source}: {config.model_type} is not a causal language model in transformers; {needed}")


def read_gguf_config(path: Path) -> Any:
    """transformers' configuration of a .gguf file. Read once per process: reading its header takes about six seconds.

    Raises MissingExtraError.
    """
    require_gguf(f"reading {path.name}")
    found = path.stat()
    return copy.deepcopy(_read_gguf_config(path, found.st_mtime_ns, found.st_size))


@lru_cache(maxsize=1)
def _read_gguf_config(path: Path, mtime_ns: int, size: int) -> Any:
    from transformers import AutoConfig

    own = read_string_field(path, CONFIG_FIELD)  # a file that steep exported
    if own is not None:
        return make_config(json.loads(own), path.name)
    return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers' progress bars and warnings, and those of what it imports, are off inside; errors still show."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with quiet_imports():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
