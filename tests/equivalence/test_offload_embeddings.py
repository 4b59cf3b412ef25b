"""A frozen embedding in host memory changes no logit. On a CPU only the line can be seen; refusals: test_plan_memory.py."""

from __future__ import annotations

import pytest
import torch

from steep.models.config import FreezeConfig
from steep.models.embeddings import offload_embeddings
from steep.models.freeze import freeze
from steep.models.fresh import build_fresh
from support import LLAMA


def frozen_model() -> torch.nn.Module:
    model = build_fresh(LLAMA, None, seed=0)
    freeze(model, FreezeConfig(embeddings=True), print)
    return model


def test_on_a_cpu_it_says_that_it_does_nothing() -> None:
    model = frozen_model()
    lines: list[str] = []
    offload_embeddings(model, torch.device("cpu"), lines.append)
    assert "no effect" in lines[0]
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_logits_are_those_of_the_whole_model_on_the_device() -> None:
    ids = torch.arange(24, device="cuda").reshape(2, 12)
    model = frozen_model().to("cuda")
    expected = model(input_ids=ids).logits
    before = torch.cuda.memory_allocated()
    lines: list[str] = []
    offload_embeddings(model, torch.device("cuda"), lines.append)
    assert "host memory" in lines[0]
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert model.get_input_embeddings().weight.device.type == "cpu"
    assert torch.cuda.memory_allocated() < before
