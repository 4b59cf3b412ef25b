"""Loss spikes: seen, named, skipped and rolled back from, with the order and the ledger exact and a crash changing nothing."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from steep.config.load import load_run_config
from steep.core.errors import ConfigError, TrainingError
from steep.training.loop import train
from steep.training.result import TrainResult
from steep.training.spikes import FEWEST_STEPS, spike_threshold
from support import losses, run_mapping

STEP_TOKENS, POISONED_STEP, STEPS = 256, 40, 56


def test_the_threshold_is_six_scaled_deviations_above_the_median() -> None:
    quiet = [2.0] * FEWEST_STEPS
    assert spike_threshold(quiet[:-1]) is None
    assert spike_threshold(quiet) == pytest.approx(2.2)  # no less than a tenth above
    noisy = [1.0, 3.0] * FEWEST_STEPS
    assert spike_threshold(noisy) == pytest.approx(2.0 + 6 * 1.4826)
    assert spike_threshold([*noisy, 1000.0, 1000.0]) == pytest.approx(
        3.0 + 6 * 1.4826 * 2.0, rel=0.6
    )  # outliers hardly count


@pytest.fixture
def poisoned(tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path) -> dict[str, Any]:
    """A run whose step 40 trains on noise alone: characters drawn at random."""
    noise = random.Random(1)
    text = "".join(chr(noise.randrange(0x3040, 0x9FFF)) for _ in range(3000))
    (tmp_path / "noise.txt").write_text(text, encoding="utf-8")
    mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory)
    mapping["data"]["train"] = [
        {"path": str(corpus_directory), "name": "good", "weight": 1.0},
        {"path": str(tmp_path / "noise.txt"), "name": "noise", "weight": 0.0},
    ]
    mapping["data"]["validation"] = {}
    mapping["data"]["phases"] = [
        {"from_tokens": POISONED_STEP * STEP_TOKENS, "weights": {"good": 0.0, "noise": 1.0}},
        {"from_tokens": (POISONED_STEP + 1) * STEP_TOKENS, "weights": {"good": 1.0, "noise": 0.0}},
    ]
    mapping["train"] |= {"steps": STEPS}
    mapping["optimizer"] = {"learning_rate": 3e-3}
    mapping["checkpoint"] = {"every_steps": 15, "keep_last": 9}
    return mapping


class Bomb(io.StringIO):
    """A terminal that goes away, with the process, at a certain line."""

    def __init__(self, line: str):
        super().__init__()
        self.line = line

    def write(self, text: str) -> int:
        if self.line in text:
            raise RuntimeError("crashed")
        return super().write(text)


def run(mapping: dict[str, Any], mode: str, name: str | None = None, stream: Any = None) -> tuple[TrainResult, str]:
    changed = {**mapping, "run": {**mapping["run"], "name": name or mode}}
    changed["train"] = {**mapping["train"], "on_spike": mode}
    stream = stream or io.StringIO()
    return train(load_run_config(mapping=changed), stream=stream), stream.getvalue()


def ledger(result: TrainResult) -> dict[str, Any]:
    return json.loads((result.run_directory / "ledger.json").read_text())


def weights(result: TrainResult) -> bytes:
    return (result.run_directory / f"checkpoints/epoch_0_step_{STEPS}/model/rank_00000.safetensors").read_bytes()


def check_ledger(found: dict[str, Any]) -> None:
    """Every token of the run was trained or skipped."""
    tokens = sum(source["tokens_trained"] + source["tokens_skipped"] for source in found["sources"])
    assert tokens + found["padding_tokens"] == STEPS * STEP_TOKENS


def test_a_spike_is_logged_with_its_sequences_and_documents(poisoned: dict[str, Any]) -> None:
    result, text = run(poisoned, "continue")
    [spike] = ledger(result)["spikes"]
    assert (spike["step"], spike["action"]) == (POISONED_STEP, "logged")
    assert spike["loss"] > spike["threshold"]
    assert spike["sequences"] == [4 * POISONED_STEP, 4 * POISONED_STEP + 3]
    assert spike["documents"] == {"noise": [0]}
    assert f"loss spike at step {POISONED_STEP} (logged)" in text
    check_ledger(ledger(result))
    assert ledger(result)["sources"][1]["tokens_trained"] == STEP_TOKENS


@pytest.mark.parametrize("mode", ["skip", "rollback"])
def test_the_run_recovers_and_the_ledger_says_what_was_passed_over(poisoned: dict[str, Any], mode: str) -> None:
    result, text = run(poisoned, mode)
    found = ledger(result)
    check_ledger(found)
    assert found["sources"][1]["tokens_trained"] == 0
    assert found["sources"][1]["tokens_skipped"] == STEP_TOKENS
    clean = {**poisoned, "data": {**poisoned["data"], "phases": []}}
    end = losses(run(clean, "continue", "clean")[0].run_directory)[-5:]
    mine = losses(result.run_directory)[-5:]
    assert [step for step, _, _ in mine] == [step for step, _, _ in end]
    assert sum(loss for _, loss, _ in mine) / 5 == pytest.approx(sum(loss for _, loss, _ in end) / 5, rel=0.03)
    if mode == "rollback":
        [back] = found["rollbacks"]
        assert (back["from_step"], back["first_step"], back["last_step"]) == (30, 33, POISONED_STEP)
        assert "rolling back to step 30" in text
        assert found["sources"][0]["tokens_skipped"] == 7 * STEP_TOKENS
        assert {step for step, _, _ in losses(result.run_directory)} == set(range(STEPS)) - set(range(33, 41))
    else:
        assert not found["rollbacks"]
        assert found["sources"][0]["tokens_skipped"] == 0


@pytest.mark.parametrize("mode", ["skip", "rollback"])
@pytest.mark.parametrize("line", ["loss spike at step", "step 44/"])
def test_a_crash_around_a_spike_changes_nothing(poisoned: dict[str, Any], mode: str, line: str) -> None:
    whole, _ = run(poisoned, mode)
    with pytest.raises(RuntimeError, match="crashed"):
        run(poisoned, mode, "crashed", Bomb(line))
    again, _ = run(poisoned, mode, "crashed")
    assert losses(again.run_directory) == losses(whole.run_directory)
    assert weights(again) == weights(whole)
    mine, other = ledger(again), ledger(whole)
    assert mine["sources"] == other["sources"]
    assert mine["rollbacks"] == other["rollbacks"]


def test_losses_that_stay_high_stop_the_run(poisoned: dict[str, Any]) -> None:
    del poisoned["data"]["phases"][1]
    with pytest.raises(TrainingError, match="10 steps in a row were skipped"):
        run(poisoned, "skip")
    poisoned["train"]["spike_window_steps"] = 1
    with pytest.raises(TrainingError, match="rolled back 3 times, and the loss spikes again"):
        run(poisoned, "rollback")


def test_an_optimizer_that_cannot_leave_out_an_update_is_refused(poisoned: dict[str, Any]) -> None:
    poisoned["optimizer"] = {"name": "schedule_free_adamw"}
    with pytest.raises(ConfigError, match="cannot skip an update"):
        run(poisoned, "skip")
