"""The chunked loss against torch's cross-entropy on whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steep.loss import linear_cross_entropy


def reference(hidden, weight, labels, bias=None, softcap=None, multiplier=1.0):
    logits = F.linear(hidden, weight, bias) * multiplier
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def relative(left, right) -> float:
    left, right = left.detach(), right.detach()
    return float((left.double() - right.double()).abs().max() / right.double().abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("rows", [1, 64, 130])
@pytest.mark.parametrize("chunk_rows", [1, 32, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("settings", [{}, {"softcap": 5.0}, {"multiplier": 0.25}, {"softcap": 5.0, "multiplier": 3.0}])
def test_fp32_equals_whole_logits_to_1e_5(rows, chunk_rows, with_bias, settings):
    generator = torch.Generator().manual_seed(rows)
    vocab, width = 1003, 48
    tensors = [torch.randn(rows, width, generator=generator), torch.randn(vocab, width, generator=generator) * 0.3]
    if with_bias:
        tensors.append(torch.randn(vocab, generator=generator))
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[-1] = vocab - 1
    if rows > 1:
        labels[::7] = -100
    ours = [tensor.clone().requires_grad_() for tensor in tensors]
    truth = [tensor.double().requires_grad_() for tensor in tensors]
    loss, _ = linear_cross_entropy(
        ours[0], ours[1], labels, bias=ours[2] if with_bias else None, chunk_bytes=chunk_rows * vocab * 4, **settings
    )
    expected = reference(truth[0], truth[1], labels, truth[2] if with_bias else None, **settings)
    loss.backward()
    expected.backward()
    assert relative(loss, expected) < 1e-5
    for mine, other in zip(ours, truth, strict=True):
        assert mine.grad.dtype == torch.float32
        assert relative(mine.grad, other.grad) < 1e-5


def test_a_tied_weight_gets_both_gradients():
    torch.manual_seed(0)
    embedding = nn.Embedding(101, 16)
    ids, labels = torch.randint(0, 101, (37,)), torch.randint(0, 101, (37,))
    linear_cross_entropy(embedding(ids).tanh(), embedding.weight, labels, chunk_bytes=4000)[0].backward()
    mine = embedding.weight.grad.clone()
    embedding.weight.grad = None
    reference(embedding(ids).tanh(), embedding.weight, labels).backward()
    assert relative(mine, embedding.weight.grad) < 1e-5


@pytest.mark.parametrize("pure", [False, True])
def test_bf16_is_within_its_rounding_of_the_truth(pure):
    """Loss to 1e-3: logits are rounded to 8 bits each, which averages out; gradients to 2 %, as plain autocast's are."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(96, 32, generator=generator)
    weight = torch.randn(997, 32, generator=generator) * 0.3
    labels = torch.randint(0, 997, (96,), generator=generator)
    truth = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    expected = reference(*truth, labels)
    expected.backward()
    dtype = torch.bfloat16 if pure else torch.float32
    ours = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not pure):
        loss, _ = linear_cross_entropy(*ours, labels, chunk_bytes=20 * 997 * 2)
    loss.backward()
    assert loss.dtype == torch.float32
    assert relative(loss.detach(), expected) < 1e-3
    for mine, other in zip(ours, truth, strict=True):
        assert mine.grad.dtype == dtype
        assert relative(mine.grad, other.grad) < 2e-2
