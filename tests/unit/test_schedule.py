"""Learning-rate schedules against values computed by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from steep.optim.config import ScheduleConfig
from steep.optim.schedule import cooldown_start, multiplier, warmup_steps

NAMES = ["constant", "linear", "cosine", "inverse_sqrt", "wsd"]


def curve(total: int, **settings) -> list[float]:
    return [multiplier(step, total, ScheduleConfig(**settings)) for step in range(total)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "constant", "warmup_steps": 3}, [0.25, 0.5, 0.75, 1, 1, 1, 1]),
        ({"name": "linear", "warmup_steps": 1, "final_ratio": 0.0}, [0.5, 1, 0.8, 0.6, 0.4, 0.2, 0]),
        ({"name": "linear", "warmup_steps": 2, "final_ratio": 0.2}, [1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4, 0.2]),
        ({"name": "cosine", "warmup_steps": 0, "final_ratio": 0.0},
         [1, 0.5 + math.sqrt(3) / 4, 0.75, 0.5, 0.25, 0.5 - math.sqrt(3) / 4, 0]),
        ({"name": "inverse_sqrt", "warmup_steps": 3, "final_ratio": 0.5},
         [0.25, 0.5, 0.75, 1, 1 / math.sqrt(2), 1 / math.sqrt(3), 0.5]),
        ({"name": "wsd", "warmup_steps": 1, "decay_ratio": 4 / 7, "decay_shape": "linear", "final_ratio": 0.0},
         [0.5, 1, 1, 0.75, 0.5, 0.25, 0]),
        ({"name": "wsd", "warmup_steps": 0, "decay_ratio": 4 / 7, "decay_shape": "one_minus_sqrt", "final_ratio": 0.0},
         [1, 1, 1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0]),
        ({"name": "wsd", "warmup_steps": 0, "decay_ratio": 2 / 7, "decay_shape": "cosine", "final_ratio": 0.5},
         [1, 1, 1, 1, 1, 0.75, 0.5]),
    ],
)  # fmt: skip
def test_hand_computed(settings, expected):
    assert curve(7, **settings) == pytest.approx(expected, abs=1e-12)


@given(
    total=st.integers(1, 400),
    name=st.sampled_from(NAMES),
    warmup=st.one_of(st.none(), st.integers(0, 500)),
    final=st.floats(0.01, 1),
    decay=st.floats(0.01, 1),
)
def test_shape_of_any_schedule(total, name, warmup, final, decay):
    config = ScheduleConfig(name=name, warmup_steps=warmup, final_ratio=final, decay_ratio=decay)
    values = [multiplier(step, total, config) for step in range(total)]
    start = warmup_steps(total, config)
    assert all(0 < value <= 1 + 1e-12 for value in values)
    assert values[:start] == sorted(values[:start])
    assert values[start:] == sorted(values[start:], reverse=True)
    if start < total:
        assert values[start] == pytest.approx(1) or cooldown_start(total, config) <= start
    if name != "constant" and total - start > 1:
        assert values[-1] == pytest.approx(final)


def test_warmup_as_ratio_rounds_to_steps_and_defaults_to_one_percent():
    assert warmup_steps(1000, ScheduleConfig()) == 10
    assert warmup_steps(30, ScheduleConfig(warmup_ratio=0.1)) == 3
    assert warmup_steps(5, ScheduleConfig(warmup_steps=50)) == 5
    assert curve(5, warmup_steps=5) == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])


def test_one_step_runs_at_the_peak():
    for name in NAMES:
        assert multiplier(0, 1, ScheduleConfig(name=name)) == 1.0


def test_steps_past_the_end_keep_the_last_value():
    assert multiplier(99, 10, ScheduleConfig(final_ratio=0.25)) == pytest.approx(0.25)


def test_inverse_sqrt_to_zero_is_refused_with_what_works():
    with pytest.raises(ValidationError, match="final_ratio above 0"):
        ScheduleConfig(name="inverse_sqrt", final_ratio=0.0)


def test_the_schedule_needs_no_torch():
    code = "import sys, steep.optim.schedule, steep.runtime.device, steep.estimate.hardware; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
