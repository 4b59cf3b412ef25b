"""Configuration of the model."""

from __future__ import annotations

from typing import Any, Literal, Optional, Union

from pydantic import model_validator

from steep.core.section import Section


class ModelConfig(Section):
    """Which model is trained: pretrained weights, or an architecture with fresh weights."""

    pretrained: Optional[str] = None
    """Hub id, local folder, steep run or checkpoint, or .gguf file (dequantized) to start from."""
    config: Optional[Union[str, dict[str, Any]]] = None
    """Start from fresh weights of this architecture: a mapping with `model_type` (transformers' names, e.g. `llama`)
    and its sizes, or a hub id, folder or config.json to take them from."""
    revision: Optional[str] = None
    """Branch, tag or commit of a hub model."""
    attention: Literal["auto", "document", "sdpa", "eager"] = "auto"
    """`document` computes attention document by document (varlen kernel on CUDA); `sdpa` and `eager` are transformers'
    own with restarting position_ids. `auto` takes `document` where the model allows it."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.pretrained is None) == (self.config is None):
            raise ValueError(
                "give either pretrained (weights to start from) or config (an architecture with fresh weights)"
            )
        return self
