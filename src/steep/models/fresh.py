"""Models with fresh weights. In: an architecture, or a `_target_`. Out: weights that are a function of the seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steep.core.errors import ConfigError, ModelError
from steep.core.section import Target
from steep.core.targets import build
from steep.models.composite import auto_class
from steep.models.config import RopeConfig
from steep.models.hf_config import known_keys, make_config, quiet_transformers, read_config
from steep.models.layers import padded_positions, padded_tables, text_config
from steep.models.reference import resolve_reference
from steep.models.rope import extend_rope

REQUIRED_SIZES = ("model_type", "vocab_size")
"""Keys that a configuration mapping must give: no default vocabulary size fits the user's tokenizer."""


def build_fresh(
    description: str | dict[str, Any],
    revision: str | None,
    seed: int,
    dtype: torch.dtype = torch.float32,
    rope: RopeConfig | None = None,
) -> nn.Module:
    """A transformers model of this architecture with weights drawn from `seed`."""
    if isinstance(description, str):
        is_file = Path(description).expanduser().is_file() and not description.endswith(".gguf")
        path = None if is_file else resolve_reference(description)
        if path is not None and path.suffix == ".gguf":
            raise ModelError(f"model.config={description}: a .gguf file contains weights; use model.pretrained")
        config = read_config(description if path is None else str(path), revision)
    else:
        config = _config_from_mapping(description)
    extend_rope(config, rope, "model.config")
    with _seeded(seed), quiet_transformers():
        model: nn.Module = auto_class(config).from_config(config, trust_remote_code=False, dtype=dtype)
        _train_padding(model)
    return model


@torch.no_grad()
def _train_padding(model: Any) -> None:
    """Let the row of the family's padding token begin and train like any other, since the run's tokenizer may have a word there.

    Where the family needs the id (its positions are counted from it, or its configuration demands one), the row stays padding.
    """
    tables = padded_tables(model)
    if not tables or padded_positions(model) is not None:
        return
    if not all(set_token_id(config, "pad_token_id", None) for config in (model.config, text_config(model))):
        return
    for table in tables:
        row = table.weight[table.padding_idx]
        row.copy_(torch.randn_like(row) * table.weight.std())
        table.padding_idx = None


def take_special_tokens(model: Any, eos_id: int, bos_id: int | None) -> None:
    """Put the tokenizer's ids into the configurations of a fresh model. The padding id is taken out where no table has a row for
    it: a resumed run builds the model again from these configurations, and it must be the same."""
    for config in (model.generation_config, model.config):
        config.eos_token_id = eos_id
        if not set_token_id(config, "bos_token_id", bos_id):  # CWM and ModernBERT must have one
            config.bos_token_id = eos_id
        if not padded_tables(model):
            set_token_id(config, "pad_token_id", None)


def set_token_id(config: Any, name: str, value: int | None) -> bool:
    """Give a configuration a special token. Returns False, with all as it was, for a family that demands another value."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        setattr(config, name, value)
    except StrictDataclassError:
        return False
    return True


def _config_from_mapping(mapping: dict[str, Any]) -> Any:
    """A configuration from the user's mapping: required sizes, no unknown keys, no special token beyond the vocabulary."""
    missing = [key for key in REQUIRED_SIZES if key not in mapping]
    if missing:
        raise ModelError(f"model.config needs {' and '.join(missing)}; given: {', '.join(mapping) or 'no keys'}")
    config = make_config(mapping, "model.config")
    known = known_keys(config)
    unknown = [key for key in mapping if key not in known]
    if unknown:
        near = get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else " Remove it: nothing in the family's code reads it."
        raise ModelError(f"model.config: {config.model_type} has no setting {', '.join(map(repr, unknown))}.{hint}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        if name not in mapping and isinstance(value, int) and value >= config.vocab_size:
            set_token_id(config, name, None)  # the family's default belongs to another vocabulary
    return config


def build_target(target: Target, seed: int, allow_code: bool = True) -> nn.Module:
    """What a `_target_` returns, its fresh weights drawn from `seed`. Raises ConfigError if that is not a module."""
    with _seeded(seed):
        model = build(target, allow_code=allow_code, location="model")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: {target.target} returned {type(model).__name__}, not a torch.nn.Module")
    return model


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's CPU generator starts at `seed` inside and is restored after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
