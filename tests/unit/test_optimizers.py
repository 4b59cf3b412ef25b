"""Each optimizer against its reference: the paper's formula in plain numpy (fp64), or torch's own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from steep.core.errors import ConfigError
from steep.models.gpt2 import build_gpt2_model
from steep.optim.build import build_optimizer, optimizer_state_bytes
from steep.optim.config import LION_BETAS, OptimizerConfig, options_of_optimizers
from steep.optim.optimizers.adamw_8bit import build as build_8bit

STEPS, RATE, DECAY = 7, 3e-3, 0.2
RATES = [RATE * factor for factor in (0.25, 0.5, 1.0, 1.0, 0.8, 0.5, 0.1)]


def model_of_matrices() -> nn.Module:
    """Two inner matrices, tall and wide, and a bias."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 10, bias=False), nn.Linear(10, 4)).double()


def gradients(model: nn.Module) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    return [{name: rng.normal(size=p.shape) for name, p in model.named_parameters()} for _ in range(STEPS)]


def run(model: nn.Module, config: OptimizerConfig) -> tuple[dict[str, np.ndarray], torch.optim.Optimizer]:
    optimizer = build_optimizer(model, config)
    for rate, gradient in zip(RATES, gradients(model), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in model.named_parameters():
            parameter.grad = torch.from_numpy(gradient[name].copy()).to(parameter.dtype)
        optimizer.step()
    return {name: p.detach().numpy() for name, p in model.named_parameters()}, optimizer


def start_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def decay_of(weight: np.ndarray) -> float:
    return DECAY if weight.ndim >= 2 else 0.0


def assert_same(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float = 1e-10) -> None:
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(ours[name], weight, rtol=rtol, atol=1e-12, err_msg=name)


def test_lion_is_algorithm_2():
    model = model_of_matrices()
    weights = start_of(model)
    ours, optimizer = run(model, OptimizerConfig(name="lion", weight_decay=DECAY))
    beta1, beta2 = LION_BETAS
    assert optimizer.param_groups[0]["betas"] == LION_BETAS
    momentum = {name: np.zeros_like(weight) for name, weight in weights.items()}
    for rate, gradient in zip(RATES, gradients(model), strict=True):
        for name, weight in weights.items():
            update = np.sign(beta1 * momentum[name] + (1 - beta1) * gradient[name])
            weights[name] = weight - rate * (update + decay_of(weight) * weight)
            momentum[name] = beta2 * momentum[name] + (1 - beta2) * gradient[name]
    assert_same(ours, weights)


def test_adafactor_is_the_papers_with_relative_steps():
    model = model_of_matrices()
    weights = start_of(model)
    config = OptimizerConfig(name="adafactor", weight_decay=DECAY, beta2_decay=-0.7, clip_threshold=1.1)
    ours, _ = run(model, config)
    moments: dict[str, list[np.ndarray]] = {}
    for step, (rate, gradient) in enumerate(zip(RATES, gradients(model), strict=True), start=1):
        keep = 1 - step**-0.7
        for name, weight in weights.items():
            square = gradient[name] ** 2
            parts = [square.mean(1, keepdims=True), square.mean(0, keepdims=True)] if weight.ndim == 2 else [square]
            before = moments.get(name, [np.zeros_like(part) for part in parts])
            moments[name] = [keep * old + (1 - keep) * new for old, new in zip(before, parts, strict=True)]
            if weight.ndim == 2:
                row, column = moments[name]
                variance = row * column / row.mean()
            else:
                [variance] = moments[name]
            update = gradient[name] / np.sqrt(variance)
            update /= max(1.0, np.sqrt((update**2).mean()) / 1.1)
            size = max(1e-3, np.sqrt((weight**2).mean())) * min(rate, 1 / np.sqrt(step))
            weights[name] = weight * (1 - rate * decay_of(weight)) - size * update
    assert_same(ours, weights, rtol=1e-6)


def test_schedule_free_is_algorithm_1_and_leaves_the_average_in_the_model():
    model = model_of_matrices()
    config = OptimizerConfig(name="schedule_free_adamw", weight_decay=DECAY)
    x = start_of(model)
    z, v = {name: weight.copy() for name, weight in x.items()}, {name: 0 * weight for name, weight in x.items()}
    ours, _ = run(model, config)
    (beta1, beta2), total, largest = config.betas, 0.0, 0.0
    for step, (rate, gradient) in enumerate(zip(RATES, gradients(model), strict=True), start=1):
        largest = max(largest, rate)
        total += largest**2
        for name, g in gradient.items():
            y = (1 - beta1) * z[name] + beta1 * x[name]
            v[name] = beta2 * v[name] + (1 - beta2) * g**2
            z[name] -= rate * (g / (np.sqrt(v[name] / (1 - beta2**step)) + config.eps) + decay_of(g) * y)
            share = largest**2 / total
            x[name] = (1 - share) * x[name] + share * z[name]
    assert_same(ours, x)


def test_schedule_free_takes_gradients_at_y():
    model = nn.Linear(3, 2, bias=False).double()
    optimizer = build_optimizer(model, OptimizerConfig(name="schedule_free_adamw", learning_rate=0.1))
    for _ in range(2):
        optimizer.prepare_step()
        model(torch.ones(1, 3).double()).square().sum().backward()
        optimizer.step()
    average, z = model.weight.detach().clone(), optimizer.state[model.weight]["z"]
    assert not torch.equal(average, z)
    optimizer.prepare_step()
    optimizer.prepare_step()
    torch.testing.assert_close(model.weight.detach(), 0.9 * average + 0.1 * z)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Five iterations of Jordan's quintic, in bfloat16 as published."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).double()


def test_muon_on_inner_matrices_and_torchs_adamw_elsewhere():
    ours, reference = (build_gpt2_model(61, 16, 8, 2, 2, seed=0).double() for _ in range(2))
    config = OptimizerConfig(name="muon", weight_decay=DECAY)
    _, optimizer = run(ours, config)
    names = {group["name"]: group["param_names"] for group in optimizer.param_groups}
    inner = names["inner"]
    assert list(names) == ["inner", "decay", "no_decay"]
    assert names["decay"] == ["transformer.wte.weight", "transformer.wpe.weight"]
    parameters = dict(reference.named_parameters())
    outer = [p for name, p in parameters.items() if name not in inner]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in outer if p.ndim == 2], "weight_decay": DECAY},
            {"params": [p for p in outer if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=config.betas,
        fused=False,
    )
    momentum = {name: torch.zeros_like(parameters[name]) for name in inner}
    for rate, gradient in zip(RATES, gradients(reference), strict=True):
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(gradient[name])
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        with torch.no_grad():
            for name in inner:
                parameter, g = parameters[name], parameters[name].grad
                momentum[name] = 0.95 * momentum[name] + 0.05 * g
                update = orthogonal(0.05 * g + 0.95 * momentum[name]) * 0.2 * max(parameter.shape) ** 0.5
                parameter.mul_(1 - rate * DECAY).sub_(update, alpha=rate)
    for name, parameter in ours.named_parameters():
        tolerance = 2e-4 if name in inner else 1e-9  # bfloat16 inside: other orders of adding round otherwise
        torch.testing.assert_close(parameter, parameters[name], rtol=0, atol=tolerance)
        assert (parameter - parameters[name]).abs().max() < 0.05 * (parameter - _start(name)).abs().max()


def _start(name: str) -> torch.Tensor:
    return dict(build_gpt2_model(61, 16, 8, 2, 2, seed=0).double().named_parameters())[name]


def test_galore_is_adam_in_the_leading_subspace():
    model = model_of_matrices()
    weights = start_of(model)
    config = OptimizerConfig(
        name="galore", weight_decay=DECAY, rank=3, projection_interval_steps=3, projection_scale=0.5
    )
    ours, optimizer = run(model, config)
    state = [value for values in optimizer.state.values() for value in values.values()]
    assert all(value.is_contiguous() for value in state)  # as a checkpoint gives it back
    (beta1, beta2), moments, basis = config.betas, {}, {}
    for step, (rate, gradient) in enumerate(zip(RATES, gradients(model), strict=True), start=1):
        for name, weight in weights.items():
            g, is_projected, is_tall = gradient[name], weight.ndim == 2, weight.shape[0] > weight.shape[-1]
            if is_projected:
                if step in (1, 4, 7):
                    u, _, vt = np.linalg.svd(g.astype(np.float32), full_matrices=False)
                    vectors = (vt[:3].T if is_tall else u[:, :3]).astype(np.float64)
                    basis[name] = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(3)])
                g = g @ basis[name] if is_tall else basis[name].T @ g
            m, v = moments.get(name, (0.0, 0.0))
            moments[name] = m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
            update = m / (1 - beta1**step) / (np.sqrt(v / (1 - beta2**step)) + config.eps)
            if is_projected:
                update = 0.5 * (update @ basis[name].T if is_tall else basis[name] @ update)
            weights[name] = weight * (1 - rate * decay_of(weight)) - rate * update
    assert_same(ours, weights, rtol=1e-4)


