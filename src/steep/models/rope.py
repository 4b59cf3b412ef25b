"""Context extension: rotary positions rescaled so that a model reads longer sequences than it was trained on.

In: a transformers configuration, before the model is built, and the `model.rope` section. Out: the same configuration with
`rope_parameters` and `max_position_embeddings` set, so that config.json has both. Weakness: one set of frequencies per model;
families with one per layer type (gemma3) are refused.
"""

from __future__ import annotations

from typing import Any

from steep.core.errors import ModelError
from steep.models.config import RopeConfig
from steep.models.layers import text_config


def extend_rope(config: Any, rope: RopeConfig | None, source: str) -> None:
    """Rescale the rotary positions of a transformers configuration in place; without `rope` do nothing.

    Raises ModelError for a model without rotary positions, one that is already scaled, and a length that extends nothing.
    """
    if rope is None:
        return
    text = text_config(config)
    known = getattr(text, "rope_parameters", None)
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(known, dict) or not known or not positions:
        raise ModelError(f"{source}: {text.model_type} has no rotary positions (RoPE); model.rope cannot extend it")
    if "rope_type" not in known:
        raise ModelError(
            f"{source}: {text.model_type} has rotary positions per layer type, which model.rope cannot extend"
        )
    if known["rope_type"] != "default":
        raise ModelError(
            f"{source} already has scaled rotary positions ({known['rope_type']}, {positions:,} positions); "
            "remove model.rope to train with those"
        )
    factor = rope.factor or (rope.length or 0) / positions
    if factor <= 1:
        raise ModelError(f"{source} has {positions:,} positions; model.rope.length={rope.length:,} extends nothing")
    scaled = {**known, "rope_type": rope.type, "factor": float(factor)}
    if rope.type in ("yarn", "llama3"):
        scaled["original_max_position_embeddings"] = positions
    if rope.type == "llama3":
        scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # as in Llama 3.1's config.json
    text.rope_parameters = scaled
    if rope.type != "dynamic":  # it counts from the old positions, which `max_positions` multiplies
        text.max_position_embeddings = rope.length or round(positions * factor)
