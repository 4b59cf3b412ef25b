"""The families that have a .gguf format: how llama.cpp stores each, and what of a configuration it would compute differently.

Sources: llama.cpp's model loaders and graphs (`src/models/*.cpp`) and its converter. Every family here was compared with
llama.cpp itself on small random models (`tests/equivalence/test_export_gguf.py`); any other is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from steep.core.errors import ModelError


@dataclass(frozen=True)
class Family:
    """How one architecture of llama.cpp stores a family's weights."""

    architecture: str
    interleaves_rotation: bool = False
    """Query and key rows are paired as (0, 1), (2, 3), ... and not as (0, half), (1, half + 1), ..."""
    norm_offset: float = 0.0
    """Added to every norm's weight."""
    transposes: bool = False
    """transformers stores linear layers as (in, out) (GPT-2's Conv1D)."""
    activations: tuple[str, ...] = ("silu",)
    """The activations that llama.cpp computes, under transformers' names."""
    rotations: tuple[str, ...] = ("default", "linear", "yarn")
    """The scalings of positions that a file can express."""
    partial_rotation: bool = False
    """It can rotate a part of each head."""
    has_window: bool = False
    """llama.cpp computes sliding windows; in a family without them the file's context is as long as the window."""
    square_heads: bool = False
    """All heads together are as wide as the hidden states."""
    needs_head: bool = False
    """The file must hold the output head, also where it is tied to the embeddings."""
    renormalizes: bool | None = None
    """Whether the weights of the chosen experts are made to sum to 1; None without experts."""
    has_reader: bool = True
    """transformers' reader of .gguf files knows it. Without one only llama.cpp can verify a file."""


GELU_TANH = ("gelu_pytorch_tanh", "gelu_new")
WITH_LLAMA3 = ("default", "linear", "yarn", "llama3")
FAMILIES = {
    "llama": Family("llama", interleaves_rotation=True, rotations=WITH_LLAMA3),
    "mistral": Family("llama", interleaves_rotation=True, rotations=WITH_LLAMA3),
    "mixtral": Family("llama", interleaves_rotation=True, rotations=WITH_LLAMA3, renormalizes=True, has_reader=False),
    "smollm3": Family("smollm3", interleaves_rotation=True, has_reader=False),
    "granite": Family("granite", interleaves_rotation=True, has_reader=False),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen2_moe": Family("qwen2moe", square_heads=True, needs_head=True, renormalizes=False),
    "qwen3_moe": Family("qwen3moe", renormalizes=True),
    "gemma": Family("gemma", norm_offset=1.0, activations=GELU_TANH, has_reader=False),
    "gemma2": Family("gemma2", norm_offset=1.0, activations=GELU_TANH, has_window=True),
    "gemma3_text": Family("gemma3", norm_offset=1.0, activations=GELU_TANH, has_window=True),
    "gpt2": Family("gpt2", transposes=True, activations=("gelu_new", "gelu_pytorch_tanh")),
    "phi3": Family("phi3", rotations=("default", "longrope"), partial_rotation=True, square_heads=True),
    "olmo2": Family("olmo2", square_heads=True, needs_head=True, has_reader=False),
    "exaone4": Family("exaone4", rotations=WITH_LLAMA3, has_window=True, square_heads=True, has_reader=False),
    "glm4": Family("glm4", partial_rotation=True, has_reader=False),
    "starcoder2": Family("starcoder2", activations=GELU_TANH, square_heads=True),
}
"""By transformers' model_type."""

MANY_LAYERS = {"gemma2": 46, "gemma3": 62}
"""Layer counts of the 27B models: llama.cpp scales their attention by hidden size / heads, that of others by head size."""


def family_of(config: Any) -> Family:
    """The family of a configuration. Raises ModelError for one that has none here, or that llama.cpp computes differently."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"steep writes no gguf file of {config.model_type}; it writes those of: {', '.join(FAMILIES)}. "
            "Export it as hf and convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    for problem in _problems(config, family):
        raise ModelError(f"llama.cpp cannot compute this {config.model_type}: {problem}")
    return family


def _problems(config: Any, family: Family) -> Iterator[str]:
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    activation = getattr(config, "activation_function", activation)
    if activation not in family.activations:
        yield f"its activation is {activation!r}, and llama.cpp's {family.architecture} has {family.activations[0]!r}"
    if getattr(config, "use_sliding_window", False):
        yield "it has a sliding window (use_sliding_window)"
    if family.architecture in MANY_LAYERS:
        has_many = config.num_hidden_layers == MANY_LAYERS[family.architecture]
        assumed = float(config.hidden_size / config.num_attention_heads if has_many else head_size(config))
        if config.query_pre_attn_scalar != assumed:
            yield f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp assumes {assumed}"
    if family.architecture == "gpt2" and not getattr(config, "scale_attn_weights", True):
        yield "scale_attn_weights is off"
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        yield "scale_attn_by_inverse_layer_idx is on"
    if family.square_heads and head_size(config) * config.num_attention_heads != config.hidden_size:
        yield f"its heads of {head_size(config)} are not hidden_size / num_attention_heads wide"
    yield from _problems_of_layers(config, family)
    yield from _problems_of_positions(config, family)


def _problems_of_layers(config: Any, family: Family) -> Iterator[str]:
    layers = config.num_hidden_layers
    every_fourth = [int((layer + 1) % 4 != 0) for layer in range(layers)]
    if family.architecture == "smollm3" and list(config.no_rope_layers) != every_fourth:
        yield "other layers than every fourth are without rotary positions (no_rope_layers)"
    if family.architecture == "exaone4" and "sliding_attention" in config.layer_types and layers != 64:
        yield "it has a sliding window, which llama.cpp computes only with 64 layers"
    if family.renormalizes is None:
        return
    if getattr(config, "norm_topk_prob", family.renormalizes) != family.renormalizes:
        yield f"norm_topk_prob is {config.norm_topk_prob}, and llama.cpp takes {family.renormalizes}"
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        yield "some of its layers have no experts (mlp_only_layers, decoder_sparse_step)"


def _problems_of_positions(config: Any, family: Family) -> Iterator[str]:
    for layer_type, rope in ropes_of(config).items():
        kind = rope.get("rope_type", "default")
        if kind not in family.rotations or (kind != "default" and layer_type == "sliding_attention"):
            yield f"its positions are scaled with {kind!r}, which a gguf file of {family.architecture} cannot express"
        if rope.get("partial_rotary_factor", 1.0) != 1.0 and not family.partial_rotation:
            yield f"it rotates {rope['partial_rotary_factor']} of each head"


def context_length(config: Any, family: Family) -> int:
    """Tokens for which llama.cpp computes what the model computes: its positions, or its window where llama.cpp has none."""
    window = None if family.has_window else getattr(config, "sliding_window", None)
    positions = int(config.max_position_embeddings)
    return positions if not window else min(positions, int(window))


def head_size(config: Any) -> int:
    """H of each head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def ropes_of(config: Any) -> dict[str, dict[str, Any]]:
    """Rotation settings by layer type; all layers are `full_attention` where there is one kind. Empty without rotation."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if not parameters:
        return {}
    if "full_attention" in parameters:
        return {name: dict(rope) for name, rope in parameters.items() if isinstance(rope, dict)}
    return {"full_attention": dict(parameters)}