@pytest.mark.parametrize(("name", "moment"), [("adamw_8bit", "state1"), ("adamw_8bit_torchao", "exp_avg")])
def test_8bit_adamw_stays_near_adamw_and_small_tensors_equal_it(name, moment):
    pytest.importorskip("torchao" if name.endswith("torchao") else "bitsandbytes")

    def model() -> nn.Module:
        torch.manual_seed(3)
        return nn.Linear(64, 96)

    start = start_of(model())
    exact, _ = run(model(), OptimizerConfig(weight_decay=DECAY))
    ours, optimizer = run(model(), OptimizerConfig(name=name, weight_decay=DECAY))
    states = {key: value for key, value in optimizer.state.items() if value[moment].dtype == torch.uint8}
    assert [parameter.shape for parameter in states] == [(96, 64)]
    np.testing.assert_allclose(ours["bias"], exact["bias"], rtol=0, atol=1e-6)
    moved = np.linalg.norm(exact["weight"] - start["weight"])
    assert 0 < np.linalg.norm(ours["weight"] - exact["weight"]) < 0.1 * moved


def test_torchaos_8bit_adamw_is_torchaos_own():
    """Weights bit for bit, although its state is taken apart between steps."""
    pytest.importorskip("torchao")
    from torchao.optim import AdamW8bit

    def model() -> nn.Module:
        torch.manual_seed(3)
        return nn.Linear(64, 96)

    ours, _ = run(model(), OptimizerConfig(name="adamw_8bit_torchao", weight_decay=DECAY))
    other = model()
    decayed = [{"params": [other.weight], "weight_decay": DECAY}, {"params": [other.bias], "weight_decay": 0.0}]
    config = OptimizerConfig()
    optimizer = AdamW8bit(decayed, lr=1.0, betas=config.betas, eps=config.eps)
    for rate, gradient in zip(RATES, gradients(other), strict=True):
        for group in optimizer.param_groups:
            group["lr"].fill_(rate)
        for name, parameter in other.named_parameters():
            parameter.grad = torch.from_numpy(gradient[name]).to(parameter.dtype)
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
    for name, parameter in other.named_parameters():
        np.testing.assert_array_equal(ours[name], parameter.detach().numpy())


