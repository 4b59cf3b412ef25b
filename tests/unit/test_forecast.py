"""The forecast of a run's end: right on curves that are known, calm, and the same after a resume."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import steep
from steep.optim.config import ScheduleConfig
from steep.optim.schedule import multiplier
from steep.reporting.page import report_page
from steep.reporting.run_files import read_run
from steep.trackers.backends.console import train_line
from steep.training.forecast import Forecaster, forecast, last_steps
from support import run_mapping

STEPS = 400
COSINE = ScheduleConfig(name="cosine", warmup_ratio=0.02, final_ratio=0.1)


def rates(schedule: ScheduleConfig = COSINE) -> np.ndarray:
    return np.array([multiplier(step, STEPS, schedule) for step in range(STEPS)])


def curve(alpha: float, annealed: float, noise: float, seed: int, schedule: ScheduleConfig = COSINE) -> np.ndarray:
    """A loss that falls as the model of the forecast says, with noise."""
    area = np.cumsum(rates(schedule))
    clean = 2.5 + 0.5 * (area / area[-1]) ** -alpha + annealed * rates(schedule)
    return clean + noise * np.random.default_rng(seed).standard_normal(STEPS)


def test_the_band_holds_what_comes_about_as_often_as_it_says() -> None:
    held, total = 0, 0
    for seed in range(24):
        losses = curve(alpha=[0.1, 0.3, 0.6][seed % 3], annealed=[0.0, 0.05, 0.12][seed % 3], noise=0.05, seed=seed)
        final = losses[last_steps(STEPS)].mean()
        for share in (0.15, 0.4, 0.8):
            found = forecast(losses[: int(share * STEPS)], rates(), warmup=8)
            assert found is not None
            held += found.low <= final <= found.high
            total += 1
    assert 0.8 <= held / total <= 1.0


def test_more_of_the_run_makes_the_band_narrower_and_the_whole_run_is_known() -> None:
    losses = curve(0.3, 0.05, 0.03, seed=1)
    widths = []
    for stop in (60, 150, 300, STEPS):
        found = forecast(losses[:stop], rates(), warmup=8)
        assert found is not None
        widths.append(found.high - found.low)
    assert widths == sorted(widths, reverse=True)
    assert found.expected == pytest.approx(losses[last_steps(STEPS)].mean(), abs=1e-12)
    assert widths[-1] < 1e-9


def test_annealing_ahead_is_expected_to_help() -> None:
    """Before the cooldown of a WSD schedule the loss is flat; the end is expected below it."""
    schedule = ScheduleConfig(name="wsd", warmup_ratio=0.02, final_ratio=0.0)
    losses = curve(0.3, 0.06, 0.01, seed=2, schedule=schedule)
    found = forecast(losses[:200], rates(schedule), warmup=8)
    assert found is not None
    assert found.expected < losses[180:200].mean()


def test_a_spike_or_a_missing_step_does_not_move_it_far() -> None:
    losses = curve(0.3, 0.05, 0.03, seed=3)
    calm = forecast(losses[:200], rates(), warmup=8)
    losses[150] += 3.0
    losses[100:105] = np.nan
    shaken = forecast(losses[:200], rates(), warmup=8)
    assert calm is not None
    assert shaken is not None
    assert shaken.expected == pytest.approx(calm.expected, abs=0.06)


def test_too_few_losses_make_no_forecast() -> None:
    assert forecast(curve(0.3, 0.0, 0.01, seed=4)[:12], rates(), warmup=8) is None


def test_lines_have_it_from_fifteen_percent_on() -> None:
    forecaster = Forecaster(STEPS, COSINE)
    losses = curve(0.3, 0.05, 0.03, seed=5)
    lines = [
        forecaster.observe([{"kind": "train", "step": step, "loss": float(loss)}])[0]
        for step, loss in enumerate(losses)
    ]
    first = next(line["step"] for line in lines if "forecast_loss" in line)
    assert first == 59
    assert all(line["forecast_low"] <= line["forecast_loss"] <= line["forecast_high"] for line in lines[first:])
    assert "ends at" in train_line(lines[-1], STEPS, 200)
    assert "ends at" not in train_line(lines[10], STEPS, 200)
    resumed = Forecaster(STEPS, COSINE, lines[:201])  # from the lines of the process before
    assert resumed.observe([lines[200] | {}])[0]["forecast_loss"] == pytest.approx(
        lines[200]["forecast_loss"], abs=0.02
    )


def test_a_run_says_what_it_expected_and_what_came(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    mapping: dict[str, Any] = run_mapping(
        tmp_path, corpus_directory, tiny_tokenizer_directory, train={"global_batch_size": 2, "steps": 40}
    )
    mapping["schedule"] = {"name": "cosine", "warmup_ratio": 0.05}
    folder = steep.train(mapping).run_directory
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    forecasts = [line for line in lines if line.get("forecast_loss") is not None]
    assert forecasts[0]["step"] >= 5
    assert len(forecasts) > 30
    page = report_page(read_run(folder))
    assert "Mean training loss of the last 5 % of the steps: at step" in page
    assert "; it was" in page


def test_importing_the_forecast_needs_no_torch() -> None:
    code = "import sys, steep.training.forecast; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
