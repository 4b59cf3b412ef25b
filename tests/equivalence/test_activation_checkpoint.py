"""Activation checkpointing against the same run without it: gradients bit for bit, names, and memory in the promised order."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import nn

from steep.checkpoint.pieces import model_tensors
from steep.core.errors import ModelError
from steep.estimate.memory import saved_bytes
from steep.models.adapters import add_adapter
from steep.models.config import AdapterConfig
from steep.models.fresh import build_fresh
from steep.models.gpt2 import build_gpt2_model
from steep.parallelize.activation_checkpoint import checkpoint_layers
from steep.parallelize.compile import compile_layers
from support import LLAMA

IDS = (torch.arange(3 * 20).view(3, 20) * 7) % 101
MODES: list[dict[str, Any]] = [
    {"mode": "full"},
    {"mode": "every_nth", "every": 2},
    {"mode": "selective"},
    {
        "mode": "full",
        "offload": True,
        "device_type": "cuda",
    },  # the hooks of offloading; a CPU's tensors stay where they are
]
HF_GPT2 = {"model_type": "gpt2", "vocab_size": 101, "n_positions": 32, "n_embd": 48, "n_layer": 3, "n_head": 4}


def llama() -> nn.Module:
    return build_fresh({**LLAMA, "num_hidden_layers": 3, "attention_dropout": 0.1}, None, seed=0)


def adapted_llama() -> nn.Module:
    model = build_fresh(LLAMA, None, seed=0)
    add_adapter(model, AdapterConfig(rank=4, dropout=0.1), print, base=None, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


def gpt2() -> nn.Module:
    return build_gpt2_model(101, 32, 48, 3, 4, dropout=0.1, seed=0)


def transformers_gpt2() -> nn.Module:
    return build_fresh(HF_GPT2, None, seed=0)  # dropout 0.1 by default


MODELS = [gpt2, transformers_gpt2, llama, adapted_llama]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    model.train().zero_grad()
    extra = {"use_cache": False} if hasattr(model, "base_model_prefix") else {}
    output: Any = model(IDS, labels=IDS, **extra)
    (output[1] if isinstance(output, tuple) else output.loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "settings", MODES, ids=lambda settings: settings["mode"] + ("+offload" * ("offload" in settings))
)
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_every_gradient_is_the_same_dropout_included(build, settings):
    model = build()
    plain = gradients(model)
    assert all(
        torch.equal(other, plain[name]) for name, other in gradients(model).items()
    )  # or nothing below says anything
    checkpoint_layers(model, print, **settings)
    found = gradients(model)
    assert found.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(found[name], plain[name])] == []


def test_gradients_under_autocast_are_the_same():
    model = llama()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = gradients(model)
        checkpoint_layers(model, print, "selective")
        assert all(torch.equal(gradient, plain[name]) for name, gradient in gradients(model).items())


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_names_do_not_change_and_a_copy_is_a_copy(build):
    model = build()
    names = list(model_tensors(model)), list(model.state_dict())
    checkpoint_layers(model, print)
    assert (list(model_tensors(model)), list(model.state_dict())) == names
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(not gradient.any() or "bias" in name or "norm" in name for name, gradient in gradients(twin).items())
    assert any(gradient.any() for gradient in gradients(model).values())


def test_kept_bytes_fall_from_mode_to_mode():
    """none > selective > every second layer's rest > full, on a model deep enough for the ends not to matter."""

    def kept(**settings: Any) -> int:
        model = build_gpt2_model(101, 32, 48, 8, 4, seed=0)
        if settings:
            checkpoint_layers(model, print, **settings)
        return saved_bytes(model, lambda: model.base_model(IDS))

    whole, half, full = kept(), kept(mode="every_nth", every=2), kept(mode="full")
    assert full < 0.25 * whole
    assert abs(half - (whole + full) / 2) < 0.05 * whole
    assert kept(mode="every_nth", every=4) > half


def test_evaluation_is_not_checkpointed():
    model = gpt2()
    checkpoint_layers(model, print)
    with torch.no_grad():
        logits = model(IDS)
    assert not logits.requires_grad


def test_a_model_without_layers_and_a_second_checkpointing_are_refused():
    with pytest.raises(ModelError, match=r"train.activation_checkpointing: Linear has no nn.ModuleList"):
        checkpoint_layers(nn.Linear(2, 2), print)
    model = gpt2()
    checkpoint_layers(model, print)
    with pytest.raises(ModelError, match="already checkpointed"):
        checkpoint_layers(model, print)


def test_offload_on_a_cpu_is_said_and_not_done():
    model = gpt2()
    lines: list[str] = []
    checkpoint_layers(model, lines.append, "full", offload=True)
    assert "no effect on a CPU" in lines[1]
    assert not model.transformer.h[0].forward.offload
    checkpoint_layers(gpt2(), lines.append, "full", offload=True, device_type="cuda")
    assert "host memory" in lines[2]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_layers_can_be_checkpointed():
    model = build_gpt2_model(101, 32, 48, 3, 4, seed=0)
    plain = gradients(model)
    checkpoint_layers(model, print)
    assert compile_layers(model) == 3
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6)
    refused = gpt2()
    checkpoint_layers(refused, print, "selective")
    with pytest.raises(ModelError, match="train.compile"):
        compile_layers(refused)
