"""A transformers model in the layout that llama.cpp reads: keys, tensor names and tensor layouts, per family.

Sources: the GGUF specification; llama.cpp's model loaders (which keys and tensors each architecture reads) and its converter (how
weights are changed: llama's query and key rows are interleaved for its kind of rotation, gemma's norms are stored as 1 + weight,
GPT-2's linear layers are transposed). Names come from the gguf package. What llama.cpp would compute differently is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steep.core.errors import ModelError
from steep.core.gguf_metadata import CONFIG_FIELD
from steep.exporters.gguf_families import Family, context_length, head_size, ropes_of

FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}
"""general.file_type: llama.cpp's LLAMA_FTYPE of mostly this type."""

ROPE_FACTORS = "rope_freqs.weight"

SLIDING_PERIOD = {"gemma2": 2, "gemma3": 6, "exaone4": 4}
"""One layer in this many has full attention, where the file does not say."""


# ---- keys ----

NOT_ABOUT_THE_MODEL = ("dtype", "torch_dtype", "transformers_version", "quantization_config", "architectures")


def config_mapping(config: Any, eos_ids: list[int]) -> dict[str, Any]:
    """transformers' configuration as JSON, for steep and its checks. A mistral becomes a llama, as in llama.cpp."""
    known: Any = config
    if config.model_type == "mistral":
        from transformers import LlamaConfig

        own = LlamaConfig().to_dict()
        known = LlamaConfig(
            **{key: value for key, value in config.to_dict().items() if key in own and key != "model_type"}
        )
    mapping = {**known.to_diff_dict(), "model_type": known.model_type, "use_cache": True}
    mapping.update({"eos_token_id": eos_ids if len(eos_ids) > 1 else eos_ids[0]} if eos_ids else {})
    return {key: value for key, value in mapping.items() if key not in NOT_ABOUT_THE_MODEL and not key.startswith("_")}


def write_keys(writer: Any, config: Any, family: Family, name: str, dtype: str, config_json: dict[str, Any]) -> None:
    """All keys but the tokenizer's: sizes, positions, attention, and transformers' configuration itself as JSON."""
    heads = config.num_attention_heads
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(2)  # GGML_QNT_VERSION
    writer.add_string(CONFIG_FIELD, json.dumps(config_json, sort_keys=True))
    writer.add_context_length(context_length(config, family))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    feed_forward = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    writer.add_feed_forward_length(int(feed_forward or 4 * config.hidden_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    if family.architecture == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    if family.architecture == "starcoder2":
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rotated = ropes_of(config).get("full_attention", {}).get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(head_size(config) * rotated))
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    _write_rope(writer, config)
    _write_experts(writer, config, family)
    if family.architecture == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if family.architecture == "phi3":
        writer.add_sliding_window(0)  # llama.cpp computes none
    if family.architecture in SLIDING_PERIOD:
        _write_layer_types(writer, config, family)


def _write_experts(writer: Any, config: Any, family: Family) -> None:
    if family.renormalizes is None:
        return
    writer.add_expert_count(getattr(config, "num_experts", None) or config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if (width := getattr(config, "moe_intermediate_size", None)) is not None:
        writer.add_expert_feed_forward_length(width)
    if (width := getattr(config, "shared_expert_intermediate_size", None)) is not None:
        writer.add_expert_shared_feed_forward_length(width)


def _write_rope(writer: Any, config: Any) -> None:
    from gguf import RopeScalingType

    ropes = ropes_of(config)
    rope = ropes.get("full_attention", {})
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"].get("rope_theta", 10000.0))
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        original, factor = _longrope_sizes(config, rope)
        writer.add_rope_scaling_orig_ctx_len(original)
        usual = np.sqrt(1 + np.log(factor) / np.log(original)) if factor > 1 else 1.0
        writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or float(usual))
    if kind not in ("linear", "yarn"):
        return  # the factors of llama3 and longrope are stored as tensors
    writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        if rope.get("beta_fast") is not None:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        if rope.get("beta_slow") is not None:
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        if rope.get("attention_factor") is not None:
            # llama.cpp multiplies this by its own 1 + 0.1 ln(factor), which is transformers' default.
            writer.add_rope_scaling_attn_factors(rope["attention_factor"] / (1 + 0.1 * np.log(rope["factor"])))


def _longrope_sizes(config: Any, rope: dict[str, Any]) -> tuple[int, float]:
    """The positions before the extension, and how many times as many there are now."""
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return int(original), float(rope.get("factor") or config.max_position_embeddings / original)


def _write_layer_types(writer: Any, config: Any, family: Family) -> None:
    if getattr(config, "attn_logit_softcapping", None) is not None:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None) is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    if any(slides):
        writer.add_sliding_window(config.sliding_window)
    period = SLIDING_PERIOD[family.architecture]
    if any(slides) and slides != [(layer + 1) % period != 0 for layer in range(len(slides))]:
        writer.add_sliding_window_pattern(slides)


