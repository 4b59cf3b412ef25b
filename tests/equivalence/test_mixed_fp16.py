"""Training in fp16 with a loss scale: steps that overflow are said, counted and left out, and a resumed run is exact."""

from __future__ import annotations

from pathlib import Path

import pytest

import steep
from steep.core.files import read_json
from steep.training import loss_scale
from support import losses, run_mapping, train_lines


def test_overflows_are_said_and_counted_and_resume_is_exact(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", 2.0**30)  # so that the first steps overflow for certain
    length = {"steps": 16, "precision": "mixed_fp16"}
    mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, train=length)
    mapping["checkpoint"] = {"every_steps": 4}
    whole = steep.train(mapping).run_directory

    lines = train_lines(whole)
    overflows = [line for line in lines if line["overflow"]]
    assert 4 < len(overflows) < 12  # some on both sides of a checkpoint
    assert [line["loss_scale"] for line in overflows] == [2.0 ** (30 - n) for n in range(len(overflows))]
    assert all(line["skipped"] for line in overflows)
    log = (whole / "console.log").read_text()
    assert log.count("a gradient overflowed fp16 at a loss scale of") == len(overflows)
    assert f"{len(overflows)} of 16 steps made no update" in log
    assert "spike" not in log

    summary, ledger = read_json(whole / "summary.json"), read_json(whole / "ledger.json")
    assert summary["overflowed_steps"] == len(overflows)
    [source], num_trained = ledger["sources"], 16 - len(overflows)
    assert lines[-1]["tokens"] == summary["tokens"] == source["tokens_trained"]
    assert (
        source["tokens_trained"] + ledger["padding_tokens"] == num_trained * 4 * 64
    )  # padded at a cut of a held-out block
    assert source["tokens_skipped"] == len(overflows) * 4 * 64
    assert [line["sequences"] for line in lines] == [4 * (n + 1) for n in range(16)]

    mapping["run"]["name"] = "resumed"
    half = {**mapping, "train": {**mapping["train"], "max_seconds": 0}}
    for _ in range(3):  # one step per process
        steep.train(half)
    resumed = steep.train(mapping, resume=True).run_directory
    assert losses(resumed) == losses(whole)
    assert [line["learning_rate"] for line in train_lines(resumed)] == [line["learning_rate"] for line in lines]
    for name in ("model/rank_00000.safetensors", "optim/rank_00000.safetensors", "optim/state.json"):
        files = [next(run.glob(f"checkpoints/*_step_16/{name}")).read_bytes() for run in (whole, resumed)]
        assert files[0] == files[1]
