"""Training loss by source: by hand, and equal to the total through the real engine, however a step is cut into micro-batches."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steep.batch import IGNORE_INDEX, Batch
from steep.config.load import load_run_config
from steep.core.say import tell
from steep.loader import make_batch
from steep.metrics import SourceTotals
from steep.models.attention_choice import prepare_lm_loss
from steep.models.fresh import build_fresh
from steep.models.lm_loss import LMLoss
from steep.order.data_order import OrderedSequence
from steep.order.packing import TokenRange
from steep.training.engine import TorchEngine
from steep.training.loop import train
from steep.training.source_losses import StepSources, step_sources
from support import LLAMA, run_mapping, train_lines

LENGTH = 24


class Documents:
    """A store of random documents."""

    text_bytes = None

    def __init__(self, seed: int, lengths: list[int]):
        generator = np.random.default_rng(seed)
        self.tokens = [generator.integers(0, 512, length) for length in lengths]
        self.document_lengths = np.array(lengths)

    def read(self, document: int, start: int, count: int, out: Any) -> None:
        out[:] = self.tokens[document][start : start + count]


def planned() -> list[OrderedSequence]:
    """Seven sequences of two sources: documents packed, cut, and with padding behind them."""
    rows = [
        (0, [(0, 0, 10), (1, 0, 14)]), (1, [(0, 0, 24)]), (1, [(0, 24, 6)]), (0, [(2, 0, 5)]),
        (0, [(3, 0, 24)]), (1, [(1, 0, 3), (2, 0, 21)]), (0, [(4, 0, 2)]),
    ]  # fmt: skip
    return [OrderedSequence(source, [TokenRange(*part) for part in parts]) for source, parts in rows]


STORES = [Documents(1, [10, 14, 5, 24, 2]), Documents(2, [30, 3, 21])]


def batches(sizes: list[int]) -> list[Batch]:
    sequences, start, made = planned(), 0, []
    for size in sizes:
        made.append(make_batch(sequences[start : start + size], STORES, LENGTH))
        start += size
    return made


def test_means_by_hand() -> None:
    sources = StepSources([0, 1, 0, 2], [10, 4, 30, 0])
    assert sources.losses(["a", "b", "c", "d"], [20.0, 8.0, 100.0, 0.0]) == {
        "a": {"nats_per_token": 3.0, "label_tokens": 40},
        "b": {"nats_per_token": 2.0, "label_tokens": 4},
    }


def test_totals_over_steps_by_hand() -> None:
    totals = SourceTotals()
    assert totals.mean() is None
    for a, b in ((2.0, 1), (4.0, 3)):
        totals.add({"loss_by_source": {"a": {"nats_per_token": a, "label_tokens": b}}})
    totals.add({"loss_by_source": {"b": {"nats_per_token": 1.0, "label_tokens": 4}}})
    totals.add({"loss_by_source": {"b": {"nats_per_token": None, "label_tokens": 4}}})  # a line that was not finite
    totals.add({"loss": 1.0})
    assert totals.means() == {"a": (3.5, 4), "b": (1.0, 4)}
    assert totals.mean() == 2.25


@pytest.mark.parametrize("has_head", [True, False])
def test_the_sums_of_sequences_come_from_the_training_forward(has_head: bool) -> None:
    """Equal to scoring the batch apart, and the loss with its gradients is what it was without them."""
    model = build_fresh(LLAMA, None, 0)
    lm_loss = LMLoss(model, prepare_lm_loss(model, tell).attention, has_head)
    [batch] = batches([7])
    loss, losses_B = lm_loss(batch)
    torch.testing.assert_close(losses_B, lm_loss.token_losses(batch).sum(1))
    assert not losses_B.requires_grad
    assert losses_B[6] > 0
    assert int((batch.labels[6] != IGNORE_INDEX).sum()) == 1  # two tokens and padding
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = torch.autograd.grad(lm_loss(batch)[0], list(model.parameters()))
    assert all(torch.equal(given, wanted) for given, wanted in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("sizes", [[7], [3, 3, 1], [1] * 7])
def test_the_weighted_mean_is_the_total_and_micro_batches_do_not_change_it(sizes: list[int]) -> None:
    model = build_fresh(LLAMA, None, 0)
    lm_loss = prepare_lm_loss(model, tell)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = TorchEngine(model, lm_loss, optimizer, device=torch.device("cpu"), max_grad_norm=None)
    step = batches(sizes)
    result = engine.train_step(step, 1.0)
    by_source = step_sources(step).losses(["a", "b"], result.sequence_losses.tolist())
    tokens = {name: int(loss["label_tokens"]) for name, loss in by_source.items()}
    assert tokens == {"a": 9 + 13 + 4 + 23 + 1, "b": 24 + 5 + 2 + 20}
    mean = sum(loss["nats_per_token"] * loss["label_tokens"] for loss in by_source.values()) / sum(tokens.values())
    assert abs(mean - float(result.loss)) < 1e-6

    reference = dict.fromkeys(by_source, 0.0)
    for sequence, name in zip(planned(), "abbaaba", strict=True):
        reference[name] += float(lm_loss.token_losses(make_batch([sequence], STORES, LENGTH)).double().sum())
    for name, total in reference.items():
        assert by_source[name]["nats_per_token"] == pytest.approx(total / tokens[name], rel=1e-5)


def test_a_run_writes_it_in_every_line_and_shows_it(
    tmp_path: Path, documents: list[str], tiny_tokenizer_directory: Path
) -> None:
    for name, texts in (("first", documents[:20]), ("second", documents[20:40])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    sources = [{"path": str(tmp_path / f"{name}.jsonl"), "name": name} for name in ("first", "second")]
    mapping = run_mapping(
        tmp_path,
        tmp_path,
        tiny_tokenizer_directory,
        data={"train": [{**sources[0], "weight": 0.75}, {**sources[1], "weight": 0.25}]},
        train={"global_batch_size": 8, "micro_batch_size": 2},
        report={"enabled": True},
    )
    console = io.StringIO()
    run = train(load_run_config(mapping=mapping), stream=console).run_directory
    lines_of_run = train_lines(run)
    for line in lines_of_run:
        parts = line["loss_by_source"].values()
        tokens = sum(part["label_tokens"] for part in parts)
        assert abs(sum(part["nats_per_token"] * part["label_tokens"] for part in parts) / tokens - line["loss"]) < 1e-6
    assert {name for line in lines_of_run for name in line["loss_by_source"]} == {"first", "second"}
    assert "training loss by source, steps 0 to 5: first " in console.getvalue()
    assert "Training loss by source" in (run / "report.html").read_text()