# ---- tensors ----


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file; its values are read when asked for."""

    name: str
    shape: tuple[int, ...]
    keeps_fp32: bool
    """llama.cpp needs norms, biases, position embeddings and rotation factors in fp32."""
    read: Callable[[], NDArray[np.float32]]
    """Its values in the file's layout."""
    write_back: Callable[[NDArray[np.float32]], None]
    """Sets the model's own weights to these values, given in the file's layout."""


def tensors_of(model: Any, family: Family) -> list[Tensor]:
    """Every tensor of the file, in the model's order. Raises ModelError for a weight that the architecture lacks."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    [architecture] = [key for key, name in MODEL_ARCH_NAMES.items() if name == family.architecture]
    names = get_tensor_name_map(architecture, model.config.num_hidden_layers)
    seen: set[int] = set()
    tensors = []
    for own_name, weight in model.state_dict().items():
        if weight.data_ptr() in seen and not (family.needs_head and own_name == "lm_head.weight"):
            continue  # an output head that is tied to the embeddings
        seen.add(weight.data_ptr())
        for stem, kind, part in _parts(own_name, weight):
            name = names.get_name(stem)
            if name is None:
                raise ModelError(f"llama.cpp's {family.architecture} has no tensor for the weight {own_name}")
            tensors.append(_tensor(f"{name}.{kind}", part, model.config, family))
    for name, factors in _rotation_factors(model).items():
        tensors.append(Tensor(name, factors.shape, True, partial(_itself, factors), lambda values: None))
    return tensors


def _parts(own_name: str, weight: Any) -> list[tuple[str, str, Any]]:
    """(name without its kind, kind, weight) of the tensors that a weight becomes: two matrices of experts in one are separate."""
    stem, _, kind = own_name.rpartition(".")
    if kind == "gate_up_proj":
        half = weight.shape[1] // 2
        return [(f"{stem}.gate_proj", "weight", weight[:, :half]), (f"{stem}.up_proj", "weight", weight[:, half:])]
    if kind == "down_proj":
        return [(own_name, "weight", weight)]
    if stem.endswith("shared_expert_gate"):
        return [(stem, kind, weight[0])]  # a vector in llama.cpp
    return [(stem, kind, weight)]


def _itself(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values


def _tensor(name: str, weight: Any, config: Any, family: Family) -> Tensor:
    to_file, from_file = _layout(name, weight, config, family)
    keeps_fp32 = weight.ndim == 1 or name == "position_embd.weight" or ".ffn_gate_inp." in name
    shape = tuple(weight.shape)

    def read() -> NDArray[np.float32]:
        return np.ascontiguousarray(to_file(weight.detach().float().numpy()), dtype=np.float32)

    def write_back(values: NDArray[np.float32]) -> None:
        import torch

        with torch.no_grad():
            weight.copy_(torch.from_numpy(np.ascontiguousarray(from_file(values))))

    transposed = family.transposes and _is_linear(name, weight)
    return Tensor(name, shape[::-1] if transposed else shape, keeps_fp32, read, write_back)


Layout = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def _layout(name: str, weight: Any, config: Any, family: Family) -> tuple[Layout, Layout]:
    """From transformers' layout to the file's, and back."""
    if family.norm_offset and name.endswith("norm.weight"):
        return (lambda values: values + family.norm_offset), (lambda values: values - family.norm_offset)
    if family.interleaves_rotation and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        return (lambda values: interleave(values, heads)), (lambda values: deinterleave(values, heads))
    if family.transposes and _is_linear(name, weight):
        return (lambda values: values.T), (lambda values: values.T)
    return (lambda values: values), (lambda values: values)


def _is_linear(name: str, weight: Any) -> bool:
    return bool(weight.ndim == 2 and name.startswith("blk."))


def interleave(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows (or biases) of each head from pairs (i, i + H/2) to pairs (2i, 2i + 1): llama.cpp rotates neighbours.

    values: (N*H, ...) with N `heads` of size H, viewed as (N, 2, H/2, ...), the two middle dims swapped.
    """
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def deinterleave(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """The inverse of `interleave`."""
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _rotation_factors(model: Any) -> dict[str, NDArray[np.float32]]:
    """(H/2,) divisors of the rotation frequencies by name, where they are not in the keys: for Llama 3.1's scaling,
    theta**(-2i/H) over the model's own frequency i; for longrope those of short and of long texts."""
    rope = ropes_of(model.config).get("full_attention", {})
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    size = head_size(model.config)
    plain = 1.0 / rope["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float64) / size)
    own = model.model.rotary_emb.inv_freq.float().numpy().astype(np.float64)
    return {ROPE_FACTORS: (plain / own).astype(np.float32)}
