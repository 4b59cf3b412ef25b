"""A tiny configuration of every causal family of the installed transformers, by one rule: every size becomes small.

In: a model_type. Out: transformers' configuration, whose model has some ten thousand weights. The rule looks at the names of
keys; each kind of layer that a family has stays in once. EXCEPTIONS names what the rule gets wrong, family by family.
"""

from __future__ import annotations

import re
from typing import Any

VOCAB = 512
WIDTH, HEADS, KEY_HEADS, HEAD_SIZE = 32, 4, 2, 8

SIZES: list[tuple[str, int]] = [
    (r"type_vocab_size|task_type_vocab_size", 2),
    (r".*vocab_size.*", VOCAB),
    (r"vision_.*|audio_.*|image_.*|video_.*|num_channels|patch_size|num_mel_bins", -1),
    (r"hidden_size|d_model|n_embd|embedding_dim|emb_dim|embedding_size|input_embedding_size|output_embedding_size|lru_width|"
     r"attention_hidden_size|word_embed_proj_dim|backbone_hidden_size|mamba_d_ssm", WIDTH),
    (r"(?!.*multiple).*intermediate_size.*|.*ffn_dim|.*ffn_hidden_size|n_inner|dff|dim_ff|d_inner|feed_forward_size", 48),
    (r"num_hidden_layers|n_layers?|num_layers|num_(en|de)coder_layers|(en|de)coder_layers|num_blocks|num_layers_per_stack", 2),
    (r".*(key_value|kv|value)_heads.*|num_query_groups|linear_num_key_heads", KEY_HEADS),
    (r".*(attention_heads|n_heads|num_heads|n_head|mamba_heads|linear_num_heads)", HEADS),
    (r".*head_dim|.*_d_head|d_head|attention_head_size|kv_channels|dim_head|rotary_dim|mamba_headdim|d_kv", HEAD_SIZE),
    (r"(moe_)?num_(local_)?experts|n_routed_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group|.*n_?groups|o_groups", 1),
    (r".*rank", 8),
    (r"max_position_embeddings|n_positions|max_seq_len|.*context_length|model_max_length|max_target_positions|n_ctx|"
     r"original_max_position_embeddings", 128),
    (r".*window.*size|.*sliding_window|local_attention(_window_len)?|.*chunk_size", 16),
    (r".*state(_size)?|mamba_d_state", 8),
    (r"pronunciation_embed_dim|shape_embed_dim|ple_embed_dim|router_hidden_size|hidden_size_per_layer_input", 16),
]  # fmt: skip
"""Pattern of the whole key -> its size; the first that matches counts, -1 leaves the key alone. Smaller sizes stay."""

EXCEPTIONS: dict[str, dict[str, Any]] = {
    # what transformers gives no usable default for
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0, "kv_n_heads": 2},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
    },
    "nemotron": {"num_key_value_heads": 2},
    "dots3_note_text": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "gemma4_unified_assistant": {"num_kv_shared_layers": 0},
    "lfm2_moe": {"num_hidden_layers": 3, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [4, 8]},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    # sizes that depend on each other
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "num_hidden_layers": 2, "layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8, "chunk_size": 8},
    "blt": {"max_position_embeddings": 128},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2},
    # layers whose kind follows from their number
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "hybrid_layer_ids": [1, 2],
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
}


def tiny_config(model_type: str, vocab_size: int = VOCAB) -> Any:
    """transformers' configuration of this family with every size small."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    exception = EXCEPTIONS.get(model_type, {})
    return kind(**_shrunk(kind, exception, vocab_size))


def _shrunk(kind: Any, exception: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    usual = kind(**exception.get("_build", {}))
    found: dict[str, Any] = {}
    content = dict(vars(usual))
    found.update(_layers(usual, content))
    for key, value in content.items():
        if key.startswith("_") or key in found:
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            size = _size(key, vocab_size)
            if key.endswith(("token_id", "token_index")) and value >= vocab_size:
                found[key] = vocab_size - 1 if key == "pad_token_id" else 0
            elif size is not None and (0 < size < value or key == "vocab_size"):
                found[key] = size
        elif key == "head_dim" and value is None:
            found[key] = HEAD_SIZE
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            found[key] = {
                **_shrunk(type(value), EXCEPTIONS.get(value.model_type, {}), vocab_size),
                "model_type": value.model_type,
            }
    if getattr(usual, "is_decoder", None) is False and not getattr(usual, "is_encoder_decoder", False):
        found["is_decoder"] = True  # an encoder's family, trained as a decoder
    if "kv_lora_rank" in found:  # latent attention: every head has its own keys, in two parts
        found |= {"num_key_value_heads": HEADS, "qk_head_dim": 2 * HEAD_SIZE}
    return {**found, **{k: v for k, v in exception.items() if k != "_build"}}


def _layers(config: Any, content: dict[str, Any]) -> dict[str, Any]:
    """Lists with one entry per layer keep each kind once."""
    count = getattr(config, "num_hidden_layers", None)
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if not isinstance(count, int):
        return {}
    lists = {
        key: value
        for key, value in content.items()
        if isinstance(value, (list, tuple)) and len(value) == count and count > 2 and not key.startswith("_")
    }
    if not lists:
        return {}
    seen: dict[Any, int] = {}
    for number, entries in enumerate(zip(*lists.values(), strict=True)):
        for key, entry in zip(lists, entries, strict=True):
            if isinstance(entry, str):
                seen.setdefault((key, entry), number)
    chosen = sorted(set(seen.values())) or [0]
    while len(chosen) < 2:
        chosen.append(chosen[-1])
    return {name: len(chosen), **{key: [value[number] for number in chosen] for key, value in lists.items()}}


def _size(key: str, vocab_size: int) -> int | None:
    for pattern, size in SIZES:
        if re.fullmatch(pattern, key):
            return None if size == -1 else vocab_size if size == VOCAB else size
    return None
