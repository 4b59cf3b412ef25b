"""The trainable contract: what must train and does not, and what must not and does, is found and named in the first updates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from steep.config.load import load_run_config
from steep.core.errors import ConfigError, TrainingError
from steep.training.loop import train
from steep.training.trainable_check import PATIENCE_UPDATES, TrainableCheck, fingerprint
from support import LLAMA, run_mapping

PARTS = '''
import torch
from transformers import LlamaForCausalLM

from steep.models.fresh import build_fresh

MODELS = []


class OwnModel(LlamaForCausalLM):
    """A model of a user's own, whose unused tensors are a mistake."""


def scribble(module, _):
    module.embed_tokens.weight.data[0].add_(1e-3)


def model(config, unused=0, scribbles=False, own=False):
    made = build_fresh(config, None, seed=0)
    if own:
        made = OwnModel(made.config)
    made.model.embed_tokens.weight.requires_grad_(False)
    if unused:
        made.model.forgotten = torch.nn.Linear(unused, unused)
    if scribbles:
        made.model.register_forward_pre_hook(scribble)
    MODELS.append(made)  # the first; the plan's has no numbers
    return made


class Meddler(torch.optim.AdamW):
    """Moves what it was not given."""

    def step(self, closure=None):
        MODELS[-1].model.embed_tokens.weight.data.mul_(0.999)
        return super().step(closure)


class Forgetful(torch.optim.AdamW):
    """Takes all tensors and updates no vectors."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    parameter.grad = None
        return super().step(closure)


def partial(params, lr):
    """Takes the matrices only."""
    return torch.optim.AdamW([group for group in params if group["name"] == "decay"], lr=lr)
'''


class Small:
    """A small run whose model and optimizer come from a file."""

    def __init__(self, mapping: dict[str, Any], file: Path):
        self.mapping, self.file = mapping, file

    def model(self, **arguments: Any) -> None:
        self.mapping["model"] = {"_target_": f"{self.file}:model", "config": LLAMA, **arguments}

    def optimizer(self, name: str) -> None:
        self.mapping["optimizer"] = {"_target_": f"{self.file}:{name}", "lr": 1e-3}

    def train(self) -> Any:
        return train(load_run_config(mapping=self.mapping))

    @property
    def run(self) -> Path:
        return Path(self.mapping["run"]["directory"]) / "small"


@pytest.fixture
def small(tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path) -> Small:
    file = tmp_path / "parts.py"
    file.write_text(PARTS, encoding="utf-8")
    return Small(run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, evaluate={"tokens": 500}), file)


def test_the_table_of_groups(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    small.model()
    assert small.train().step == 6
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " tensors " in line]
    assert [row[0] for row in rows] == ["decay", "no_decay", "frozen"]
    assert rows[0][1] == "15"
    assert rows[0][-1] == rows[1][-1] == "float32"
    assert rows[2][1:] == ["1", "tensors", "16.4k", "parameters"]


@pytest.mark.parametrize("micro_batch_size", [4, 2])
def test_a_parameter_outside_the_graph_stops_a_run_of_an_own_model_by_name(small: Small, micro_batch_size: int) -> None:
    small.model(unused=8, own=True)
    small.mapping["train"]["micro_batch_size"] = micro_batch_size
    with pytest.raises(TrainingError, match="2 trainable tensors had no gradient in the first 2 updates: "
                                            r"model\.forgotten\.weight, model\.forgotten\.bias"):  # fmt: skip
        small.train()
    assert json.loads((small.run / "summary.json").read_text())["status"] == "failed"
    assert not list(small.run.glob("checkpoints/epoch_*"))  # the one of step 2 would have come after the check


def test_a_parameter_outside_the_graph_of_a_known_class_is_frozen_and_named(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    small.model(unused=8)
    assert small.train().step == 6
    said = capsys.readouterr().out
    assert "not trained: 2 tensors (72 parameters) that the loss of" in said
    assert "model.forgotten.weight, model.forgotten.bias" in said


@pytest.mark.parametrize("culprit", ["optimizer", "forward pass"])
def test_a_frozen_tensor_that_moves_stops_the_run(small: Small, culprit: str) -> None:
    small.model(scribbles=culprit == "forward pass")
    if culprit == "optimizer":
        small.optimizer("Meddler")
    with pytest.raises(TrainingError, match=r"1 frozen tensor changed .*: model\.embed_tokens\.weight\."):
        small.train()


def test_an_optimizer_that_ignores_some_of_its_tensors_stops_the_run(small: Small) -> None:
    small.model()
    small.optimizer("Forgetful")
    with pytest.raises(
        TrainingError, match=r"5 trainable tensors had gradients and did not change .*norm.*\(Forgetful\)"
    ):
        small.train()


def test_an_optimizer_that_leaves_tensors_out_never_begins(small: Small) -> None:
    small.model()
    small.optimizer("partial")
    with pytest.raises(ConfigError, match=r"AdamW updates none of these trainable tensors: .*layernorm"):
        small.train()
    assert not (small.run / "metrics.jsonl").exists() or "train" not in (small.run / "metrics.jsonl").read_text()


def test_updates_lost_in_bf16_are_said_and_those_of_everything_stop_the_run(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    small.mapping["train"]["precision"] = "bf16"
    small.mapping["optimizer"]["learning_rate"] = 1e-5
    assert small.train().step == 6
    out = capsys.readouterr().out
    assert "5 of 21 trainable tensors had gradients and did not change in the first 2 updates" in out
    assert "lost in the rounding of bfloat16" in out
    assert "mixed_bf16" in out
    small.mapping["run"]["name"], small.mapping["optimizer"]["learning_rate"] = "slower", 1e-30
    with pytest.raises(TrainingError, match="21 of 21 trainable tensors had gradients and did not change"):
        small.train()


def test_a_long_warmup_is_waited_for(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    """At the first updates of it, norms near 1 cannot show their updates in fp32 either."""
    small.mapping["optimizer"]["learning_rate"] = 1e-6
    small.mapping["schedule"] = {"name": "constant", "warmup_steps": 100}
    small.mapping["train"] |= {"steps": 101, "global_batch_size": 1}
    small.mapping["data"]["sequence_length"] = 16
    small.mapping["checkpoint"] = {}
    assert small.train().step == 101
    assert "did not change" not in capsys.readouterr().out


def watched(module: nn.Module, learning_rate: float = 0.1, **settings: Any) -> tuple[Any, TrainableCheck]:
    """A function that makes an update on a loss and gives the lines said so far, and the check that watches."""
    groups = [{"name": "all", "params": list(module.parameters()), "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, **settings)
    lines: list[str] = []
    check = TrainableCheck(module, optimizer, lines.append)

    def update(loss: torch.Tensor, last: bool = False) -> list[str]:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        check.after_step(1.0, last)
        return lines

    return update, check


class Chain(nn.Module):
    """Three matrices, the later two zero at first, as in zero-initialised projections and adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4, bias=False) for _ in range(3))
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.third.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.third(x + self.second(self.first(x))) - 1).square().sum()


