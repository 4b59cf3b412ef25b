"""Parameter groups: what decays, what is left out, what counts once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from steep.config.load import load_run_config
from steep.core.errors import ConfigError, ModelError
from steep.core.section import Target
from steep.models.fresh import build_fresh
from steep.models.gpt2 import build_gpt2_model
from steep.optim.build import build_optimizer, load_optimizer
from steep.optim.config import OptimizerConfig
from steep.optim.param_groups import build_param_groups, describe_group
from steep.training.loop import train
from support import LLAMA, losses, run_mapping, train_lines

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
    numbers = sum(parameter.numel() for group in groups for _, parameter in group["params"])
    assert numbers == sum(parameter.numel() for parameter in model.parameters())
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


def tiny_llama(**changes: object) -> nn.Module:
    return build_fresh({**LLAMA, **changes}, None, seed=0)


OWN = OptimizerConfig(learning_rate=1e-3, embedding_learning_rate=1e-4, weight_decay=0.2)


def test_embeddings_and_head_get_a_group_of_their_own_by_identity():
    untied, tied = (build_param_groups(tiny_llama(tie_word_embeddings=tie), OWN) for tie in (False, True))
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in untied] == [
        ("decay", 1e-3, 0.2), ("no_decay", 1e-3, 0.0), ("embeddings", 1e-4, 0.2),
    ]  # fmt: skip
    assert [name for name, _ in untied[2]["params"]] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert [name for name, _ in tied[2]["params"]] == ["model.embed_tokens.weight"]
    [gpt2_embedding] = build_param_groups(tiny(), OWN)[2]["params"]
    assert gpt2_embedding[0] == "transformer.wte.weight"
    plain = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    assert [name for name, _ in build_param_groups(plain, OWN)[2]["params"]] == ["0.weight"]
    assert describe_group(untied[2]).split("  ")[0] == "embeddings"
    assert describe_group(untied[2]).endswith("learning rate 0.0001  weight decay 0.2  float32")


def test_without_a_rate_of_their_own_they_stay_where_they_were():
    assert [group["name"] for group in build_param_groups(tiny_llama(), CONFIG)] == ["decay", "no_decay"]


def test_a_rate_for_embeddings_that_are_not_trained_is_refused():
    model = tiny_llama(tie_word_embeddings=True)
    model.get_input_embeddings().weight.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"embedding_learning_rate=0.0001 is given, but no token embedding"):
        build_param_groups(model, OWN)


@pytest.mark.parametrize("tied", [False, True])
def test_beside_adapters_the_default_is_a_tenth(tied: bool):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=tied
    )
    model = peft.get_peft_model(tiny_llama(tie_word_embeddings=tied), settings)
    groups = {group["name"]: group for group in build_param_groups(model, CONFIG)}
    assert groups["embeddings"]["lr"] == pytest.approx(CONFIG.learning_rate / 10)
    names = {name for name, _ in groups["embeddings"]["params"]}
    assert len(names) == (1 if tied else 2)
    assert all("modules_to_save" in name for name in names)
    assert all("lora_" in name for name, _ in groups["decay"]["params"])


def test_the_schedule_multiplies_each_rate_and_a_resume_keeps_them(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path, capsys: pytest.CaptureFixture[str]
):
    rates = {"learning_rate": 1e-3, "embedding_learning_rate": 1e-4}
    schedule = {"warmup_steps": 2, "final_ratio": 0.2}
    mapping = run_mapping(
        tmp_path,
        corpus_directory,
        tiny_tokenizer_directory,
        optimizer=rates,
        schedule=schedule,
        evaluate={"tokens": 500},
        checkpoint={"every_steps": 2, "keep_last": 9},
    )
    whole = train(load_run_config(mapping=mapping)).run_directory
    assert "learning rate 0.0001" in capsys.readouterr().out
    logged = {line["step"] + 1: line["learning_rate"] for line in train_lines(whole)}
    for step in (2, 4, 6):
        [state] = whole.glob(f"checkpoints/epoch_*_step_{step}/optim/state.json")
        groups = json.loads(state.read_text())["param_groups"]
        assert groups[0]["lr"] == logged[step]
        assert groups[2]["lr"] == pytest.approx(logged[step] / 10)
    assert logged[6] == pytest.approx(2e-4)

    mapping["run"]["name"], mapping["train"]["max_seconds"] = "parts", 0
    parts = train(load_run_config(mapping=mapping)).run_directory
    del mapping["train"]["max_seconds"]
    train(load_run_config(mapping=mapping))
    assert losses(parts) == losses(whole)

    mapping["run"]["name"] = "one_rate"
    del mapping["optimizer"]["embedding_learning_rate"]
    assert losses(train(load_run_config(mapping=mapping)).run_directory) != losses(whole)
