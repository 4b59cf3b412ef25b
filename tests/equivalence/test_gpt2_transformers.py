"""steep's GPT-2 against transformers', both ways, and its transforms against itself."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel as HFGPT2

from steep.models.gpt2 import build_gpt2_model
from steep.parallelize.compile import compile_layers

IDS = (torch.arange(3 * 20).view(3, 20) * 7) % 101


@pytest.mark.parametrize("tie", [True, False])
def test_a_saved_model_loads_in_transformers_with_equal_logits(tmp_path, tie):
    model = build_gpt2_model(101, 32, 48, 3, 4, tie_word_embeddings=tie, seed=0).eval()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is HFGPT2
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tie
    torch.testing.assert_close(loaded.eval()(IDS).logits, model(IDS), rtol=1e-5, atol=1e-5)


def test_transformers_weights_load_here_with_equal_logits():
    torch.manual_seed(0)
    theirs = HFGPT2(HFConfig(vocab_size=101, n_positions=32, n_embd=48, n_layer=3, n_head=4)).eval()
    ours = build_gpt2_model(101, 32, 48, 3, 4).eval()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def gradients(model, train=True):
    torch.manual_seed(7)
    model.train(train).zero_grad()
    model(IDS, labels=IDS)[1].backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_layers_give_the_same_gradients():
    model = build_gpt2_model(101, 32, 48, 3, 4, seed=0)
    plain = gradients(model)
    names = list(model.state_dict())
    assert compile_layers(model) == 3
    for before, after in zip(plain, gradients(model), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)
    assert list(model.state_dict()) == names
