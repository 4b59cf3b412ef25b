"""The whole loop against an outside reference: transformers' model, torch's loss and torch's AdamW."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from steep.config.load import load_run_config
from steep.core.errors import TrainingError
from steep.core.say import say_nothing
from steep.data.open import open_run_data
from steep.models.load import load_model
from steep.optim.schedule import multiplier
from steep.tokenizer.open import load_tokenizer
from steep.training.loop import train
from support import losses, run_mapping


def reference_losses(mapping: dict) -> list[float]:
    """The same run written out with transformers and torch alone: each document by itself, losses summed, one AdamW."""
    config = load_run_config(mapping=mapping)
    tokenizer = load_tokenizer(config.tokenizer, config.model)
    data = open_run_data(config, tokenizer, say_nothing)
    model = load_model(config.model, seed=config.run.seed)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95), foreach=False, fused=False,
    )  # fmt: skip
    found = []
    for step in range(config.train.steps):
        total, count = torch.zeros(()), 0
        for index in range(4 * step, 4 * step + 4):
            planned = data.order.sequence(index)
            store = data.stores[planned.source]
            for part in planned.ranges:
                document = torch.from_numpy(store.document(part.document))
                ids = document[part.start : part.start + part.count]
                labels = document[part.start + 1 : part.start + part.count + 1]
                logits = model(input_ids=ids[None]).logits[0, : len(labels)]
                total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                count += len(labels)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * multiplier(step, config.train.steps, config.schedule)
        optimizer.step()
        optimizer.zero_grad()
        found.append((total / count).item())
    return found


def test_losses_equal_transformers_and_torch(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, train={"steps": 12})
    result = train(load_run_config(mapping=mapping), stream=io.StringIO())
    ours = [loss for _, loss, _ in losses(result.run_directory)]
    assert ours == pytest.approx(reference_losses(mapping), rel=1e-5)
    assert result.after["heldout"]["bits_per_byte"] < result.before["heldout"]["bits_per_byte"]


def test_micro_batches_do_not_change_the_loss(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    found = []
    for micro_batch_size in (4, 2, 1):
        mapping = run_mapping(
            tmp_path, corpus_directory, tiny_tokenizer_directory,
            run={"name": f"micro{micro_batch_size}"}, train={"micro_batch_size": micro_batch_size},
        )  # fmt: skip
        found.append(losses(train(load_run_config(mapping=mapping), stream=io.StringIO()).run_directory))
    for other in found[1:]:
        assert [loss for _, loss, _ in other] == pytest.approx([loss for _, loss, _ in found[0]], rel=1e-5)
        assert [norm for *_, norm in other] == pytest.approx([norm for *_, norm in found[0]], rel=1e-4)


def test_a_resumed_run_keeps_the_micro_batch_that_it_started_with(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    """`auto` would be the whole batch of four now; a run that was started with two goes on with two, bit for bit."""

    def run(name: str, **settings: Any) -> Path:
        mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, run={"name": name}, train=settings)
        return train(load_run_config(mapping=mapping), stream=io.StringIO()).run_directory

    def chosen(directory: Path) -> Any:
        return load_run_config(directory / "config.yaml").train.micro_batch_size

    assert chosen(run("fresh", steps=1)) == 4
    whole, parts = run("whole", micro_batch_size=2), run("parts", micro_batch_size=2, max_seconds=1e-6)
    assert run("parts", micro_batch_size="auto") == parts
    assert chosen(parts) == 2
    assert losses(parts) == losses(whole)
    assert "to rounding" not in (parts / "console.log").read_text()


@pytest.mark.parametrize("precision", ["mixed_bf16", "bf16"])
def test_other_precisions_train(
    precision: str, tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    mapping = run_mapping(
        tmp_path, corpus_directory, tiny_tokenizer_directory, train={"precision": precision, "steps": 3}
    )
    exact = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, run={"name": "exact"}, train={"steps": 3})
    ours, truth = (
        losses(train(load_run_config(mapping=m), stream=io.StringIO()).run_directory) for m in (mapping, exact)
    )
    # bf16 has 8 bits of mantissa: the first loss, before any update, is right to a few of its last places.
    assert ours[0][1] == pytest.approx(truth[0][1], rel=1e-2)


def test_nan_stops_the_run_and_poisons_no_checkpoint(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    mapping = run_mapping(
        tmp_path,
        corpus_directory,
        tiny_tokenizer_directory,
        optimizer={"learning_rate": 1e30},
        checkpoint={"every_steps": 1},
    )
    with pytest.raises(TrainingError, match=r"(?s)step \d: the loss is .* gradient norm nan.*sequences \d+ to \d+"):
        train(load_run_config(mapping=mapping), stream=io.StringIO())
    run = tmp_path / "runs" / "small"
    for checkpoint in (run / "checkpoints").glob("epoch_*"):
        from steep.checkpoint.load import load_tensors

        for name, tensor in load_tensors(checkpoint, "model").items():
            assert torch.isfinite(tensor).all(), f"{checkpoint.name}: {name}"