def test_weights_behind_zeros_get_their_time() -> None:
    module = Chain()
    module.empty = nn.Parameter(torch.zeros(0, 4))  # has nothing to train
    update, check = watched(module)
    for _ in range(8):
        assert update(module(torch.ones(2, 4))) == []
    assert not check._handles


def test_a_gradient_that_stays_zero_is_named_though_weight_decay_moves_the_weight() -> None:
    module = Chain()
    update, _ = watched(module)
    before = module.first.weight.clone()
    for _ in range(PATIENCE_UPDATES - 1):
        update(module.third(torch.ones(2, 4)).sum() + 0 * module(torch.ones(2, 4)))
    assert not torch.equal(before, module.first.weight)
    with pytest.raises(TrainingError, match=r"2 trainable tensors had a gradient of exactly zero in the first 8 updates: "
                                            r"first\.weight, second\.weight"):  # fmt: skip
        update(module.third(torch.ones(2, 4)).sum() + 0 * module(torch.ones(2, 4)))


def test_an_expert_that_no_token_was_sent_to_is_no_fault() -> None:
    module = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    update, _ = watched(module)
    for _ in range(16):
        assert update(module["experts"][0](torch.ones(2, 4)).square().sum()) == []


def test_updates_at_rate_zero_do_not_count_and_the_last_one_decides() -> None:
    module = nn.Linear(4, 4)
    module.unused = nn.Parameter(torch.ones(3))
    update, check = watched(module)
    check.after_step(0.0, last=False)
    assert check.updates == 0
    with pytest.raises(TrainingError, match="1 trainable tensor had no gradient in the first 1 updates: unused"):
        update(module(torch.ones(2, 4)).sum(), last=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (64, 65), (513, 300)])
def test_a_fingerprint_changes_with_any_bit_and_is_small(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    tensor = torch.randn(shape, generator=generator).to(dtype)
    before = fingerprint(tensor)
    assert torch.equal(before, fingerprint(tensor.clone()))
    assert before.numel() <= 2 * 4096 + 8
    number = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.view(-1).view(number)
    for place in {0, tensor.numel() // 2, tensor.numel() - 1}:
        bits[place] ^= 1
        assert not torch.equal(before, fingerprint(tensor))
        bits[place] ^= 1
    offset = torch.cat([torch.zeros(1, dtype=torch.float32).to(dtype), tensor.view(-1)])[1:]
    assert torch.equal(before, fingerprint(offset))


def test_watching_draws_nothing_and_writes_nothing() -> None:
    module = Chain()
    state = torch.random.get_rng_state()
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    update, contract = watched(module)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert module.state_dict().keys() == weights.keys()

    alone = Chain()
    alone.load_state_dict(weights)
    plain = torch.optim.AdamW([{"params": list(alone.parameters()), "weight_decay": 0.1}], lr=0.1)
    for _ in range(8):
        update(module(torch.ones(2, 4)))
        alone(torch.ones(2, 4)).backward()
        plain.step()
        plain.zero_grad()
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in module.state_dict().items())
    assert contract.updates == 4  # every tensor had trained by then, and the watch ended
