"""The chunked loss: gradients by finite differences, edges, and what it must not do."""

from __future__ import annotations

import pytest
import torch

from steep.loss import linear_cross_entropy

SETTINGS = [{}, {"softcap": 2.0}, {"multiplier": 0.3}, {"softcap": 1.5, "multiplier": 1.7}]


def summed(*arguments, **settings):
    """The sum alone, which has gradients."""
    return linear_cross_entropy(*arguments, **settings)[0]


def inputs(rows=13, width=8, vocab=11, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(vocab, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    return hidden, weight, bias, labels


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_by_finite_differences(settings):
    hidden, weight, bias, labels = inputs()
    labels[3] = -100

    def loss(hidden, weight, bias):
        return summed(hidden, weight, labels, bias=bias, chunk_bytes=400, **settings)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_all_labels_ignored_gives_zero_loss_and_zero_gradients():
    hidden, weight, bias, labels = inputs(dtype=torch.float32)
    loss = summed(hidden, weight, torch.full_like(labels, -100), bias=bias)
    loss.backward()
    assert loss.item() == 0
    assert loss.dtype == torch.float32
    for tensor in (hidden, weight, bias):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, bias, labels = inputs()
    summed(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None
    assert weight.grad is None
    summed(hidden.detach(), weight, labels, bias=bias.detach()).backward()
    assert weight.grad is not None
    assert bias.grad is None
    with torch.no_grad():
        assert not summed(hidden, weight, labels).requires_grad


def test_the_graph_can_be_kept_and_the_gradient_is_scaled_by_what_comes_in():
    hidden, weight, _, labels = inputs()
    loss = summed(hidden, weight, labels) * 3
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (single,) = torch.autograd.grad(summed(hidden, weight, labels), weight)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, 3 * single)


def test_token_losses_add_up_and_ignored_ones_are_zero():
    hidden, weight, bias, labels = inputs(dtype=torch.float32)
    labels[::4] = -100
    _, losses = linear_cross_entropy(hidden, weight, labels, bias=bias, softcap=3.0, chunk_bytes=100)
    with torch.no_grad():
        _, scored = linear_cross_entropy(hidden, weight, labels, bias=bias, softcap=3.0, chunk_bytes=100)
    assert torch.equal(scored, losses)
    assert losses.dtype == torch.float32
    assert not losses.requires_grad
    assert torch.equal(losses == 0, labels == -100)
    total = summed(hidden, weight, labels, bias=bias, softcap=3.0, chunk_bytes=10_000)
    torch.testing.assert_close(losses.sum(), total.detach())


def test_logits_never_exist_whole():
    """The largest tensor that the call allocates is the gradient of the weight, not rows x vocabulary."""
    hidden, weight, _, labels = inputs(rows=4096, width=4, vocab=2048, dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        summed(hidden, weight, labels, chunk_bytes=1 << 20).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    allocated = [event.self_cpu_memory_usage // max(1, event.count) for event in profile.key_averages()]
    assert max(allocated) <= 4 << 20, largest
    assert 4096 * 2048 * 4 > 32 << 20 - 1


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    loss = summed(hidden, weight, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()
