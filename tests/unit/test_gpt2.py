"""steep's GPT-2 on its own: sizes, initialisation, dropout, errors."""

from __future__ import annotations

import math

import pytest
import torch

from steep.core.errors import ModelError
from steep.models.attention_choice import prepare_lm_loss
from steep.models.gpt2 import CausalSelfAttention, build_gpt2_model
from steep.models.layers import evaluating


def test_initialisation_follows_gpt2():
    model = build_gpt2_model(2000, 128, 64, 8, 4, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05), name
        elif parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert torch.equal(
                parameter, torch.full_like(parameter, 1.0 if "ln_" in name and "weight" in name else 0.0)
            )


def test_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = build_gpt2_model(61, 16, 8, 2, 2, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(6)
    second, other = build_gpt2_model(61, 16, 8, 2, 2, seed=3), build_gpt2_model(61, 16, 8, 2, 2, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_dropout_is_off_by_default_and_works_where_asked():
    ids = torch.arange(8).view(1, 8)
    plain = build_gpt2_model(61, 16, 8, 2, 2, seed=0).train()
    assert torch.equal(plain(ids), plain(ids))
    dropping = build_gpt2_model(61, 16, 8, 2, 2, dropout=0.5, seed=0).train()
    assert not torch.equal(dropping(ids), dropping(ids))
    assert torch.equal(dropping.eval()(ids), plain.eval()(ids))
    assert all(module.dropout == 0.5 for module in dropping.modules() if isinstance(module, CausalSelfAttention))


def test_loss_of_labels_is_the_mean_at_the_same_position():
    model = build_gpt2_model(61, 16, 8, 2, 2, seed=0)
    ids = torch.arange(12).view(2, 6)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    logits, loss = model(ids, labels=labels)
    kept = labels != -100
    expected = -logits.log_softmax(-1)[kept].gather(1, labels[kept].unsqueeze(1)).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_embd": 10, "n_head": 3}, "n_embd=10 is not a multiple of n_head=3; these fit: 1, 2, 5"),
        ({"n_layer": 0}, "n_layer=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_sizes_that_do_not_fit(settings, message):
    with pytest.raises(ModelError, match=message):
        build_gpt2_model(61, **{"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, **settings})


def test_a_sequence_longer_than_the_positions():
    with pytest.raises(ModelError, match="17 tokens: this model has 16 positions"):
        build_gpt2_model(61, 16, 8, 1, 2)(torch.zeros(1, 17, dtype=torch.int64))


def test_one_flattened_row_of_documents_equals_the_documents_alone():
    model = build_gpt2_model(61, 16, 8, 2, 2, seed=0).eval()
    ids = torch.arange(12).view(2, 6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    row = model(
        ids.view(1, -1), positions.view(1, -1), torch.tensor([0, 3, 6, 12], dtype=torch.int32),
        max_seqlen=6, attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool), use_cache=False,
    )  # fmt: skip
    alone = torch.cat([model(ids[:1, :3]), model(ids[:1, 3:]), model(ids[1:])], dim=1)
    torch.testing.assert_close(row, alone)


def test_what_document_attention_does_not_do_is_refused():
    model = build_gpt2_model(61, 16, 8, 1, 2)
    with pytest.raises(ModelError, match="model.attention=sdpa: steep's GPT-2 computes document attention only"):
        prepare_lm_loss(model, print, attention="sdpa")
    with pytest.raises(ModelError, match="does not read attention_mask"):
        model(torch.zeros(1, 4, dtype=torch.int64), attention_mask=torch.ones(1, 4))


def test_evaluating_restores_the_mode_of_each_module():
    model = build_gpt2_model(61, 16, 8, 2, 2, dropout=0.5).train()
    model.transformer.h[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert model.transformer.h[0].training
    assert not any(module.training for module in model.transformer.h[1].modules())
