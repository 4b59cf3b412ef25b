"""Training loss by source: by hand, and equal to the total through the real engine, however a step is cut into micro-batches."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steep.batch import IGNORE_INDEX, Batch, StepBatches
from steep.config.load import load_run_config
from steep.loader import empty_batch, make_batch
from steep.metrics import SourceTotals
from steep.models.attention_choice import prepare_lm_loss
from steep.models.document_attention import enable_document_attention
from steep.models.fresh import build_fresh
from steep.models.lm_loss import LMLoss
from steep.models.runner import ModelRunner
from steep.order.batches import StepCounts, label_tokens
from steep.order.data_order import OrderedSequence
from steep.order.packing import TokenRange
from steep.training.engine import TorchEngine
from steep.training.loop import train
from steep.training.meter import losses_by_source
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
    counts = StepCounts(32, [0, 1, 0, 2], [11, 5, 31, 1], [10, 4, 30, 0])
    assert losses_by_source(["a", "b", "c", "d"], counts, [20.0, 8.0, 100.0, 0.0]) == {
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
    """Equal to scoring the batch apart, by sequence and in all; the row with two tokens has one label."""
    lm_loss = LMLoss(build_fresh(LLAMA, None, 0), "document", has_head)
    enable_document_attention(lm_loss.model)
    [batch] = batches([7])
    loss, losses_B, _ = lm_loss(batch)
    torch.testing.assert_close(losses_B, lm_loss.token_losses(batch).sum(1))
    torch.testing.assert_close(loss, losses_B.sum())
    assert loss.requires_grad
    assert not losses_B.requires_grad
    assert losses_B[6] > 0
    assert int((batch.labels[6] != IGNORE_INDEX).sum()) == 1  # two tokens and padding


def test_counts_are_those_of_the_labels() -> None:
    [batch] = batches([7])
    lengths = [STORES[sequence.source].document_lengths for sequence in planned()]
    found = [label_tokens(*row, document_mask=True) for row in zip(planned(), lengths, strict=True)]
    assert found == (batch.labels != IGNORE_INDEX).sum(1).tolist()


def counted(micro_batches: list[Batch]) -> StepBatches:
    """The batches of all seven sequences with the counts of the step."""
    labels = [label_tokens(s, STORES[s.source].document_lengths, document_mask=True) for s in planned()]
    sources, tokens = [s.source for s in planned()], [s.num_tokens for s in planned()]
    return StepBatches(micro_batches, StepCounts(LENGTH, sources, tokens, labels))


def make_engine() -> tuple[TorchEngine, LMLoss]:
    lm_loss = prepare_lm_loss(build_fresh(LLAMA, None, 0), print, vocab_size=512)
    optimizer = torch.optim.SGD(lm_loss.model.parameters(), lr=0.0)
    return TorchEngine(ModelRunner(lm_loss, torch.device("cpu"), "fp32"), optimizer, max_grad_norm=None), lm_loss


@pytest.mark.parametrize("sizes", [[7], [3, 3, 1], [1] * 7])
def test_the_weighted_mean_is_the_total_and_micro_batches_do_not_change_it(sizes: list[int]) -> None:
    engine, lm_loss = make_engine()
    step = counted(batches(sizes))
    numbers = engine.train_step(step, 1.0).numbers()
    by_source = losses_by_source(["a", "b"], step.counts, numbers.sequence_losses)
    tokens = {name: int(loss["label_tokens"]) for name, loss in by_source.items()}
    assert tokens == {"a": 9 + 13 + 4 + 23 + 1, "b": 24 + 5 + 2 + 20}
    mean = sum(loss["nats_per_token"] * loss["label_tokens"] for loss in by_source.values()) / sum(tokens.values())
    assert abs(mean - numbers.loss) < 1e-6

    reference = dict.fromkeys(by_source, 0.0)
    for sequence, name in zip(planned(), "abbaaba", strict=True):
        reference[name] += float(lm_loss.token_losses(make_batch([sequence], STORES, LENGTH)).double().sum())
    for name, total in reference.items():
        assert by_source[name]["nats_per_token"] == pytest.approx(total / tokens[name], rel=1e-5)


def test_a_batch_without_sequences_changes_neither_losses_nor_gradients() -> None:
    """What a rank runs in the short last step when its share of it is empty."""
    results = []
    for extra in ([], [empty_batch(LENGTH)]):
        engine, _ = make_engine()
        numbers = engine.train_step(counted([*batches([3, 4]), *extra]), 1.0).numbers()
        results.append((numbers.loss, numbers.grad_norm, numbers.sequence_losses))
    assert results[0] == results[1]


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
