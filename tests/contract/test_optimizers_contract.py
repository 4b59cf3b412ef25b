"""What every optimizer promises to the loop: the loss falls, a resumed run equals an uninterrupted one bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import steep
from steep.checkpoint.folder import CheckpointState
from steep.checkpoint.load import open_checkpoint
from steep.checkpoint.pieces import Piece, capture_rng, restore, take_pieces
from steep.checkpoint.save import CheckpointWriter
from steep.core.errors import CheckpointError, ConfigError
from steep.core.plugins import plugin_names
from steep.models.gpt2 import build_gpt2_model
from steep.optim import optimizers
from steep.optim.build import PACKAGE, build_optimizer, load_optimizer, optimizer_state_bytes
from steep.optim.config import OptimizerConfig
from support import losses, run_mapping

NAMES = plugin_names(PACKAGE)
RATES = {"adafactor": 0.05, "lion": 1e-3, "muon": 1e-2, "galore": 1e-2}
SMALL_RANK = {"galore": {"rank": 8, "projection_interval_steps": 5}}


def options(name: str) -> dict[str, Any]:
    if name.startswith("adamw_8bit"):
        pytest.importorskip("torchao" if name.endswith("torchao") else "bitsandbytes")
    return {"name": name, "learning_rate": RATES.get(name, 3e-3), **SMALL_RANK.get(name, {})}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 / (step + 1)
        if prepare := getattr(optimizer, "prepare_step", None):
            prepare()
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def save(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    state = CheckpointState(
        **vars(take_pieces(model, optimizer)), rng=capture_rng(), config_yaml="run: {}\n", step=7, tokens=1,
        sequences_seen=1, plan_fingerprint="", train_state={},
    )  # fmt: skip
    with CheckpointWriter(directory) as writer:
        writer.save("epoch_0_step_7", state)
    return directory / "epoch_0_step_7"


def assert_same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [key for key in one if one[key].dtype != other[key].dtype or not torch.equal(one[key], other[key])]


def tensors(pieces: tuple[Piece, ...]) -> dict[str, torch.Tensor]:
    return {piece.name: piece.tensor for piece in pieces}


@pytest.mark.parametrize("name", NAMES)
def test_the_file_has_what_the_protocol_names(name):
    """Building needs the optional package, planning its state does not."""
    config = OptimizerConfig(**{**SMALL_RANK.get(name, {}), "name": name})
    assert load_optimizer(config).__doc__
    assert optimizer_state_bytes(build_gpt2_model(256, 16, 32, 2, 2, seed=0), config) > 0


@pytest.mark.parametrize("function", ["build", "state_bytes"])
def test_a_file_without_one_of_the_functions_is_refused_by_name(tmp_path, monkeypatch, function):
    other = {"build": "state_bytes", "state_bytes": "build"}[function]
    (tmp_path / f"half_{other}.py").write_text(f"def {other}(groups, config): ...\n")
    monkeypatch.setattr(optimizers, "__path__", [*optimizers.__path__, str(tmp_path)])
    monkeypatch.setattr(optimizers.__spec__, "submodule_search_locations", optimizers.__path__)
    with pytest.raises(
        ConfigError, match=rf"half_{other}.py does not define {function}; every file of .* build and state"
    ):
        build_optimizer(build_gpt2_model(61, 16, 8, 2, 2, seed=0), OptimizerConfig(name=f"half_{other}"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_state_comes_back_bit_for_bit(tmp_path, name, dtype):
    config = OptimizerConfig(**options(name))
    model, other = (build_gpt2_model(256, 16, 32, 2, 2, seed=seed).to(dtype) for seed in (0, 1))
    optimizer, resumed = build_optimizer(model, config), build_optimizer(other, config)
    train(model, optimizer, 7, seed=1)  # no multiple of galore's interval
    restore(other, resumed, open_checkpoint(save(tmp_path, model, optimizer)))
    assert_same_state(tensors(take_pieces(model, optimizer).optimizer), tensors(take_pieces(other, resumed).optimizer))
    train(model, optimizer, 5, seed=2)
    train(other, resumed, 5, seed=2)
    one, two = take_pieces(model, optimizer), take_pieces(other, resumed)
    assert_same_state(tensors(one.model), tensors(two.model))
    assert_same_state(tensors(one.optimizer), tensors(two.optimizer))
    assert one.optimizer_state == two.optimizer_state


@pytest.mark.parametrize("name", NAMES)
def test_torchs_own_state_dict_comes_back_too(name):
    config = OptimizerConfig(**options(name))
    model = build_gpt2_model(256, 16, 32, 2, 2, seed=0)
    optimizer = build_optimizer(model, config)
    train(model, optimizer, 3, seed=1)
    other = build_gpt2_model(256, 16, 32, 2, 2, seed=1)
    other.load_state_dict(model.state_dict())
    resumed = build_optimizer(other, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the tensors
    train(model, optimizer, 3, seed=2)
    train(other, resumed, 3, seed=2)
    assert_same_state(model.state_dict(), other.state_dict())


def test_another_optimizer_does_not_take_the_state(tmp_path):
    model = build_gpt2_model(61, 16, 8, 2, 2, seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(name="lion"))
    train(model, optimizer, 1, seed=1)
    path = save(tmp_path, model, optimizer)
    with pytest.raises(CheckpointError, match="saved from Lion, now Muon"):
        restore(model, build_optimizer(model, OptimizerConfig(name="muon")), open_checkpoint(path))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_learns_and_resumes_bitwise(tmp_path, corpus_directory, tiny_tokenizer_directory, name):
    def mapping(folder: str) -> dict[str, Any]:
        return run_mapping(
            tmp_path / folder, corpus_directory, tiny_tokenizer_directory, optimizer=options(name),
            train={"steps": 16}, schedule={"name": "constant", "warmup_steps": 2}, checkpoint={"every_steps": 7},
            data={"cache_directory": str(tmp_path / "cache")},
        )  # fmt: skip

    steep.train(mapping("whole"))
    first = mapping("parted")
    first["train"]["max_seconds"] = 1e-6  # stops after every step
    for _ in range(3):
        steep.train(first)
    whole, parted = (tmp_path / folder / "runs" / "small" for folder in ("whole", "parted"))
    assert len(losses(parted)) == 3
    del first["train"]["max_seconds"]
    steep.train(first)
    lines = losses(whole)
    assert len(lines) == 16
    assert losses(parted) == lines
    assert lines[-1][1] < lines[0][1] - 0.1
    ends = [next((run / "checkpoints").glob("*step_16")) for run in (whole, parted)]
    one, two = (open_checkpoint(end) for end in ends)
    assert_same_state(one.model_tensors(), two.model_tensors())
    assert_same_state(one.optimizer_tensors(), two.optimizer_tensors())
