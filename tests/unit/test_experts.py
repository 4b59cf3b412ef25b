"""The experts of a mixture: equal to transformers' own loop, in the dtype of autocast, and planned byte for byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steep.estimate.memory import saved_bytes
from steep.models.experts import grouped_experts, planned_experts, use_grouped_experts
from steep.models.fresh import build_fresh
from support import LLAMA

FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},  # transposed, with biases, gates interleaved
    "nemotron_h": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "layers_block_type": ["moe"],
        "moe_intermediate_size": 24,
    },
}


def parts(family: str) -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
    """The experts of a model's first layer, and 40 tokens with two experts each."""
    sizes = {key: value for key, value in LLAMA.items() if family != "nemotron_h" or key != "num_hidden_layers"}
    model = build_fresh({**sizes, **FAMILIES[family], "model_type": family}, None, seed=0)
    [experts, *_] = [module for name, module in model.named_modules() if name.endswith(".experts")]
    generator = torch.Generator().manual_seed(0)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=generator)
    hidden = torch.randn(40, LLAMA["hidden_size"], generator=generator)
    scores = torch.randn(40, 4, generator=generator).softmax(-1)
    weights, chosen = scores.topk(2, dim=-1)
    return experts, (hidden, chosen, weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_grouped_products_are_the_loop_over_experts(family: str) -> None:
    experts, inputs = parts(family)
    experts.config._experts_implementation = "eager"
    with torch.no_grad():
        expected = experts(*inputs)
        torch.testing.assert_close(grouped_experts(experts, *inputs), expected, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = grouped_experts(experts, *inputs)
    error = float((rounded - expected).abs().max() / expected.abs().max())
    assert 1e-4 < error < 3e-2  # computed in bf16, as the linear layers are


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_counts_what_the_backward_pass_keeps(family: str, mixed: bool) -> None:
    experts, (hidden, chosen, weights) = parts(family)
    hidden, weights = hidden.requires_grad_(), weights.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        real = saved_bytes(experts, lambda: grouped_experts(experts, hidden, chosen, weights))
        planned = saved_bytes(experts, lambda: planned_experts(experts, hidden, chosen, weights))
    assert planned == pytest.approx(real, rel=0.02)  # indices and offsets differ


def test_a_model_takes_them_where_transformers_would_use_grouped_products() -> None:
    model = build_fresh({**LLAMA, **FAMILIES["mixtral"], "model_type": "mixtral"}, None, seed=0)
    use_grouped_experts(model)
    assert model.config._experts_implementation == "steep_grouped"
    assert "experts_implementation" not in str(model.config.to_diff_dict())
    model.set_experts_implementation("eager")
    use_grouped_experts(model)
    assert model.config._experts_implementation == "eager"
