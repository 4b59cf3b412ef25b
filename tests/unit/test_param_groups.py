"""Parameter groups: what decays, what is left out, what counts once."""

from __future__ import annotations

import pytest
from torch import nn

from steep.core.errors import ConfigError, ModelError
from steep.core.section import Target
from steep.models.gpt2 import build_gpt2_model
from steep.optim.config import OptimizerConfig
from steep.optim.load import build_optimizer, load_optimizer
from steep.optim.param_groups import build_param_groups, describe_param_groups

CONFIG = OptimizerConfig(learning_rate=1e-3, weight_decay=0.2)


def tiny() -> nn.Module:
    return build_gpt2_model(61, 16, 8, 2, 2, seed=0)


def test_matrices_and_embeddings_decay_norms_and_biases_do_not():
    decay, no_decay = build_param_groups(tiny(), CONFIG)
    assert (decay["name"], decay["weight_decay"], no_decay["name"], no_decay["weight_decay"]) == (
        "decay", 0.2, "no_decay", 0.0,
    )  # fmt: skip
    assert [name for name, _ in decay["params"]][:3] == [
        "transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight",
    ]  # fmt: skip
    assert all("ln_" in name or name.endswith("bias") for name, _ in no_decay["params"])


def test_every_parameter_is_in_one_group_and_a_tied_one_counts_once():
    model = tiny()
    groups = build_param_groups(model, CONFIG)
    members = [id(parameter) for group in groups for _, parameter in group["params"]]
    assert sorted(members) == sorted({id(parameter) for parameter in model.parameters()})
    assert sum(row.parameters for row in describe_param_groups(groups)) == sum(p.numel() for p in model.parameters())
    assert "lm_head.weight" not in [name for group in groups for name, _ in group["params"]]


def test_frozen_parameters_are_left_out():
    model = tiny()
    model.transformer.wte.weight.requires_grad_(False)
    names = [name for group in build_param_groups(model, CONFIG) for name, _ in group["params"]]
    assert "transformer.wte.weight" not in names
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter of the model is trainable"):
        build_param_groups(model, CONFIG)


def test_the_optimizer_is_found_by_file_name_and_keeps_names():
    optimizer = build_optimizer(tiny(), CONFIG)
    assert optimizer.param_groups[0]["param_names"][0] == "transformer.wte.weight"
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    with pytest.raises(ConfigError, match="Did you mean 'adamw'"):
        load_optimizer(OptimizerConfig(name="adamv"))


def test_a_target_gets_the_groups():
    target = Target.model_validate({"_target_": "torch.optim.SGD", "lr": 0.5, "weight_decay": 0.01})
    optimizer = build_optimizer(tiny(), target)
    assert type(optimizer).__name__ == "SGD"
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.01), (0.5, 0.0)]
