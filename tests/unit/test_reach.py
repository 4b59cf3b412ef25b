"""What the loss reaches: parameters without a gradient are frozen and said, layers that are never called get no adapter."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from steep.core.errors import ModelError
from steep.core.say import tell
from steep.models.adapters import add_adapter
from steep.models.attention_choice import prepare_lm_loss
from steep.models.config import AdapterConfig
from steep.models.reach import freeze_unreached

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
JAMBA = {
    **SIZES, "num_hidden_layers": 2, "num_key_value_heads": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4,
    "mamba_dt_rank": 4, "num_experts": 2, "use_mamba_kernels": False,
}  # fmt: skip


def test_parameters_that_no_gradient_reaches_are_frozen_and_said():
    """A decoder's cross-attention has nothing to attend to without an encoder."""
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True))
    lm_loss, said = prepare_lm_loss(model, tell), []
    freeze_unreached(lm_loss, 20, said.append)
    [line] = said
    assert line.startswith("not trained: 10 tensors")
    assert "bert.encoder.layer.0.crossattention.self.query.weight" in line
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert len(frozen) == 10
    assert all("crossattention" in name for name in frozen)
    model(torch.arange(20)[None]).logits.sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == frozen


def test_a_model_that_is_reached_whole_and_one_of_your_own_are_left_alone():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.unused = nn.Embedding(50, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 50)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(tokens))

    for model in (Own(), transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))):
        said: list[str] = []
        freeze_unreached(prepare_lm_loss(model, lambda line: None, vocab_size=50), 8, said.append)
        assert said == []
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_whole_logits_are_never_made_where_training_makes_them_in_chunks():
    """65,536 tokens of 128k ids would be 34 GB of logits."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    lm_loss = prepare_lm_loss(model, lambda line: None, vocab_size=50)
    assert lm_loss.has_head
    calls: list[nn.Module] = []
    model.lm_head.register_forward_hook(lambda module, *_: calls.append(module))
    freeze_unreached(lm_loss, 8, print)
    assert not calls
    assert model.lm_head.weight.requires_grad


def test_layers_that_are_never_called_get_no_adapter():
    model, said = transformers.JambaForCausalLM(transformers.JambaConfig(**JAMBA)), []
    add_adapter(model, AdapterConfig(rank=2), said.append, base=None, seed=0)
    assert any(line.startswith("adapter: none on dt_proj") for line in said)
    assert not any("dt_proj.lora" in name for name, _ in model.named_parameters())


def test_layers_that_peft_refuses_are_left_out_or_refused_by_name():
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    model, said = transformers.MambaForCausalLM(config), []
    add_adapter(model, AdapterConfig(rank=2), said.append, base=None, seed=0)
    assert any("none on out_proj" in line and "peft refuses" in line for line in said)
    model, chosen = transformers.MambaForCausalLM(config), AdapterConfig(rank=2, targets=["out_proj"])
    with pytest.raises(ModelError, match="peft cannot adapt"):
        add_adapter(model, chosen, said.append, base=None, seed=0)