def test_8bit_adamw_is_refused_where_it_has_no_kernels():
    weight = nn.Parameter(torch.empty(8, 8, device="meta"))
    groups = [{"name": "decay", "params": [("weight", weight)], "lr": 1e-3, "weight_decay": 0.0}]
    with pytest.raises(ConfigError, match="adamw_8bit works on cpu, cuda, xpu; these weights are on meta.*adafactor"):
        build_8bit(groups, OptimizerConfig(name="adamw_8bit"))


def test_8bit_adamw_without_its_package_names_the_extra():
    program = """
import sys
sys.modules["bitsandbytes"] = None  # as where it is not installed
import torch
from steep.core.errors import MissingExtraError
from steep.optim.config import OptimizerConfig
from steep.optim.build import build_optimizer
try:
    build_optimizer(torch.nn.Linear(2, 2), OptimizerConfig(name="adamw_8bit"))
except MissingExtraError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert "optimizer.name=adamw_8bit needs the package 'bitsandbytes'" in result.stdout
    assert "steep[quant]" in result.stdout


@pytest.mark.parametrize("name", sorted(options_of_optimizers()))
def test_planned_state_is_the_state(name):
    if name.startswith("adamw_8bit"):
        pytest.importorskip("torchao" if name.endswith("torchao") else "bitsandbytes")
    model = build_gpt2_model(256, 16, 32, 2, 2, seed=0)
    config = OptimizerConfig(name=name) if name != "galore" else OptimizerConfig(name=name, rank=8)
    planned = optimizer_state_bytes(model, config)
    with FakeTensorMode():  # as the plan builds it
        assert optimizer_state_bytes(build_gpt2_model(256, 16, 32, 2, 2, seed=0), config) == planned
    _, optimizer = run(model, config)
    state = [(key, value) for values in optimizer.state.values() for key, value in values.items()]
    kept = sum(v.nbytes for key, v in state if isinstance(v, torch.Tensor) and key not in ("step", "qmap1", "qmap2"))
    copy_of_the_average = sum(p.nbytes for p in model.parameters()) if name == "schedule_free_adamw" else 0
    assert planned == kept + copy_of_the_average


def test_options_of_another_optimizer_are_refused_by_name():
    with pytest.raises(
        ValidationError,
        match="lion has no option 'momentum'. It has: learning_rate, embedding_learning_rate, weight_decay, betas",
    ):
        OptimizerConfig(name="lion", momentum=0.9)
    with pytest.raises(ValidationError, match="adafactor has no option 'betas'"):
        OptimizerConfig(name="adafactor", betas=(0.5, 0.9))
    for name in options_of_optimizers():  # a saved configuration names every option
        config = OptimizerConfig(name=name)
        assert OptimizerConfig(**config.model_dump()) == config


def test_every_optimizer_of_ours_says_which_options_it_reads():
    options = options_of_optimizers()
    assert all(options.values())
    assert {option for of_one in options.values() for option in of_one} < set(OptimizerConfig.model_fields)
