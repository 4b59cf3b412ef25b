"""The moving average of the weights: as written by hand, resumed bit for bit, and a model like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import steep
from steep.checkpoint.load import find_checkpoint, open_checkpoint
from steep.core.errors import ConfigError
from steep.optim.ema import update_ema
from support import run_mapping

DECAY = 0.8


def test_it_is_the_average_by_hand() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    expected = None
    for step in range(5):
        weight.grad = torch.tensor([1.0, -0.5]) * (step + 1)
        optimizer.step()
        update_ema(optimizer, DECAY)
        now = weight.detach().clone()
        expected = now if expected is None else DECAY * expected + (1 - DECAY) * now
    torch.testing.assert_close(optimizer.state[weight]["ema"], expected)


@pytest.fixture
def mapping(tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path) -> dict[str, Any]:
    mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory)
    mapping["train"] = {**mapping["train"], "ema_decay": DECAY}
    mapping["schedule"] = {"name": "constant", "warmup_steps": 0}  # the same for a run that is made longer
    return mapping


def averages(run: Path) -> dict[str, torch.Tensor]:
    saved = open_checkpoint(find_checkpoint(str(run))).optimizer_tensors()
    return {name.removesuffix(".ema"): tensor for name, tensor in saved.items() if name.endswith(".ema")}


def test_a_resumed_run_has_the_same_average_and_the_weights_do_not_change(mapping: dict[str, Any]) -> None:
    whole = steep.train(mapping).run_directory
    mapping["run"] = {**mapping["run"], "name": "halves"}
    mapping["train"]["steps"] = 3
    steep.train(mapping)
    mapping["train"]["steps"] = 6
    halves = steep.train(mapping).run_directory
    one, other = averages(whole), averages(halves)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    del mapping["train"]["ema_decay"]
    mapping["run"]["name"] = "plain"
    plain = steep.train(mapping).run_directory
    tensors = [open_checkpoint(find_checkpoint(str(run))).model_tensors() for run in (whole, plain)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_the_command_writes_and_scores_it(mapping: dict[str, Any]) -> None:
    run = steep.train(mapping).run_directory
    result = steep.average(run, weights="ema")
    assert result.path == run / "average" / "ema"
    assert result.evaluation is not None
    written, kept = load_file(result.path / "model.safetensors"), averages(run)
    assert set(kept) <= set(written)
    assert all(torch.equal(written[name], kept[name]) for name in kept)


def test_without_one_it_says_how_to_get_one(mapping: dict[str, Any]) -> None:
    del mapping["train"]["ema_decay"]
    run = steep.train(mapping).run_directory
    with pytest.raises(ConfigError, match="train with train.ema_decay"):
        steep.average(run, weights="ema")


def test_the_plan_counts_it(mapping: dict[str, Any]) -> None:
    with_it = steep.plan(mapping).structure
    del mapping["train"]["ema_decay"]
    without = steep.plan(mapping).structure
    assert with_it.memory.optimizer - without.memory.optimizer == 4 * without.trainable
