"""The balancing loss of mixtures of experts, against the Switch Transformer's formula and transformers' own loss."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from steep.batch import Batch, StepBatches
from steep.core.errors import ConfigError
from steep.loader import empty_batch, make_batch
from steep.models.attention_choice import prepare_lm_loss
from steep.models.balance import balancing_loss, probabilities
from steep.models.balance_choice import prepare_balance
from steep.models.fresh import build_fresh
from steep.models.lm_loss import LMLoss
from steep.models.mixture import find_experts, find_routers
from steep.models.runner import ModelRunner
from steep.optim.build import build_optimizer
from steep.optim.config import OptimizerConfig
from steep.order.batches import count_step
from steep.order.data_order import OrderedSequence
from steep.order.packing import TokenRange
from steep.parallelize.activation_checkpoint import checkpoint_layers
from steep.training.engine import TorchEngine

LENGTH = 16
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 64,
    "router_aux_loss_coef": 0.5,
}  # fmt: skip
SIGMOID = {
    **MIXTRAL, "model_type": "glm4_moe", "n_routed_experts": 4, "moe_intermediate_size": 16, "head_dim": 8,
    "first_k_dense_replace": 1, "num_experts_per_tok": 2,
}  # fmt: skip
SIGMOID = {key: value for key, value in SIGMOID.items() if key not in ("num_local_experts", "router_aux_loss_coef")}


class Documents:
    document_lengths = (200,)

    def read(self, document: int, start: int, count: int, out: Any) -> None:
        out[:] = (np.arange(start, start + count) * 7 + 3) % 64


def uneven(mapping: dict[str, Any]) -> torch.nn.Module:
    """A model whose routers prefer some experts clearly, so that no choice hangs on rounding."""
    model = build_fresh(mapping, None, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for router in find_routers(model):
            for weight in router.module.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def lm_loss_of(model: torch.nn.Module, wished: float | None = None) -> tuple[LMLoss, list[str]]:
    lines: list[str] = []
    lm_loss = prepare_lm_loss(model, lines.append, vocab_size=64)
    prepare_balance(lm_loss, lines.append, wished, vocab_size=64)
    return lm_loss, lines


def sequences(lengths: list[int]) -> list[OrderedSequence]:
    return [OrderedSequence(0, [TokenRange(0, 10 * row, length)]) for row, length in enumerate(lengths)]


def switch_loss(probabilities_TE: np.ndarray, chosen_TC: np.ndarray) -> float:
    """Equations 4 to 6 of arXiv:2101.03961, token by token, for one sequence without padding."""
    num_experts, assignments = probabilities_TE.shape[1], chosen_TC.size
    total = 0.0
    for expert in range(num_experts):
        dispatched = sum(1 for choices in chosen_TC for choice in choices if choice == expert) / assignments
        mean = sum(float(row[expert]) for row in probabilities_TE) / len(probabilities_TE)
        total += dispatched * mean
    return num_experts * total


def reference(model: torch.nn.Module, batch: Batch, chosen: int = 2) -> list[float]:
    """Per layer, the loss of the whole batch per token: from the logits that transformers' model returns, without padding."""
    totals: list[float] = []
    assert batch.row_tokens is not None
    for row, count in enumerate(batch.row_tokens.tolist()):
        if count == 0:
            continue
        with torch.no_grad():
            output = model(input_ids=batch.input_ids[row : row + 1, :count], output_router_logits=True, use_cache=False)
        layers = [logits.double().softmax(-1) for logits in output.router_logits]
        values = [count * switch_loss(p.numpy(), p.topk(chosen, dim=-1).indices.numpy()) for p in layers]
        totals = [a + b for a, b in zip(totals or [0.0] * len(values), values, strict=True)]
    return [total / int(batch.row_tokens.sum()) for total in totals]


@pytest.mark.parametrize("lengths", [[16, 16, 16], [16, 5, 9]])
def test_each_layer_is_the_switch_formula_over_sequences_without_padding(lengths: list[int]) -> None:
    model = uneven(MIXTRAL)
    alone = copy.deepcopy(model)
    lm_loss, _ = lm_loss_of(model)
    batch = make_batch(sequences(lengths), [Documents()], LENGTH)
    routing = lm_loss(batch).routing
    assert routing is not None
    expected = reference(alone, batch)
    torch.testing.assert_close((routing.losses / sum(lengths)).tolist(), expected, rtol=1e-5, atol=0)
    assert [float(counts.sum()) for counts in routing.counts] == [2.0 * sum(lengths)] * 2
    assert min(expected) > 1.02  # uneven, so that a constant would not pass


def test_what_padding_holds_changes_nothing() -> None:
    lm_loss, _ = lm_loss_of(uneven(MIXTRAL))
    one, other = (make_batch(sequences([16, 5]), [Documents()], LENGTH, pad_id=pad_id) for pad_id in (0, 33))
    assert torch.equal(lm_loss(one).routing.losses, lm_loss(other).routing.losses)
    assert lm_loss(empty_batch(LENGTH)).routing.losses.tolist() == [0.0, 0.0]


