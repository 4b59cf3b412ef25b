"""Freezing: what is chosen, what is refused, and that a run leaves frozen weights as they are, at a resume too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

import steep
from steep.config.load import load_run_config
from steep.core.errors import CheckpointError, ConfigError
from steep.models.config import FreezeConfig, ModelConfig
from steep.models.flops import flops_saved_by_freezing, model_flops_per_token
from steep.models.freeze import freeze
from steep.models.fresh import build_fresh
from steep.models.gpt2 import build_gpt2_model
from steep.training.loop import train
from support import LLAMA, losses, run_mapping

EMBEDDING = "model.embed_tokens.weight"


def llama(**changes: object) -> torch.nn.Module:
    return build_fresh({**LLAMA, **changes}, None, seed=0)


def frozen_names(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("embeddings", FreezeConfig(embeddings=True)),
        (["*.mlp.*"], FreezeConfig(patterns=["*.mlp.*"])),
        (["embeddings", "a*"], FreezeConfig(embeddings=True, patterns=["a*"])),
        ({"first_layers": 1, "patterns": ["b"]}, FreezeConfig(first_layers=1, patterns=["b"])),
    ],
)
def test_short_forms(given: object, meant: FreezeConfig) -> None:
    config = ModelConfig.model_validate({"pretrained": "x", "freeze": given})
    assert config.freeze == meant
    assert ModelConfig.model_validate(config.model_dump()) == config


def test_a_freeze_that_says_nothing_is_refused() -> None:
    for nothing in ({}, [], {"first_layers": 0}):
        with pytest.raises(ValidationError, match="freezes nothing"):
            ModelConfig.model_validate({"pretrained": "x", "freeze": nothing})


def test_layers_from_either_end() -> None:
    model = llama(num_hidden_layers=4)
    freeze(model, FreezeConfig(first_layers=2, last_layers=1), print)
    assert {name.split(".")[2] for name in frozen_names(model)} == {"0", "1", "3"}
    assert len(frozen_names(model)) == 3 * len([name for name, _ in model.named_parameters() if ".layers.2." in name])
    with pytest.raises(ConfigError, match="first_layers=3 and last_layers=2 are 5 layers, and the model has 4"):
        freeze(llama(num_hidden_layers=4), FreezeConfig(first_layers=3, last_layers=2), print)


def test_patterns_add_up_and_one_without_a_match_names_what_was_near() -> None:
    model = llama()
    freeze(model, FreezeConfig(first_layers=1, patterns=["*.layers.1.mlp.*", "model.norm.weight"]), print)
    names = frozen_names(model)
    assert "model.layers.1.mlp.up_proj.weight" in names
    assert "model.layers.1.self_attn.q_proj.weight" not in names
    assert "model.norm.weight" in names
    assert "model.layers.0.self_attn.q_proj.weight" in names
    with pytest.raises(ConfigError, match=r"'layers.1.mlp' matches no parameter.*'\*layers.1.mlp\*' would match 3"):
        freeze(llama(), FreezeConfig(patterns=["layers.1.mlp"]), print)
    with pytest.raises(ConfigError, match="'model.embed_token.weight' matches no parameter.*model.embed_tokens.weight"):
        freeze(llama(), FreezeConfig(patterns=["model.embed_token.weight"]), print)


def test_freezing_everything_is_refused_and_changes_nothing() -> None:
    model = llama()
    with pytest.raises(ConfigError, match="freezes every parameter"):
        freeze(model, FreezeConfig(patterns=["*"]), print)
    assert frozen_names(model) == []


def test_embeddings_and_a_tied_head_are_one_tensor() -> None:
    untied, tied, gpt2 = llama(), llama(tie_word_embeddings=True), build_gpt2_model(61, 16, 8, 2, 2, seed=0)
    lines: list[str] = []
    freeze(untied, FreezeConfig(embeddings=True), lines.append)
    assert "tied" not in lines[-1]
    assert frozen_names(untied) == [EMBEDDING]
    freeze(tied, FreezeConfig(embeddings=True), lines.append)
    assert "the output head is tied to the embeddings, so it is frozen too" in lines[-1]
    assert not tied.get_output_embeddings().weight.requires_grad
    freeze(gpt2, FreezeConfig(embeddings=True), print)
    assert frozen_names(gpt2) == ["transformer.wte.weight", "transformer.wpe.weight"]
    by_the_heads_name = llama(tie_word_embeddings=True)
    freeze(by_the_heads_name, FreezeConfig(patterns=["lm_head.weight"]), lines.append)
    assert "tied" in lines[-1]


def test_work_that_freezing_leaves_out() -> None:
    model = llama()
    everything = model_flops_per_token(model, 64)
    layer = sum(p.numel() for n, p in model.named_parameters() if ".layers.1." in n and p.ndim == 2)
    freeze(model, FreezeConfig(last_layers=1), print)
    assert everything - model_flops_per_token(model, 64) == 2 * layer  # no gradient of the weights
    freeze(model, FreezeConfig(embeddings=True, first_layers=1), print)
    assert flops_saved_by_freezing(model) == 2 * layer + 2 * layer + 2 * layer + 2 * layer  # no backward pass at all
    tied = llama(tie_word_embeddings=True)
    freeze(tied, FreezeConfig(embeddings=True), print)
    assert flops_saved_by_freezing(tied) == 2 * 512 * 32  # the head still hands gradients on


@pytest.fixture
def mapping(tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path) -> dict:
    return run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, evaluate={"tokens": 500})


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    [checkpoint] = (run / "checkpoints").glob(f"epoch_*_step_{step}")
    return load_file(checkpoint / "model" / "consolidated" / "model.safetensors")


def test_a_run_changes_only_what_is_trained_and_resumes_bit_for_bit(
    mapping: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping["model"] = {
        "config": {**LLAMA, "tie_word_embeddings": True},
        "freeze": {"embeddings": True, "last_layers": 1},
    }
    mapping["checkpoint"] = {"every_steps": 2, "keep_last": 9}
    whole = train(load_run_config(mapping=mapping)).run_directory
    out = capsys.readouterr().out
    assert "frozen: 10 tensors, " in out
    assert "tied to the embeddings" in out
    first, last = weights(whole, 2), weights(whole, 6)
    still = {name for name in first if torch.equal(first[name], last[name])}
    assert still == {name for name in first if name == EMBEDDING or ".layers.1." in name}

    # the same run in two parts
    mapping["run"]["name"], mapping["train"]["max_seconds"] = "parts", 0
    parts = train(load_run_config(mapping=mapping))
    assert parts.step == 1
    del mapping["train"]["max_seconds"]
    train(load_run_config(mapping=mapping))
    assert losses(parts.run_directory) == losses(whole)
    assert all(torch.equal(weights(parts.run_directory, 6)[name], last[name]) for name in last)
    exported = steep.export(parts.run_directory, out=tmp_path / "out")
    assert exported is not None

    mapping["model"]["freeze"] = "embeddings"
    with pytest.raises(CheckpointError, match="model.freeze.last_layers: saved 1, now 0"):
        train(load_run_config(mapping=mapping))


def test_the_plan_counts_what_is_trained(mapping: dict) -> None:
    everything = steep.plan(mapping).structure
    mapping["model"] = {"config": LLAMA, "freeze": {"embeddings": True, "first_layers": 1}}
    plan = steep.plan(mapping)
    part = plan.structure
    model = llama()
    freeze(model, FreezeConfig(embeddings=True, first_layers=1), print)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (part.parameters, part.trainable) == (everything.parameters, trained)
    assert part.memory.optimizer == 8 * trained
    assert part.memory.activations < everything.memory.activations
    assert part.flops_per_token < everything.flops_per_token
    assert "trained" in plan.to_text()
    assert json.loads(json.dumps(plan.to_mapping()))["model"]["trainable"] == trained


def test_the_command_line_takes_the_short_form(mapping: dict) -> None:
    config = load_run_config(mapping=mapping, overrides=["--model.freeze", "embeddings"])
    assert config.model.freeze == FreezeConfig(embeddings=True)
    config = load_run_config(mapping=mapping, overrides=["--model.freeze.first_layers", "2"])
    assert config.model.freeze == FreezeConfig(first_layers=2)
