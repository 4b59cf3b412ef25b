"""FLOPs per token against the published figures, and the table of devices."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from steep.models.flops import count_matmul_parameters, flops_per_token, model_flops_per_token
from steep.models.gpt2 import build_gpt2_model
from steep.models.layers import count_parameters, layer_settings
from steep.runtime.device import peak_flops


def test_gpt2_124m_at_1024_tokens():
    with torch.device("meta"):
        model = build_gpt2_model(50257)
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808
    assert model_flops_per_token(model, 1024) == pytest.approx(0.855e9, rel=2e-3)


def test_llama_3_2_1b_at_2048_tokens():
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert count_matmul_parameters(model) == pytest.approx(1.2357e9, rel=1e-3)
    assert model_flops_per_token(model, 2048) == pytest.approx(7.414e9 + 0.805e9, rel=1e-3)


def test_an_untied_embedding_is_only_looked_up():
    tied, untied = (build_gpt2_model(61, 16, 8, 2, 2, tie_word_embeddings=tie) for tie in (True, False))
    assert count_matmul_parameters(tied) == count_matmul_parameters(untied) == 61 * 8 + 2 * 12 * 8 * 8


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A10G", 70e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12),
        ("NVIDIA GB200", 2.5e15), ("AMD EPYC", None), ("cpu", None),
    ],
)  # fmt: skip
def test_peaks(name, peak):
    assert peak_flops(name) == peak


def test_utilisation_of_llm_c_on_h100():
    work = 468_100 * flops_per_token(int(0.742e9 / 6), 12, 768, 1024)
    assert work / peak_flops("NVIDIA H100") == pytest.approx(0.404, abs=2e-3)


def test_a_mixture_counts_the_experts_that_a_token_uses():
    """Qwen3-30B-A3B: 30.5 billion parameters, of which a token uses 3.3 (its model card), 0.3 of them looked up."""
    config = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    assert count_parameters(model) == pytest.approx(30.5e9, rel=2e-3)
    embedding = 151936 * 2048
    assert count_matmul_parameters(model) + embedding == pytest.approx(3.34e9, rel=5e-3)
    attention = 12 * 48 * 32 * 128 * 1024
    assert model_flops_per_token(model, 1024) == 6 * count_matmul_parameters(model) + attention
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.lm_head.weight)
    frozen = count_matmul_parameters(model) - embedding
    assert model_flops_per_token(model, 1024) == pytest.approx(2 * frozen + 6 * embedding + attention, rel=1e-6)


def test_layers_of_several_sizes_count_each_by_its_own():
    """Gemma 4: transformers refuses to say the head size of the whole model."""
    from transformers import Gemma4TextConfig

    heads = [settings.num_attention_heads * settings.head_dim for settings in layer_settings(Gemma4TextConfig())]
    assert len(set(heads)) == 2

    class Model(torch.nn.Module):
        config = Gemma4TextConfig()

    assert model_flops_per_token(Model(), 100) == 12 * sum(heads) * 100