def test_the_gradient_is_that_of_transformers_where_its_loss_is_right() -> None:
    """One layer and one sequence: its mean over layers is then no fault. Its f adds up to 2, the experts of a token."""
    mapping = {**MIXTRAL, "num_hidden_layers": 1}
    model = uneven(mapping)
    alone = copy.deepcopy(model)
    lm_loss, _ = lm_loss_of(model, wished=0.5 * 2)
    engine = TorchEngine(
        ModelRunner(lm_loss, torch.device("cpu"), "fp32"), build_optimizer(model, OptimizerConfig()), max_grad_norm=None
    )
    order = sequences([LENGTH])
    step = StepBatches(
        [make_batch(order, [Documents()], LENGTH)], count_step(order, LENGTH, [Documents.document_lengths])
    )
    kept: dict[str, Tensor] = {}

    def keep(loss: float, grad_norm: float) -> bool:
        kept.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return False

    numbers = engine.train_step(step, 1.0, keep).numbers()
    batch = step.batches[0]
    output = alone(input_ids=batch.input_ids, output_router_logits=True, use_cache=False)
    cross_entropy = torch.nn.functional.cross_entropy(output.logits[0], batch.labels[0])
    (cross_entropy + 0.5 * output.aux_loss).backward()
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(kept[name], parameter.grad, rtol=1e-3, atol=1e-6)
    assert numbers.loss == pytest.approx(float(cross_entropy.detach()), rel=1e-5)  # the balancing loss is not in it
    assert numbers.balance_losses == pytest.approx([float(output.aux_loss.detach()) / 2], rel=1e-5)


def test_transformers_calls_layers_even_that_are_uneven_in_opposite_ways() -> None:
    first = torch.tensor([[3.0, 0.0]]).repeat(8, 1)  # every token to expert 0, in the other layer to expert 1
    layers = [first, first.flip(1)]
    theirs = float(load_balancing_loss_func(tuple(layers), num_experts=2, top_k=1))
    mask = torch.ones(1, 8, dtype=torch.bool)
    ours = [
        float(balancing_loss(probabilities(logits, "softmax"), logits.topk(1).indices, mask)[0]) / 8
        for logits in layers
    ]
    assert theirs == pytest.approx(1.0)  # as if every expert got the same
    assert ours == pytest.approx([2 * float(first.softmax(-1)[0, 0])] * 2)


def losses_and_gradients(micro_batch: int, checkpointed: bool = False) -> tuple[list[Any], dict[str, Tensor]]:
    model = uneven(MIXTRAL)
    if checkpointed:
        checkpoint_layers(model, lambda line: None, "full")
    lm_loss, _ = lm_loss_of(model)
    engine = TorchEngine(
        ModelRunner(lm_loss, torch.device("cpu"), "fp32"), build_optimizer(model, OptimizerConfig()), max_grad_norm=None
    )
    order = sequences([16, 5, 9, 16])
    parts = [order[start : start + micro_batch] for start in range(0, 4, micro_batch)]
    batches = [make_batch(part, [Documents()], LENGTH) for part in parts]
    gradients: dict[str, Tensor] = {}

    def keep(loss: float, grad_norm: float) -> bool:
        gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return False

    counts = count_step(order, LENGTH, [Documents.document_lengths])
    numbers = engine.train_step(StepBatches(batches, counts), 1.0, keep).numbers()
    assert len(numbers.sequence_losses) == 4
    return [
        numbers.loss,
        *numbers.balance_losses,
        *(load for layer in numbers.expert_loads for load in layer),
    ], gradients


@pytest.mark.parametrize(("micro_batch", "checkpointed"), [(1, False), (2, False), (4, True)])
def test_micro_batches_and_checkpointed_layers_change_nothing(micro_batch: int, checkpointed: bool) -> None:
    expected, expected_gradients = losses_and_gradients(4)
    numbers, gradients = losses_and_gradients(micro_batch, checkpointed)
    assert numbers == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-6)


def test_a_coefficient_of_the_configuration_and_of_the_model() -> None:
    lm_loss, lines = lm_loss_of(uneven(MIXTRAL))
    assert lm_loss.balance_coefficient == 0.5
    assert "0.5 (router_aux_loss_coef of the model)" in lines[-1]
    lm_loss, lines = lm_loss_of(uneven(MIXTRAL), wished=0.0)
    assert lm_loss.balance_coefficient == 0
    assert "no balancing loss, because model.balance_loss is 0" in lines[-1]
    model = uneven(MIXTRAL)
    for router in find_routers(model):
        router.module.requires_grad_(False)
    assert "routers are not trained" in lm_loss_of(model)[1][-1]
    dense = {**MIXTRAL, "model_type": "llama"}
    del dense["num_local_experts"], dense["router_aux_loss_coef"]
    assert lm_loss_of(build_fresh(dense, None, 0))[1] == []
    with pytest.raises(ConfigError, match="no router of experts"):
        lm_loss_of(build_fresh(dense, None, 0), wished=0.01)


@pytest.mark.parametrize("spread", [0.02, 1.0])
def test_sigmoid_routers_that_are_balanced_by_a_bias_get_no_loss_unless_asked(spread: float) -> None:
    model = build_fresh({**SIGMOID, "initializer_range": spread}, None, seed=0)
    lm_loss, lines = lm_loss_of(model)
    assert lm_loss.balance_coefficient == 0
    assert "glm4_moe balances its experts by a bias" in lines[-1]
    assert lm_loss.routing is not None
    assert lm_loss.routing.scoring == ["sigmoid"]  # the first layer is dense
    batch = make_batch(sequences([16]), [Documents()], LENGTH)
    [counts] = lm_loss(batch).routing.counts
    assert float(counts.sum()) == 2 * 16
    logits_NE = torch.tensor([[2.0, -1.0, 0.0]])
    expected = logits_NE.sigmoid() / logits_NE.sigmoid().sum()  # arXiv:2412.19437, equation 19
    torch.testing.assert_close(probabilities(logits_NE, "sigmoid"), expected)
    assert lm_loss_of(model, wished=0.01)[0].balance_coefficient == 0.01


def test_experts_are_known_by_their_tensors() -> None:
    assert [(experts.name, experts.count) for experts in find_experts(uneven(MIXTRAL))] == [
        ("model.layers.0.mlp.experts", 4),
        ("model.layers.1.mlp.experts", 4),
    ]
