"""State out of a model and an optimizer and back in, bit for bit; refusals name what differs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from steep.checkpoint.folder import CheckpointState
from steep.checkpoint.load import open_checkpoint, verify
from steep.checkpoint.pieces import capture_rng, model_tensors, restore, restore_rng, take_pieces
from steep.checkpoint.save import CheckpointWriter
from steep.core.errors import CheckpointError


class Tied(nn.Module):
    """Embedding tied to the output head, dropout, a persistent and a temporary buffer."""

    def __init__(self, width: int = 8, dtype: torch.dtype = torch.float32, layers: int = 1):
        super().__init__()
        self.embed = nn.Embedding(16, width, dtype=dtype)
        self.layers = nn.ModuleList(nn.Linear(width, width, dtype=dtype) for _ in range(layers))
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, 16, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = self.drop(torch.relu(layer(hidden)))
        return self.head(hidden)


def groups(model: nn.Module, decay: float = 0.1) -> list[dict]:
    wide = [p for p in model.parameters() if p.dim() > 1]
    return [
        {"params": wide, "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(groups(model), lr=1e-2),
    "adamw_fused": lambda model: torch.optim.AdamW(groups(model), lr=1e-2, fused=True),
    "adamw_amsgrad": lambda model: torch.optim.AdamW(groups(model), lr=torch.tensor(1e-2), amsgrad=True),
    "sgd_momentum": lambda model: torch.optim.SGD(groups(model), lr=1e-2, momentum=0.9),
    "adafactor": lambda model: torch.optim.Adafactor(groups(model), lr=1e-2),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 16, (4, 6))
        loss = nn.functional.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.seen += 1
        losses.append(loss.item())
    return losses


def save(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **changes) -> Path:
    values = {
        **vars(take_pieces(model, optimizer)), "rng": capture_rng(), "config_yaml": "run: {}\n", "step": 3, "tokens": 30,
        "sequences_seen": 12, "plan_fingerprint": "f00", "train_state": {"losses": [1.5]},
    }  # fmt: skip
    with CheckpointWriter(directory) as writer:
        writer.save("epoch_0_step_3", CheckpointState(**{**values, **changes}))
    return directory / "epoch_0_step_3"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_training_equals_the_uninterrupted_run_bit_for_bit(tmp_path, name, dtype):
    torch.manual_seed(5)
    model = Tied(dtype=dtype)
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, 3)
    path = save(tmp_path, model, optimizer)
    expected = train(model, optimizer, 3)

    torch.manual_seed(99)
    other = Tied(dtype=dtype)
    resumed = OPTIMIZERS[name](other)
    checkpoint = open_checkpoint(path)
    verify(path)
    restore(other, resumed, checkpoint)
    restore_rng(checkpoint.rng())
    assert train(other, resumed, 3) == expected
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert checkpoint.train_state == {"losses": [1.5]}
    assert (checkpoint.manifest.step, checkpoint.manifest.sequences_seen) == (3, 12)


def test_names_are_the_models_own_and_tied_weights_are_stored_once():
    model = Tied()
    optimizer = OPTIMIZERS["adamw"](model)
    train(model, optimizer, 1)
    pieces = take_pieces(model, optimizer)
    assert [piece.name for piece in pieces.model] == ["embed.weight", "layers.0.weight", "layers.0.bias", "seen"]
    moments = {piece.name: piece for piece in pieces.optimizer}
    assert moments["layers.0.bias.exp_avg_sq"].global_shape == (8,)
    assert moments["layers.0.bias.exp_avg_sq"].offset == (0,)
    assert moments["embed.weight.step"].global_shape == moments["embed.weight.step"].offset == ()
    json.dumps(pieces.optimizer_state, allow_nan=False)
    assert pieces.optimizer_state["param_groups"][1]["params"] == ["layers.0.bias"]


def test_names_do_not_depend_on_compile():
    model = Tied()
    names = set(model_tensors(model))
    model.layers[0] = torch.compile(model.layers[0])
    assert set(model_tensors(model)) == names


def test_restored_state_does_not_depend_on_the_file(tmp_path):
    model = Tied()
    optimizer = OPTIMIZERS["adamw"](model)
    train(model, optimizer, 1)
    path = save(tmp_path, model, optimizer)
    restore(model, optimizer, open_checkpoint(path))
    before = [piece.tensor.clone() for piece in take_pieces(model, optimizer).optimizer]
    for part in ("model", "optim"):
        file = path / part / "rank_00000.safetensors"
        with open(file, "r+b") as handle:  # in place: a memory map would see it
            handle.write(b"\xff" * file.stat().st_size)
    after = [piece.tensor for piece in take_pieces(model, optimizer).optimizer]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Tied(width=12), r"embed.weight: saved as float32 \(16, 8\), now float32 \(16, 12\)"),
        (lambda: Tied(dtype=torch.bfloat16), "saved as float32 .* now bfloat16"),
        (lambda: Tied(layers=2), r"in the model but not in the checkpoint: layers.1.weight, layers.1.bias"),
    ],
)
def test_another_model_is_refused_by_name_and_left_alone(tmp_path, build, message):
    model = Tied()
    optimizer = OPTIMIZERS["adamw"](model)
    train(model, optimizer, 1)
    path = save(tmp_path, model, optimizer)
    other = build()
    before = {name: tensor.clone() for name, tensor in model_tensors(other).items()}
    with pytest.raises(CheckpointError, match=message):
        restore(other, OPTIMIZERS["adamw"](other), open_checkpoint(path))
    assert all(torch.equal(before[name], tensor) for name, tensor in model_tensors(other).items())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (OPTIMIZERS["sgd_momentum"], "saved from AdamW, now SGD"),
        (lambda m: torch.optim.AdamW(m.parameters()), "2 parameter groups saved, now 1"),
        (lambda m: torch.optim.AdamW(groups(m, decay=0.2)), "group 0: weight_decay was 0.1, is now 0.2"),
        (lambda m: torch.optim.AdamW(groups(m), betas=(0.8, 0.9)), r"betas was \[0.9, 0.999\], is now \[0.8, 0.9\]"),
        (lambda m: torch.optim.AdamW(groups(m)[::-1]), "group 0 holds other tensors: embed.weight, layers.0.bias"),
    ],
)
def test_another_optimizer_is_refused_by_name(tmp_path, build, message):
    model = Tied()
    optimizer = OPTIMIZERS["adamw"](model)
    train(model, optimizer, 1)
    path = save(tmp_path, model, optimizer)
    with pytest.raises(CheckpointError, match=message):
        restore(model, build(model), open_checkpoint(path))


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(CheckpointError, match="3 tensors not in the model"):
        take_pieces(Tied(), OPTIMIZERS["adamw"](Tied()))


def test_every_generator_continues_where_it_was():
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    random.gauss(0, 1)
    np.random.standard_normal()
    saved = json.loads(json.dumps(capture_rng()))

    def draw() -> list:
        return [torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist()]

    expected = draw()
    torch.manual_seed(8)
    random.seed(8)
    np.random.seed(8)
    restore_rng(saved)
    assert draw() == expected


@pytest.mark.parametrize("damage", [{"python": [3]}, {"torch": "zz"}, {"torch": "00"}, {"numpy": None}])
def test_unusable_generator_state_is_an_error(damage):
    with pytest.raises(CheckpointError, match="random number generators"):
        restore_rng({**capture_rng(), **damage})
