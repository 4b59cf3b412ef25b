"""Our AdamW against torch's plain loop over each parameter."""

from __future__ import annotations

import torch

from steep.models.gpt2 import build_gpt2_model
from steep.optim.build import build_optimizer
from steep.optim.config import OptimizerConfig


def test_fused_adamw_equals_the_plain_loop():
    config = OptimizerConfig(learning_rate=3e-3, weight_decay=0.3)
    ours, reference = (build_gpt2_model(61, 16, 8, 2, 2, seed=0) for _ in range(2))
    optimizer = build_optimizer(ours, config)
    assert optimizer.param_groups[0]["fused"]
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in reference.parameters() if p.ndim >= 2], "weight_decay": 0.3},
            {"params": [p for p in reference.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=3e-3, betas=config.betas, eps=config.eps, foreach=False, fused=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for step in range(10):
        for group in (*optimizer.param_groups, *plain.param_groups):
            group["lr"] = 3e-3 / (step + 1)
        for mine, other in zip(ours.parameters(), reference.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        optimizer.step()
        plain.step()
    for mine, other in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
