"""steep's GPT-2 against transformers', both ways, and its transforms against itself."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel as HFGPT2

from steep.models.gpt2 import build_gpt2_model
from steep.parallelize.activation_checkpoint import checkpoint_layers
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


def test_activation_checkpointing_keeps_every_gradient_dropout_included():
    model = build_gpt2_model(101, 32, 48, 3, 4, dropout=0.1, seed=0)
    plain = gradients(model)
    checkpoint_layers(model)
    for before, after in zip(plain, gradients(model), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-8)


def test_activation_checkpointing_keeps_every_gradient_of_a_transformers_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=101, **sizes))

    def run():
        model.train().zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = run()
    checkpoint_layers(model)
    for before, after in zip(plain, run(), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-8)


def test_activation_checkpointing_saves_memory():
    """Bytes that autograd keeps for the backward pass, counted by its own hook, parameters left out."""

    def saved_bytes(model) -> int:
        own = {parameter.data_ptr() for parameter in model.parameters()}
        seen = {}

        def pack(tensor):
            if tensor.data_ptr() not in own:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.train().hidden_states(IDS).sum()
        return sum(seen.values())

    model = build_gpt2_model(101, 32, 48, 8, 4, seed=0)
    plain = saved_bytes(model)
    checkpoint_layers(model)
    assert saved_bytes(model) < 0.25 * plain


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
